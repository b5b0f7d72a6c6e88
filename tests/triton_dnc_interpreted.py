"""The Triton DNC sequence on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead_of_time import Kernel
from torch import Tensor

import seqmem_fast
from seqmem_fast._triton import dnc as launchers
from seqmem_fast.ops.dnc import _words_of
from seqmem_fast.reference import dnc as reference
from seqmem_fast.reference.dnc import DNCOptions, DNCState

assert seqmem_fast.__version__
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.3, torch.float16: 2e-3}
SIZES = (3, 2, 2, 5, 6, 3)  # T, B, I, C, N, M
SAMPLES = {s.name: s for s in reference.sample_inputs(sizes=SIZES)}


def assert_near(ours: Tensor, right: Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    assert ours.shape == right.shape and ours.dtype == dtype
    error = (ours.detach().double() - right).norm() / right.norm().clamp_min(1e-6)
    assert error <= factor * TOLERANCES[dtype]


def converted(a: Any, dtype: torch.dtype, leaf: bool = False) -> Any:
    if isinstance(a, DNCState):
        return DNCState(*(converted(b, dtype, leaf) for b in a))
    if isinstance(a, tuple):
        return tuple(converted(b, dtype, leaf) for b in a)
    if isinstance(a, Tensor) and a.is_floating_point():
        return a.to(dtype, copy=True).requires_grad_(leaf)
    return a


def arguments(sample: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The op's: its tensors, and its options up to `trace`."""
    x, first, controller, weight, bias = sample.args
    kwargs = dict(sample.kwargs)
    names = ("norm", "initial", "lengths", "reset")
    norm, initial, lengths, reset = (kwargs.pop(name, None) for name in names)
    words = kwargs.pop("controller_type", "lstm")
    options = DNCOptions(**kwargs)
    tensors = (x, list(first), list(controller), weight, bias, list(norm or ()))
    floats = options.norm_floor, options.eps, options.mask_min
    rest = list(initial or ()), lengths, reset
    return (*tensors, *rest), (_words_of(options, words), *floats)


def check(sample: Any, dtype: torch.dtype, backward: bool = True) -> None:
    args = converted(sample.args, dtype)
    kwargs = {name: converted(a, dtype) for name, a in sample.kwargs.items()}
    exact = sample._replace(
        args=converted(args, torch.float64, leaf=True),
        kwargs={name: converted(a, torch.float64, leaf=True) for name, a in kwargs.items()},
    )
    features, state, trace = reference.dnc_trace(*exact.args, **exact.kwargs)
    right = (features, *state, *trace[:3])

    lengths = kwargs.get("lengths")
    if lengths is not None:  # what the padding holds does not matter
        for b, length in enumerate(lengths):
            args[0][length:, b] = float("nan")
    tensors, options = arguments(sample._replace(args=args, kwargs=kwargs))
    ours = launchers.dnc(*tensors, *options, True, True)
    for a, b in zip(ours[:13], right, strict=True):
        assert_near(a, b.detach(), dtype)
    if not backward:
        return
    seeds = [torch.randn(b.shape).to(dtype) for b in right]
    loss = sum((a * b).sum() for a, b in zip(right, seeds, strict=True))
    x, first, controller, weight, bias, norm, initial, *_ = arguments(exact)[0]
    leaves = (x, *first, *controller, weight, bias, *norm, *initial)
    expected = torch.autograd.grad(loss, leaves, materialize_grads=True)
    grads = launchers.dnc_backward(*seeds, *tensors, ours[0], *ours[10:], *options, [True] * 4)
    for grad, theirs in zip(grads, expected, strict=True):
        assert_near(grad, theirs, dtype, 10)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_option(name: str) -> None:
    check(SAMPLES[name], torch.float32)


def test_segments() -> None:
    """More steps than one segment, their memories and links from checkpoints."""
    samples = reference.sample_inputs(sizes=(2 * launchers.SHORTEST_SEGMENT + 1, 2, 2, 3, 4, 2))
    check(next(s for s in samples if s.name == "reset"), torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check(SAMPLES["reset"], dtype)


def test_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_ELEMENTS", 8)
    check(SAMPLES["reset"], torch.float64)
    check(SAMPLES["plain"], torch.float16)  # rounded at the ends alone


def test_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows of links than a program holds at once; equal usages."""
    monkeypatch.setattr(launchers, "_TILE", 256)
    sample = next(reference.sample_inputs(sizes=(2, 1, 2, 3, 19, 3)))
    x, first, *rest = sample.args
    for usage in (first.usage, torch.ones_like(first.usage), torch.zeros_like(first.usage)):
        start = first._replace(usage=usage, read_weights=torch.zeros_like(first.read_weights))
        check(sample._replace(args=(x, start, *rest)), torch.float32, backward=False)


def test_kept_or_not_rows_and_checks() -> None:
    tensors, options = arguments(SAMPLES["plain"])
    x, first, *rest = tensors
    kept = launchers.dnc(*tensors, *options, False, True)
    dropped = launchers.dnc(*tensors, *options, False, False)
    assert all(torch.equal(a, b) for a, b in zip(kept[:10], dropped[:10], strict=True))
    assert [a.numel() for a in dropped[10:]] == [0] * len(dropped[10:])
    bad = x.clone()
    bad[1, 1] = float("nan")  # stays in its row
    ours = launchers.dnc(bad, first, *rest, *options, True, True)
    for k, (a, b) in enumerate(zip(ours[:13], kept, strict=False)):
        rows = 0 if 3 <= k < 10 else (slice(None), 0)
        assert torch.equal(a[rows], b[rows])
    empty = [a[:, :0] if k < 2 else a[:0] for k, a in enumerate(first)]
    none = launchers.dnc(x[:, :0], empty, *rest, *options, True, True)
    assert none[0].shape == (3, 0, 11)
    none = launchers.dnc(x[:0], first, *rest, *options, True, True)
    assert none[0].shape == (0, 2, 11)
    assert all(torch.equal(a, b) for a, b in zip(none[1:10], first, strict=True))
    with pytest.raises(ValueError, match=r"expected memory of shape"):
        short = [a[:1] if k == 2 else a for k, a in enumerate(first)]
        launchers.dnc(x, short, *rest, *options, True, True)


def kernels() -> list[Kernel]:
    """An LSTM, float32, plain and with every option; the backward spills a little beyond."""
    flags = ("SQUASH", "MASKS", "DEALLOCATE", "SHARPEN", "SOFTMAX")
    options = {
        "LAYERS": 1, "LSTM": True, "LINKS": True, "STRENGTH": 1.0, "NORM_FLOOR": 1e-6, "EPS": 1e-6,
        "MASK_MIN": 0.0, "BD": 4, "BC": 32,
    }  # fmt: skip
    pointers = {"lengths_ptr": "*i64", "reset_ptr": "*u8"}

    def kernel(name: str, label: str, on: bool, **shape: int) -> Kernel:
        constants = {**options, **shape, **dict.fromkeys(flags, on)}
        if name == "dnc_backward":
            constants["USAGE_GRADIENT"] = on
        file = f"{name.removesuffix('_forward')}_kernels"
        aligned = ("slots", "width")
        return Kernel(file, name, "fp32", 8, constants, pointers, aligned, label=label)

    return [
        kernel("dnc_forward", "64, all", True, BN=64, BI=32, BW=32, BK=32),
        kernel("dnc_forward", "64", False, BN=64, BI=32, BW=32, BK=32),
        kernel("dnc_forward", "128", False, BN=128, BI=16, BW=64, BK=32),
        kernel("dnc_backward", "32", False, BN=32, BI=32, BW=32, BK=16),
    ]
