"""What the interpreted tests of several ops' Triton launchers share."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from ahead_of_time import Kernel
from sparse_attentions import SparseAttention
from torch import Tensor

from seqmem_fast._triton.normalizers import ANY, ENTMAX15, SOFTMAX
from seqmem_fast.reference.common import Sample

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


# ---- attentions of heads to some of the keys


def check_heads(
    launchers: ModuleType,
    op: SparseAttention,
    sample: Sample,
    dtype: torch.dtype,
    given: Sequence[bool] | None = None,
) -> None:
    """Forward and backward beside the reference in float64; given: which gradients come in, all if
    None."""
    inputs = op.dispatched(sample)
    operands, rest = [t.to(dtype) for t in inputs[:3]], inputs[3:]
    exact = [t.double().requires_grad_() for t in operands]
    right_ones = launchers._plain(*exact, *rest)
    found = vars(launchers)[op.name](*operands, *rest, True)
    seeds: list[Tensor | None] = []
    given = [True] * len(found) if given is None else given
    for ours, theirs, is_given in zip(found, right_ones, given, strict=True):
        assert_near(ours, theirs.detach(), dtype)
        seeds.append(torch.randn(theirs.shape).to(dtype) if is_given else None)
    pairs = zip(right_ones, seeds, strict=True)
    loss = sum((a * s.double()).sum() for a, s in pairs if s is not None)
    expected = torch.autograd.grad(loss, exact, materialize_grads=True)
    saved = [t.detach().to(dtype) for t in right_ones[1:]]
    backward = vars(launchers)[f"{op.name}_backward"]
    grads = backward(*seeds, *operands, *rest, *saved, [True] * 3)
    for ours, theirs in zip(grads, expected, strict=True):
        assert_near(ours, theirs, dtype, 10)


# Scores that spread far enough for many weights to be zero.
NORMALIZERS: dict[str, dict[str, Any]] = {
    "sparsemax": {"normalizer": "sparsemax"},
    "entmax15": {"normalizer": "entmax15"},
    "1.05": {"normalizer": "entmax", "alpha": 1.05},
    "1.7 and dropout": {
        "normalizer": "entmax",
        "alpha": 1.7,
        "dropout": 0.3,
        "seed": torch.tensor([2**33 + 1]),
    },
}
every_normalizer = pytest.mark.parametrize("normalizer", NORMALIZERS)
normalizers_and_dtypes = pytest.mark.parametrize(
    ("normalizer", "dtype"),
    [
        *((name, torch.float32) for name in NORMALIZERS),
        ("1.05", torch.float64),
        ("entmax15", torch.float64),
        ("1.05", torch.float16),
        ("sparsemax", torch.float16),
    ],
    ids=str,
)


def normalized(sample: Sample, normalizer: str) -> Sample:
    options = {**sample.kwargs, **NORMALIZERS[normalizer], "scale": 1.5}
    return sample._replace(kwargs=options)


def check_bad_values_of_entmax(
    launchers: ModuleType, op: SparseAttention, sample: Sample, normalizer: str
) -> None:
    """NaN and infinity make their own rows NaN; no other query's weights change."""
    forward = vars(launchers)[op.name]
    q, *rest = sample.args
    clean, bad = q.clone(), q.clone()
    clean[0, 0, 1:4] = 0
    bad[0, 0, 1], bad[0, 0, 2], bad[0, 0, 3] = torch.nan, torch.inf, -torch.inf
    outputs = [
        forward(*op.dispatched(normalized(Sample("", (t, *rest), sample.kwargs), normalizer)), True)
        for t in (clean, bad)
    ]
    expected, found = (output for output, *_ in outputs)
    assert found[0, 0, 1:4].isnan().all(-1).all()
    found[0, 0, 1:4] = expected[0, 0, 1:4]
    assert torch.equal(found, expected) and expected.any()


def check_edges_of_heads(
    launchers: ModuleType,
    op: SparseAttention,
    sample: Sample,
    nothing: Callable[[int], tuple[Any, ...]],
) -> None:
    """Without weights, rows, queries or keys, and with a wrong shape; nothing: the keys seen by so
    many queries, of which none need be."""
    forward, backward = vars(launchers)[op.name], vars(launchers)[f"{op.name}_backward"]
    q, k, v, *seen = sample.args
    output, *_ = forward(*op.dispatched(sample), True)
    alone, *rest = forward(*op.dispatched(sample), False)
    assert torch.equal(alone, output) and rest and not any(t.numel() for t in rest)
    for part in ((q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0]), (q[:0], k[:0], v[:0])):
        given = op.dispatched(Sample("empty", (*part, *nothing(part[0].size(2)))))
        output, *saved = forward(*given, True)
        assert output.shape == (*part[0].shape[:3], v.shape[3]) and not output.any()
        grads = backward(output, *[None] * len(saved), *given, *saved, [True] * 3)
        assert [g.shape for g in grads] == [t.shape for t in part] and not grads[1].any()
    with pytest.raises(ValueError, match="expected k of shape"):
        forward(*op.dispatched(Sample("wrong", (q, k[:1], v, *seen))), True)


def kernels_of_heads(
    op: SparseAttention,
    integers: Sequence[str],
    launches: dict[str, dict[str, Any]],
    in_float32: dict[str, dict[str, Any]],
    with_entmax: dict[str, dict[str, Any]],
) -> list[Kernel]:
    """Each kernel in bfloat16 and, with dropout, in float32, with softmax and entmax; its constants
    (and "warps"), and what of these is other in float32 and with entmax."""
    rows = ("q_0", "q_1", "q_t", "k_0", "k_1", "k_t", "v_0", "v_1", "v_t", "width", "value_width")
    wide = dict.fromkeys(("delta_ptr", "slopes_ptr"), "*fp32")
    pointers = {**dict.fromkeys((*integers, "seed_ptr"), "*i64"), "alpha_ptr": "*fp64", **wide}
    usual = {"BD": 64, "BV": 64, "SCALE": 0.125}
    storages: dict[str, dict[str, Any]] = {
        "bf16": {"warps": 4, "BELOW": 0, "FACTOR": 1.0},
        "fp32": {"warps": 8, "BELOW": 9, "FACTOR": 1.5},
    }
    found = []
    for name, options in launches.items():
        for storage, more in storages.items():
            for kind in (SOFTMAX, ENTMAX15, ANY):
                given = {**usual, **more, **options, "KIND": kind.value}
                given |= in_float32.get(name, {}) if storage == "fp32" else {}
                given |= with_entmax.get(name, {}) if kind != SOFTMAX else {}
                warps, label = given.pop("warps"), f"{storage} kind {kind.value}"
                launch = (f"{op.name}_kernels", f"{op.name}_{name}", storage, warps, given)
                found.append(Kernel(*launch, pointers, rows, label=label))
    return found
