"""The Triton NTM sequence on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead_of_time import Kernel
from torch import Tensor
from triton_attention_check import spread

import seqmem_fast
from seqmem_fast._triton import machine
from seqmem_fast._triton import ntm as launchers
from seqmem_fast.reference import ntm as reference
from seqmem_fast.reference.ntm_addressing import NTMState

assert seqmem_fast.__version__
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.3, torch.float16: 1e-3}
SIZES = (2, 2, 2, 5, 6, 3)  # T, B, I, C, N, M
SAMPLES = {s.name: s for s in reference.sample_inputs(sizes=SIZES)}


def assert_near(ours: Tensor, right: Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    assert ours.shape == right.shape and ours.dtype == dtype
    error = (ours.detach().double() - right).norm() / right.norm().clamp_min(1e-6)
    assert error <= factor * TOLERANCES[dtype]


def converted(a: Any, dtype: torch.dtype, leaf: bool = False) -> Any:
    if isinstance(a, NTMState):
        return NTMState(*(converted(b, dtype, leaf) for b in a))
    if isinstance(a, tuple):
        return tuple(converted(b, dtype, leaf) for b in a)
    if isinstance(a, Tensor) and a.is_floating_point():
        return a.to(dtype, copy=True).requires_grad_(leaf)
    return a


def check(sample: Any, dtype: torch.dtype) -> None:
    args = converted(sample.args, dtype)
    kwargs = {name: converted(a, dtype) for name, a in sample.kwargs.items()}
    exact = converted(args, torch.float64, leaf=True)
    exact_kwargs = {name: converted(a, torch.float64, leaf=True) for name, a in kwargs.items()}
    features, state, trace = reference.ntm_trace(*exact, **exact_kwargs)
    right = (features, *state, trace)

    x, first, controller, head_weight, head_bias = args
    initial = kwargs.get("initial", ())
    lengths, reset = kwargs.get("lengths"), kwargs.get("reset")
    if lengths is not None:  # what the padding holds does not matter
        for b, length in enumerate(lengths):
            x[length:, b] = float("nan")
    options = (
        kwargs.get("heads", "wr"),
        kwargs.get("shift_range", 1),
        kwargs.get("controller_type", "lstm") == "lstm",
        kwargs.get("squash", True),
    )
    tensors = (x, *first, controller, head_weight, head_bias, initial, lengths, reset)
    ours = launchers.ntm(*tensors, *options, True, True)
    for a, b in zip(ours[:7], right, strict=True):
        assert_near(a, b.detach(), dtype)
    seeds = [torch.randn(b.shape).to(dtype) for b in right]
    loss = sum((a * b).sum() for a, b in zip(right, seeds, strict=True))
    leaves = (exact[0], *exact[1], *exact[3:], *exact_kwargs.get("initial", ()), *exact[2])
    expected = torch.autograd.grad(loss, leaves, materialize_grads=True)
    grads = launchers.ntm_backward(
        *seeds, *tensors, ours[0], ours[6], ours[7], ours[8], *options, [True] * 4
    )
    for grad, theirs in zip(grads, expected, strict=True):
        assert_near(grad, theirs, dtype, 10)


@pytest.mark.parametrize("name", ["many_heads", "writes_only", "feedforward", "all_padded"])
def test_every_option(name: str) -> None:
    check(SAMPLES[name], torch.float32)


def test_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_ELEMENTS", 8)
    check(SAMPLES["all_padded"], torch.float64)
    check(SAMPLES["plain"], torch.float16)  # rounded at the ends alone


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check(SAMPLES["plain"], dtype)


def test_segments() -> None:
    """More steps than one segment, their memories from checkpoints."""
    samples = reference.sample_inputs(sizes=(2 * machine.SHORTEST_SEGMENT + 1, 2, 2, 3, 4, 2))
    check(next(s for s in samples if s.name == "all_padded"), torch.float32)


def call(sample: Any, x: Tensor, first: NTMState, trace: bool, save: bool) -> tuple[Tensor, ...]:
    _, _, controller, *head = sample.args
    return launchers.ntm(
        x, *first, controller, *head, (), None, None, "wr", 1, True, True, trace, save
    )


def test_kept_or_not_rows_and_checks() -> None:
    sample = SAMPLES["plain"]
    x, first = sample.args[:2]
    kept, dropped = call(sample, x, first, False, True), call(sample, x, first, False, False)
    for a, b in zip(kept[:6], dropped[:6], strict=True):
        assert torch.equal(a, b)
    assert [a.numel() for a in dropped[6:]] == [0, 0, 0]
    bad = x.clone()
    bad[1, 1] = float("nan")  # stays in its row
    for k, (a, b) in enumerate(zip(call(sample, bad, first, True, True), kept, strict=True)):
        if k < 6:
            rows = 0 if k in (3, 4, 5) else (slice(None), 0)
            assert torch.equal(a[rows], b[rows])
    empty = NTMState(*(a[:, :0] if k < 2 else a[:0] for k, a in enumerate(first)))
    assert call(sample, x[:, :0], empty, True, True)[0].shape == (2, 0, 8)
    none = call(sample, x[:0], first, True, True)
    assert none[0].shape == (0, 2, 8)
    assert all(torch.equal(a, b) for a, b in zip(none[1:6], first, strict=True))
    with pytest.raises(ValueError, match="expected memory of shape"):
        call(sample, x, first._replace(memory=first.memory[:1]), True, True)


def test_offsets_past_32_bits() -> None:
    sample = next(reference.sample_inputs(sizes=(3, 1, 2, 2, 4, 2)))
    x, first, controller, *head = sample.args
    outs = call(sample, x, first, True, True)
    grad = torch.randn_like(outs[0])
    near, far = (
        launchers.ntm_backward(
            a, *[None] * 6, x, *first, controller, *head, (), None, None, outs[0], *outs[6:],
            "wr", 1, True, True, [True] * 4,
        )
        for a in (grad, spread(grad, 0))
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


def kernels() -> list[Kernel]:
    """The copy task's: N = 128, M = 20, C = 100, an LSTM; float32."""
    shape = {"BN": 128, "BW": 32, "BS": 4, "BC": 128, "BK": 32}
    options = {"LAYERS": 1, "LSTM": True, "SQUASH": True}
    pointers = {"lengths_ptr": "*i64", "reset_ptr": "*u8"}
    file, constants = "ntm_kernels", {**shape, **options}
    names = ("ntm_forward", "ntm_backward")
    return [Kernel(file, name, "fp32", 8, constants, pointers, ("slots",)) for name in names]
