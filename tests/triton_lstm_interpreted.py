"""The Triton LSTM on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from ahead_of_time import TARGETS, Kernel
from lstm_cell_check import CELLS, TOLERANCES, assert_near, check_cell, widened

import seqmem_fast
from seqmem_fast._triton import common, lstm_routes
from seqmem_fast._triton import lstm as launchers
from seqmem_fast._triton.lstm_routes import OnChipPlan
from seqmem_fast.reference import lstm as reference
from seqmem_fast.reference.common import Sample

assert seqmem_fast.__version__
SIZES = (3, 3, 2, 5)  # T, B, I, H: no power of two in sight

ROUTES = {
    "step": None,
    "multiply-add": OnChipPlan(1, 16, False, "ieee", 4),
    "dot": OnChipPlan(16, 16, True, "ieee", 4),
}
# Triton's interpreter multiplies the bit patterns of bfloat16, so its dot is tried in the others.
RUNS = [
    ("step", torch.float32), ("step", torch.float64), ("multiply-add", torch.float32),
    ("dot", torch.float32),
]  # fmt: skip
SIXTEEN_BITS = [
    ("step", torch.bfloat16), ("step", torch.float16), ("multiply-add", torch.bfloat16),
    ("multiply-add", torch.float16), ("dot", torch.float16),
]  # fmt: skip


@pytest.fixture
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(lstm_routes, "on_chip_plan", lambda *_: ROUTES[request.param])
    return str(request.param)


def samples(dtype: torch.dtype, projected: bool, batch: int = 3) -> Iterator[Any]:
    for sample in reference.sample_inputs(dtype=dtype, sizes=(3, batch, 2, 5)):
        if projected or sample.args[6] is None:
            yield sample
        if sample.name == "all_padded":  # again, so that the on-chip routes meet it too
            x, (_, c), weight_ih, _, *biases, _ = sample.args
            weight_hh = torch.randn(20, 5).to(dtype)
            args = (x, (torch.randn_like(c), c), weight_ih, weight_hh, *biases, None)
            yield Sample("padded_unprojected", args, sample.kwargs)


def check(sample: Any, dtype: torch.dtype, poison: bool = False) -> None:
    x, state, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = sample.args
    names = ("lengths", "reset", "batch_sizes", "batch_first", "reverse")
    defaults = dict(zip(names, (None, None, None, False, False), strict=True))
    options = {**defaults, **sample.kwargs}
    if poison and options["lengths"] is not None:  # what the padding holds does not matter
        x = x.clone()
        padded = x if options["batch_first"] else x.transpose(0, 1)
        for b, length in enumerate(options["lengths"]):
            padded[b, length:] = float("nan")
    h, c = (None, None) if state is None else state
    wide_x, wide_h, wide_c = widened(x), widened(h), widened(c)
    wide = [widened(w) for w in (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)]
    wide_state = None if h is None else (wide_h, wide_c)
    output, (hy, cy), gates, cells = reference.lstm_trace(wide_x, wide_state, *wide, **options)
    right = (output, hy, cy, gates, cells)

    tail = tuple(options.values())
    ours = launchers.lstm(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *tail, True)
    for a, b in zip(ours, right, strict=True):
        assert a.dtype == dtype
        assert_near(a, b, dtype)

    seeds = [torch.randn_like(a).to(dtype) for a in right]
    lengths, reset, batch_sizes, *flags = tail
    grads = launchers.lstm_backward(
        *seeds, x, h, c, weight_ih, weight_hh, weight_hr, lengths, reset, batch_sizes,
        *(right[k].detach().to(dtype) for k in (0, 3, 4)), bias_ih is not None, *flags,
        [True, h is not None, True],
    )  # fmt: skip
    loss = sum((a * b.double()).sum() for a, b in zip(right, seeds, strict=True))
    leaves = (wide_x, wide_h, wide_c, wide[0], wide[1], wide[2], wide[4])
    expected = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None]))
    for leaf, grad in zip(leaves, grads, strict=True):
        if leaf is None:
            assert grad.shape == (0,)
        else:
            assert_near(grad, next(expected), dtype, 5)


@pytest.mark.parametrize("route", ["step"], indirect=True)
def test_one_step(route: str) -> None:
    """Where strides do not tell which dimension time is."""
    for sample in reference.sample_inputs(sizes=(1, 3, 2, 5)):
        check(sample, torch.float32)


@pytest.mark.parametrize("route, dtype", RUNS, indirect=["route"])
def test_every_option(route: str, dtype: torch.dtype) -> None:
    batch = 2 if route == "multiply-add" else 3  # one program a row is slow to interpret
    for sample in samples(dtype, projected=route == "step", batch=batch):
        check(sample, dtype, poison=True)


@pytest.mark.parametrize("route, dtype", SIXTEEN_BITS, indirect=["route"])
def test_storage_of_16_bits(route: str, dtype: torch.dtype) -> None:
    check(next(iter(samples(dtype, projected=False))), dtype)


@pytest.mark.parametrize("route", ["step", "dot"], indirect=True)
def test_more_than_one_block(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, batch = (130, 6) if route == "step" else (20, 18)
    if route == "dot":
        plan = OnChipPlan(16, 32, True, "ieee", 4)
        monkeypatch.setattr(lstm_routes, "on_chip_plan", lambda *_: plan)
    check(next(reference.sample_inputs(sizes=(2, batch, 3, hidden))), torch.float32)


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_gates_kept_or_not_and_no_rows(route: str) -> None:
    x, (h, c), *weights = next(reference.sample_inputs(sizes=SIZES)).args
    tail = (None, None, None, False, False)
    kept = launchers.lstm(x, h, c, *weights, *tail, True)
    dropped = launchers.lstm(x, h, c, *weights, *tail, False)
    for a, b in zip(kept[:3], dropped[:3], strict=True):
        assert torch.equal(a, b)
    assert dropped[3].shape == dropped[4].shape == (0,)
    empty = launchers.lstm(x[:, :0], h[:0], c[:0], *weights, *tail, True)
    assert [tuple(a.shape) for a in empty] == [(3, 0, 5), (0, 5), (0, 5), (3, 0, 20), (3, 0, 5)]
    grads = launchers.lstm_backward(
        None, None, None, None, None, x[:, :0], h[:0], c[:0], *weights[:2], None, *tail[:3],
        empty[0], empty[3], empty[4], True, False, False, [True] * 3,
    )  # fmt: skip
    assert grads[0].shape == (3, 0, 2) and not grads[3].any() and not grads[5].any()


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_nothing_leaves_its_row(route: str) -> None:
    """A NaN in one row of input and state, and a state behind a reset."""
    x, (h, c), *weights = next(reference.sample_inputs(sizes=SIZES)).args
    reset = torch.zeros(3, 3, dtype=torch.bool)
    reset[0, 2] = True
    tail = (None, reset, None, False, False, True)
    clean = launchers.lstm(x, h, c, *weights, *tail)
    x, h, c = x.clone(), h.clone(), c.clone()
    x[:, 1] = h[1] = c[1] = h[2] = c[2] = float("nan")
    for a, b in zip(launchers.lstm(x, h, c, *weights, *tail), clean, strict=True):
        rows = [0, 2]
        assert torch.equal(a[..., rows, :], b[..., rows, :])
        assert a[..., 1, :].isnan().any()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_cell(name: str, dtype: torch.dtype) -> None:
    check_cell(launchers.lstm_cell, launchers.lstm_cell_backward, name, dtype, hidden=5)


def test_arguments_are_checked_first() -> None:
    x, (h, c), *weights = next(reference.sample_inputs(sizes=SIZES)).args
    with pytest.raises(ValueError, match="expected hx of shape"):
        launchers.lstm(x, h[:2], c, *weights, None, None, None, False, False, False)
    with pytest.raises(ValueError, match="expected hx of shape"):
        launchers.lstm_cell(x[0], h[:2], c, *weights[:4], False)


@triton.jit
def _apply(x_ptr, sigmoid_ptr, tanh_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(sigmoid_ptr + at, common.sigmoid(x))
    tl.store(tanh_ptr + at, common.tanh(x))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 4e-7), (torch.float64, 1e-15)])
def test_gate_maths(dtype: torch.dtype, bound: float) -> None:
    size = 1 << 14
    magnitude = torch.logspace(-30, 2.5, size // 2, dtype=torch.float64)
    x = torch.cat((magnitude, -magnitude)).to(dtype)
    sigmoid, tanh = torch.empty_like(x), torch.empty_like(x)
    _apply[(1,)](x, sigmoid, tanh, N=size)
    for ours, right in ((sigmoid, x.double().sigmoid()), (tanh, x.double().tanh())):
        least = 1e8 * torch.finfo(dtype).tiny  # below, exp(-x) overflows before its inverse ends
        assert ((ours.double() - right).abs() / right.abs().clamp_min(least)).max() <= bound
    edge = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], dtype=dtype)
    sigmoid, tanh = torch.empty_like(edge), torch.empty_like(edge)
    _apply[(1,)](edge, sigmoid, tanh, N=4)
    assert torch.equal(sigmoid[1:], torch.tensor([1, 0, 0.5], dtype=dtype)) and sigmoid[0].isnan()
    assert torch.equal(tanh[1:], torch.tensor([1, -1, 0], dtype=dtype)) and tanh[0].isnan()


# label: storage, padded H, tensor cores, precision, warps: as on_chip_plan chooses them
ON_CHIP = {
    "fp32 H 64": ("fp32", 64, False, "ieee", 8),
    "fp32 H 64 TF32": ("fp32", 64, True, "tf32", 8),
    "bf16 H 64": ("bf16", 64, False, "ieee", 8),
    "bf16 H 64 dot": ("bf16", 64, True, "ieee", 4),
    "bf16 H 128 dot": ("bf16", 128, True, "ieee", 8),
}


# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(5, 3, 4, 6), (5, 600, 4, 64), (5, 3, 4, 200)]


def kernels() -> list[Kernel]:
    """With every optional argument given but offsets_ptr."""
    given = {"lengths_ptr": "*i64", "reset_ptr": "*u8"}
    aligned = ("H", "width")
    found = []
    for storage, acc in (("fp32", tl.float32), ("bf16", tl.float32), ("fp64", tl.float64)):
        step = {"offsets_ptr": None, "BLOCK_B": 4, "BLOCK_H": 128, "PROJECTED": False, "ACC": acc}
        for name in (
            "forward_step", "backward_step", "gather_grad_projected", "store_projected",
            "entering_state",
        ):  # fmt: skip
            kernel = Kernel("lstm_step", f"lstm_{name}", storage, 4, step, given, aligned, TARGETS)
            found.append(kernel)
    for label, (storage, block_h, dot, precision, warps) in ON_CHIP.items():
        # on_chip_plan asks AMD's GPUs for neither TF32 nor 128 units.
        everywhere = precision != "tf32" and block_h != 128
        targets = [t for t in TARGETS if everywhere or t != "gfx942"]
        tile = {"BLOCK_B": 16 if dot else 1, "BLOCK_H": block_h, "DOT": dot}
        constants = {"offsets_ptr": None, "PRECISION": precision, **tile}
        pointers = given if dot else {**given, "w_ptr": "*fp32"}
        for name in ("lstm_forward_on_chip", "lstm_backward_on_chip"):
            kernel = Kernel("lstm_on_chip", name, storage, warps, constants, pointers, aligned)
            found.append(kernel._replace(targets=targets, label=label))
    return found
