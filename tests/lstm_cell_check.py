"""What the tests of the LSTM cell's Triton launchers and of its CUDA kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqmem_fast.reference import lstm as reference

TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}
CELLS = ("plain", "zero_state", "no_bias")


def widened(a: Tensor | None) -> Tensor | None:
    return None if a is None else a.to(torch.float64, copy=True).requires_grad_()


def assert_near(ours: Tensor, right: Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    ours, right = ours.detach().double(), right.detach()
    assert ours.shape == right.shape
    error = (ours - right).norm() / right.norm().clamp_min(1e-30)
    assert error <= factor * TOLERANCES[dtype]


def check_cell(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    name: str,
    dtype: torch.dtype,
    hidden: int,
    batch: int = 3,
) -> None:
    """Both beside the reference in float64, as a sequence of one step, which has the gates too."""
    cells = reference.cell_sample_inputs(dtype=dtype, sizes=(batch, 4, hidden))
    x, state, *weights = next(s.args for s in cells if s.name == name)
    h, c = state or (None, None)
    wide_x, wide_h, wide_c = widened(x), widened(h), widened(c)
    wide = [widened(w) for w in weights]
    wide_state = None if h is None else (wide_h, wide_c)
    _, (hy, cy), gates, _ = reference.lstm_trace(wide_x[None], wide_state, *wide)
    right = (hy, cy, gates[0])

    ours = forward(x, h, c, *weights, True)
    for a, b in zip(ours, right, strict=True):
        assert_near(a, b, dtype)
    without = forward(x, h, c, *weights, False)
    assert torch.equal(ours[0], without[0]) and torch.equal(ours[1], without[1])
    assert without[2].shape == (0,)

    seeds = [torch.randn_like(a) for a in ours]
    saved = [a.detach().to(dtype) for a in right]
    has_bias = weights[2] is not None
    grads = backward(
        *seeds, x, h, c, *weights[:2], saved[2], saved[1], has_bias, [True, h is not None, True]
    )
    loss = sum((a * b.double()).sum() for a, b in zip(right, seeds, strict=True))
    leaves = (wide_x, wide_h, wide_c, wide[0], wide[1], wide[2])
    expected = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None]))
    for leaf, grad in zip(leaves, grads, strict=True):
        if leaf is None:
            assert grad.numel() == 0 or not grad.any()
        else:
            assert_near(grad, next(expected), dtype, 5)
