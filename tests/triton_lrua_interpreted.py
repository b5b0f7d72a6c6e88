"""The Triton kernels of least recently used access on CPU tensors; run by test_triton_ops.py in a
process of its own.

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
from seqmem_fast._triton import lrua as launchers
from seqmem_fast._triton import machine
from seqmem_fast.reference import lrua as reference
from seqmem_fast.reference.lrua import LRUAState

assert seqmem_fast.__version__
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.3, torch.float16: 1e-3}
SIZES = (2, 2, 2, 5, 6, 3)  # T, B, I, C, N, M
OPTIONS = ["one_head", "many_heads", "two_layers", "feedforward", "all_padded"]
SAMPLES = {s.name: s for s in reference.sample_inputs(sizes=SIZES)}


def assert_near(ours: Tensor, right: Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    assert ours.shape == right.shape and ours.dtype == dtype
    error = (ours.detach().double() - right).norm() / right.norm().clamp_min(1e-6)
    assert error <= factor * TOLERANCES[dtype]


def converted(a: Any, dtype: torch.dtype, leaf: bool = False) -> Any:
    if isinstance(a, LRUAState):
        return LRUAState(*(converted(b, dtype, leaf) for b in a))
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
    features, state, trace = reference.lrua_trace(*exact, **exact_kwargs)
    right = (features, *state, *trace)

    x, first, controller, head_weight, head_bias = args
    initial = kwargs.get("initial", ())
    lengths, reset = kwargs.get("lengths"), kwargs.get("reset")
    if lengths is not None:  # what the padding holds does not matter
        for b, length in enumerate(lengths):
            x[length:, b] = float("nan")
    options = (
        kwargs.get("controller_type", "lstm") == "lstm",
        kwargs.get("add", "own") == "own",
        kwargs.get("strength", False),
        kwargs.get("erase_all", False),
        kwargs.get("gamma", 0.95),
    )
    tensors = (x, first, controller, head_weight, head_bias, initial, lengths, reset)
    ours = launchers.lrua(*tensors, *options, True, True)
    for a, b in zip(ours[:10], right, strict=True):
        assert_near(a, b.detach(), dtype)
    learn = [k for k, b in enumerate(right) if b.requires_grad]  # all but usages
    seeds = {k: torch.randn(right[k].shape).to(dtype) for k in learn}
    loss = sum((right[k] * seed).sum() for k, seed in seeds.items())
    leaves = (exact[0], *exact[1], *exact[3:], *exact_kwargs.get("initial", ()), *exact[2])
    expected = torch.autograd.grad(loss, leaves, allow_unused=True)
    grads = launchers.lrua_backward(
        *seeds.values(), *tensors, ours[0], *ours[9:], *options, [True] * 4
    )
    for grad, leaf, theirs in zip(grads, leaves, expected, strict=True):
        if grad.numel() or leaf.numel() == 0:
            assert_near(grad, torch.zeros_like(leaf) if theirs is None else theirs, dtype, 10)
        else:  # usage
            assert theirs is None


@pytest.mark.parametrize("name", OPTIONS)
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


def call(sample: Any, x: Tensor, first: LRUAState, trace: bool, save: bool) -> tuple[Tensor, ...]:
    _, _, controller, *head = sample.args
    return launchers.lrua(
        x, first, controller, *head, (), None, None, True, True, False, False, 0.95, trace, save
    )


def test_kept_or_not_rows_and_checks() -> None:
    sample = SAMPLES["plain"]
    x, first = sample.args[:2]
    kept, dropped = call(sample, x, first, False, True), call(sample, x, first, False, False)
    for a, b in zip(kept[:7], dropped[:7], strict=True):
        assert torch.equal(a, b)
    assert [a.numel() for a in dropped[7:]] == [0] * 6
    assert [a.numel() for a in kept[7:9]] == [0, 0]
    bad = x.clone()
    bad[1, 1] = float("nan")  # stays in its row
    for k, (a, b) in enumerate(zip(call(sample, bad, first, True, True), kept, strict=True)):
        if k < 7:
            rows = 0 if k > 2 else (slice(None), 0)
            assert torch.equal(a[rows], b[rows])
    empty = LRUAState(*(a[:, :0] if k < 2 else a[:0] for k, a in enumerate(first)))
    assert call(sample, x[:, :0], empty, True, True)[0].shape == (2, 0, 11)
    none = call(sample, x[:0], first, True, True)
    assert none[0].shape == (0, 2, 11)
    assert all(torch.equal(a, b) for a, b in zip(none[1:7], first, strict=True))
    with pytest.raises(ValueError, match="expected memory of shape"):
        call(sample, x, first._replace(memory=first.memory[:1]), True, True)


def test_offsets_past_32_bits() -> None:
    sample = next(reference.sample_inputs(sizes=(3, 1, 2, 2, 4, 2)))
    x, first, controller, *head = sample.args
    outs = call(sample, x, first, True, True)
    grad = torch.randn_like(outs[0])
    near, far = (
        launchers.lrua_backward(
            a, *[None] * 7, x, first, controller, *head, (), None, None, outs[0], *outs[9:],
            True, True, False, False, 0.95, [True] * 4,
        )
        for a in (grad, spread(grad, 0))
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


def test_least_used_slots() -> None:
    """Ties by ascending index, NaN last."""
    sample = next(s for s in reference.sample_inputs(sizes=(1, 2, 2, 2, 9, 2), heads=4))
    x, first = sample.args[:2]
    nan, inf = float("nan"), float("inf")
    usage = [[1.0, 0, 1, 0, 2, 0, 1, 0, 0], [nan, 3, inf, nan, nan, nan, nan, nan, 2]]
    outs = call(sample, x, first._replace(usage=torch.tensor(usage)), False, True)
    assert outs[10].tolist() == [[[1, 3, 5, 7], [8, 1, 0, 2]]]


def kernels() -> list[Kernel]:
    """One-shot classification's: N = 128, M = 40, C = 200, four heads, an LSTM; float32."""
    shape = {"BN": 128, "BW": 64, "BC": 64, "BK": 32}
    options = {"LAYERS": 1, "LSTM": True, "OWN": True, "STRENGTH": False}
    pointers = {"lengths_ptr": "*i64", "reset_ptr": "*u8", "slots_ptr": "*i64"}
    file, constants = "lrua_kernels", {**shape, **options}
    return [
        Kernel(file, "lrua_forward", "fp32", 8, {**constants, "GAMMA": 0.95}, pointers, ("slots",)),
        Kernel(file, "lrua_backward", "fp32", 8, constants, pointers, ("slots",)),
    ]
