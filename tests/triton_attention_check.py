"""What the interpreted tests of several ops' Triton launchers share."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def assert_near(ours: Tensor, right: Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    assert ours.shape == right.shape and ours.dtype == dtype
    error = (ours.detach().double() - right).norm() / right.norm().clamp_min(1e-30)
    assert error <= factor * TOLERANCES[dtype]


def spread(t: Tensor, dim: int) -> Tensor:
    """A copy of t whose third row along dim is stored 2^31 elements after the first.

    An offset of 32 bits would wrap, and find zeros as far before it. Untouched pages are not real.
    """
    stride = list(torch.empty_like(t[:0]).stride())
    stride[dim] = 1 << 30
    size = (t.element_size() << 32) + (1 << 20)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    whole = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=t.dtype)
    return whole.as_strided(t.shape, stride, 1 << 31).copy_(t)


def check_launchers(
    launchers: tuple[Callable[..., Any], Callable[..., Any]],
    reference: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    dtype: torch.dtype,
    given: tuple[bool, bool] = (True, True),
    options: Sequence[Any] = (),
) -> None:
    """Forward and backward beside the reference in float64; given: which gradients come in."""
    forward, backward = launchers
    args = [a.to(dtype) if a is not None and a.is_floating_point() else a for a in tensors]
    exact = [
        a.to(torch.float64, copy=True).requires_grad_()
        if a is not None and a.is_floating_point()
        else a
        for a in args
    ]
    right = reference(*exact, *options)
    seeds = []
    for a, b, is_given in zip(forward(*args, *options), right, given, strict=True):
        assert_near(a, b.detach(), dtype)
        seeds.append(torch.randn(b.shape).to(dtype) if is_given else None)
    leaves = [a for a in exact if a is not None and a.requires_grad]
    loss = sum((a * b).sum() for a, b in zip(right, seeds, strict=True) if b is not None)
    expected = iter(torch.autograd.grad(loss, leaves, materialize_grads=True))
    saved = right[1].detach().to(dtype)
    grads = backward(*seeds, *args, saved, *options, [True] * len(args))
    for leaf, grad in zip(exact, grads, strict=True):
        if leaf is not None and leaf.requires_grad:
            assert_near(grad, next(expected), dtype, 10)
        else:
            assert grad.shape == (0,)
