"""Wrong arguments of the LSTM's ops and modules: the inherited suite, and their tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hostile_suite import Bad, HostileSuite, Target, check_refused_by_module
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import seqmem_fast as sf

TIME, BATCH, WIDTH, HIDDEN = 4, 3, 5, 6
z = torch.zeros


def arguments() -> dict[str, Any]:
    return {
        "input": z(TIME, BATCH, WIDTH),
        "hx": z(BATCH, HIDDEN),
        "cx": z(BATCH, HIDDEN),
        "weight_ih": z(4 * HIDDEN, WIDTH),
        "weight_hh": z(4 * HIDDEN, HIDDEN),
        "bias_ih": z(4 * HIDDEN),
        "bias_hh": z(4 * HIDDEN),
    }


projected = {"weight_hr": z(2, HIDDEN), "weight_hh": z(4 * HIDDEN, 2), "hx": z(BATCH, 2)}
packed = {"input": z(7, WIDTH)}

COMMON = [
    Bad("weight_ih 1-D", {"weight_ih": z(4 * HIDDEN)}, ValueError, "weight_ih"),
    # The commonest mistakes are in the input, and the message speaks of it.
    Bad(
        "weight_ih width", {"weight_ih": z(4 * HIDDEN, 4)}, ValueError, r"input of shape \[..., 4\]"
    ),
    Bad(
        "weight_ih double",
        {"weight_ih": z(24, 5).double()},
        TypeError,
        "input of weight_ih's dtype",
    ),
    Bad("weight_ih rows", {"weight_ih": z(20, WIDTH)}, ValueError, "weight"),
    Bad("weight_hh width", {"weight_hh": z(4 * HIDDEN, 5)}, ValueError, "weight_hh"),
    Bad("weight_hh no multiple of 4", {"weight_hh": z(23, 6)}, ValueError, "weight"),
    Bad("weight_hh empty", {"weight_hh": z(0, 0)}, ValueError, "weight"),
    Bad("hx rows", {"hx": z(2, HIDDEN)}, ValueError, r"hx of shape \[3, 6\], got \[2, 6\]"),
    Bad("hx width", {"hx": z(BATCH, 5)}, ValueError, r"hx of shape \[3, 6\], got \[3, 5\]"),
    Bad("cx rows", {"cx": z(4, HIDDEN)}, ValueError, r"cx of shape \[3, 6\], got \[4, 6\]"),
    Bad("cx 1-D", {"cx": z(HIDDEN)}, ValueError, r"cx of shape \[3, 6\], got \[6\]"),
    Bad("bias_ih size", {"bias_ih": z(6)}, ValueError, r"bias_ih of shape \[24\], got \[6\]"),
    Bad(
        "bias_hh 2-D", {"bias_hh": z(24, 1)}, ValueError, r"bias_hh of shape \[24\], got \[24, 1\]"
    ),
    Bad("weight dtype", {"weight_hh": z(24, 6).double()}, TypeError, "weight_hh"),
    Bad("hx dtype", {"hx": z(3, 6).bfloat16()}, TypeError, "hx"),
    Bad("bias dtype", {"bias_hh": z(24).half()}, TypeError, "bias_hh"),
    Bad("cx integer", {"cx": z(3, 6).long()}, TypeError, "cx"),
    Bad("weight sparse", {"weight_hh": z(24, 6).to_sparse()}, TypeError, "weight_hh"),
    Bad("weight complex", {"weight_hh": z(24, 6).cfloat()}, TypeError, "weight_hh"),
]

SEQUENCE = [
    *COMMON,
    Bad("input 1-D", {"input": z(WIDTH)}, ValueError, "input"),
    Bad("input 2-D", {"input": z(TIME, WIDTH)}, ValueError, "input"),
    Bad("input 4-D", {"input": z(1, TIME, BATCH, WIDTH)}, ValueError, "input"),
    Bad("no steps", {"input": z(0, BATCH, WIDTH)}, ValueError, "input"),
    Bad("input width 0", {"input": z(TIME, BATCH, 0)}, ValueError, "weight_ih|input"),
    Bad("input integer", {"input": z(TIME, BATCH, WIDTH).int()}, TypeError, "input"),
    Bad("input bool", {"input": z(TIME, BATCH, WIDTH).bool()}, TypeError, "input"),
    Bad("input complex", {"input": z(TIME, BATCH, WIDTH).cfloat()}, TypeError, "input"),
    Bad("input float8", {"input": z(4, 3, 5).to(torch.float8_e4m3fn)}, TypeError, "input"),
    Bad("input sparse", {"input": z(TIME, BATCH, WIDTH).to_sparse()}, TypeError, "input"),
    Bad("input csr", {"input": z(BATCH, WIDTH).to_sparse_csr()}, TypeError, "input"),
    Bad("all integer", {k: v.long() for k, v in arguments().items()}, TypeError, "input"),
    Bad("all complex", {k: v.cfloat() for k, v in arguments().items()}, TypeError, "input"),
    Bad("batch_first mixes T and B", {"batch_first": True}, ValueError, "hx"),
    Bad("weight_hr width", {**projected, "weight_hr": z(2, 5)}, ValueError, "weight_hr"),
    Bad("weight_hr 1-D", {**projected, "weight_hr": z(6)}, ValueError, "weight_hr"),
    Bad("weight_hr against weight_hh", {"weight_hr": z(2, HIDDEN)}, ValueError, "weight_hh"),
    Bad("weight_hr dtype", {**projected, "weight_hr": z(2, 6).double()}, TypeError, "weight_hr"),
    Bad("hx unprojected", {**projected, "hx": z(3, 6)}, ValueError, r"hx of shape \[3, 2\]"),
    Bad("lengths size", {"lengths": torch.ones(2).long()}, ValueError, "lengths"),
    Bad("lengths 2-D", {"lengths": torch.ones(3, 1).long()}, ValueError, "lengths"),
    Bad("lengths float", {"lengths": torch.ones(3)}, TypeError, "lengths"),
    Bad("lengths bool", {"lengths": torch.ones(3).bool()}, TypeError, "lengths"),
    Bad("lengths negative", {"lengths": torch.tensor([1, -1, 2])}, ValueError, "lengths", True),
    Bad("lengths too long", {"lengths": torch.tensor([1, 5, 2])}, ValueError, "lengths", True),
    Bad("lengths huge", {"lengths": torch.tensor([1, 2**62, 2])}, ValueError, "lengths", True),
    Bad("reset dtype", {"reset": z(TIME, BATCH)}, TypeError, "reset"),
    Bad("reset shape", {"reset": z(BATCH, TIME).bool()}, ValueError, "reset"),
    Bad("reset 1-D", {"reset": z(TIME).bool()}, ValueError, "reset"),
    Bad(
        "batch_sizes sum",
        {**packed, "batch_sizes": torch.tensor([3, 2, 1])},
        ValueError,
        "batch_sizes",
        True,
    ),
    Bad(
        "batch_sizes grow",
        {**packed, "batch_sizes": torch.tensor([3, 1, 3])},
        ValueError,
        "batch_sizes",
        True,
    ),
    Bad(
        "batch_sizes zero",
        {**packed, "batch_sizes": torch.tensor([4, 3, 0])},
        ValueError,
        "batch_sizes",
        True,
    ),
    Bad(
        "batch_sizes negative",
        {**packed, "batch_sizes": torch.tensor([4, 4, -1])},
        ValueError,
        "batch_sizes",
        True,
    ),
    Bad(
        "batch_sizes overflow",
        {**packed, "batch_sizes": torch.tensor([2**63 - 1, 8])},
        ValueError,
        "batch_sizes",
        True,
    ),
    Bad(
        "batch_sizes empty",
        {**packed, "batch_sizes": torch.ones(0).long()},
        ValueError,
        "batch_sizes|at least one time step",
    ),
    Bad(
        "batch_sizes 2-D",
        {**packed, "batch_sizes": torch.ones(7, 1).long()},
        ValueError,
        "batch_sizes",
    ),
    Bad(
        "batch_sizes float",
        {**packed, "batch_sizes": torch.tensor([3.0, 3, 1])},
        TypeError,
        "batch_sizes",
    ),
    Bad("batch_sizes with 3-D input", {"batch_sizes": torch.tensor([3, 1])}, ValueError, "input"),
    Bad(
        "batch_sizes and hx",
        {**packed, "batch_sizes": torch.tensor([4, 3])},
        ValueError,
        "hx",
        True,
    ),
    Bad(
        "batch_sizes and lengths",
        {**packed, "batch_sizes": torch.tensor([3, 3, 1]), "lengths": torch.ones(3).long()},
        ValueError,
        "lengths",
    ),
    Bad(
        "batch_sizes and reset",
        {**packed, "batch_sizes": torch.tensor([3, 3, 1]), "reset": z(3, 3).bool()},
        ValueError,
        "reset",
    ),
    Bad(
        "batch_sizes and batch_first",
        {**packed, "batch_sizes": torch.tensor([3, 3, 1]), "batch_first": True},
        ValueError,
        "batch_first",
    ),
]

CELL = [
    *COMMON,
    Bad("input 1-D", {"input": z(WIDTH)}, ValueError, "input"),
    Bad("input 3-D", {"input": z(1, BATCH, WIDTH)}, ValueError, "input"),
    Bad("input rows", {"input": z(2, WIDTH)}, ValueError, "hx"),
    Bad("input integer", {"input": z(BATCH, WIDTH).int()}, TypeError, "input"),
    Bad("input sparse", {"input": z(BATCH, WIDTH).to_sparse()}, TypeError, "input"),
    Bad("input complex", {"input": z(BATCH, WIDTH).cfloat()}, TypeError, "input"),
]


def cell_arguments() -> dict[str, Any]:
    return {**arguments(), "input": z(BATCH, WIDTH)}


def call(input: Tensor, hx: Tensor, cx: Tensor, **rest: Any) -> Any:
    return sf.ops.lstm(input, (hx, cx), **rest)


def call_cell(input: Tensor, hx: Tensor, cx: Tensor, **rest: Any) -> Any:
    return sf.ops.lstm_cell(input, (hx, cx), **rest)


class TestHostile(HostileSuite):
    targets = (
        Target("lstm", call, arguments, SEQUENCE, on_cpu=("batch_sizes",)),
        Target("lstm_cell", call_cell, cell_arguments, CELL),
    )


@pytest.mark.sanitize
@pytest.mark.parametrize("missing", ["hx", "cx"])
@pytest.mark.parametrize("target", TestHostile.targets, ids=["lstm", "lstm_cell"])
def test_half_a_state_is_refused(target: Target, missing: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"seqmem::{target.op}: expected"):
        target.call(**{**target.arguments(), missing: None})


def lstm() -> sf.LSTM:
    return sf.LSTM(WIDTH, HIDDEN, 2, bidirectional=True)


x = z(TIME, BATCH, WIDTH)
MODULE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "hx is a tensor": (lambda: lstm()(x, z(4, 3, 6)), TypeError, "hx to be a pair"),
    "hx of three": (lambda: lstm()(x, (z(4, 3, 6),) * 3), TypeError, "hx to be a pair"),
    "hx of None": (lambda: lstm()(x, (z(4, 3, 6), None)), TypeError, "hx to be a pair"),
    "hx layers": (
        lambda: lstm()(x, (z(2, 3, 6), z(2, 3, 6))),
        ValueError,
        r"hx of shape \[4, 3, 6\], got \[2, 3, 6\]",
    ),
    "cx batch": (
        lambda: lstm()(x, (z(4, 3, 6), z(4, 2, 6))),
        ValueError,
        r"cx of shape \[4, 3, 6\], got \[4, 2, 6\]",
    ),
    "hx 2-D beside a batch": (lambda: lstm()(x, (z(4, 6), z(4, 6))), ValueError, "hx of 3 dim"),
    "hx 3-D unbatched": (
        lambda: lstm()(z(TIME, WIDTH), (z(4, 1, 6), z(4, 1, 6))),
        ValueError,
        "hx of 2 dim",
    ),
    "cx width unbatched": (
        lambda: lstm()(z(TIME, WIDTH), (z(4, 6), z(4, 5))),
        ValueError,
        r"cx of shape \[4, 1, 6\], got \[4, 1, 5\]",
    ),
    "one layer, hx of two": (
        lambda: sf.LSTM(5, 6)(x, (z(2, 3, 6), z(2, 3, 6))),
        ValueError,
        r"hx of shape \[1, 3, 6\], got \[2, 3, 6\]",
    ),
    "input is a list": (lambda: lstm()(x.tolist()), TypeError, "input to be a tensor or a Packed"),
    "lengths is a string": (
        lambda: lstm()(x, lengths="123"),
        TypeError,
        "lengths to be a tensor, got str",
    ),
    "reset is a list": (
        lambda: lstm()(x, reset=[[False]]),
        TypeError,
        "reset to be a tensor, got list",
    ),
    "input 1-D": (lambda: lstm()(z(WIDTH)), ValueError, "input"),
    "input 4-D": (lambda: lstm()(z(1, TIME, BATCH, WIDTH)), ValueError, "input"),
    "input 4-D with hx": (
        lambda: lstm()(z(1, TIME, BATCH, WIDTH), (z(4, 3, 6), z(4, 3, 6))),
        ValueError,
        "input",
    ),
    "input width": (lambda: lstm()(z(TIME, BATCH, 4)), ValueError, "weight_ih|input"),
    "input dtype": (lambda: lstm()(x.double()), TypeError, "weight_ih|input"),
    "no steps": (lambda: lstm()(z(0, BATCH, WIDTH)), ValueError, "input"),
    "no steps unbatched": (lambda: lstm()(z(0, WIDTH)), ValueError, "input"),
    "lengths for one row of two": (
        lambda: lstm()(z(TIME, WIDTH), lengths=torch.tensor([2, 2])),
        ValueError,
        "lengths",
    ),
    "packed with lengths": (
        lambda: lstm()(pack_sequence([z(3, WIDTH)]), lengths=torch.tensor([3])),
        ValueError,
        "lengths",
    ),
    "packed with reset": (
        lambda: lstm()(pack_sequence([z(3, WIDTH)]), reset=z(3, 1).bool()),
        ValueError,
        "reset",
    ),
    "packed, hx batch": (
        lambda: lstm()(pack_sequence([z(3, WIDTH)]), (z(4, 2, 6), z(4, 2, 6))),
        ValueError,
        r"hx of shape \[4, 1, 6\]",
    ),
    "packed by hand, wrong sum": (
        lambda: lstm()(PackedSequence(z(7, WIDTH), torch.tensor([3, 3]))),
        ValueError,
        "batch_sizes",
    ),
    "packed by hand, huge": (
        lambda: lstm()(PackedSequence(z(7, WIDTH), torch.tensor([2**62, 3]))),
        ValueError,
        "batch_sizes",
    ),
    "cell, hx is a tensor": (
        lambda: sf.LSTMCell(5, 6)(z(3, 5), z(3, 6)),
        TypeError,
        "hx to be a pair",
    ),
    "cell, hx 2-D unbatched": (
        lambda: sf.LSTMCell(5, 6)(z(5), (z(1, 6), z(1, 6))),
        ValueError,
        "hx of 1 dim",
    ),
    "cell, input 3-D": (lambda: sf.LSTMCell(5, 6)(z(1, 3, 5)), ValueError, "input"),
    "cell, input 0-D": (lambda: sf.LSTMCell(5, 6)(z(())), ValueError, "input"),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("name", MODULE)
def test_module_refuses(name: str) -> None:
    check_refused_by_module(*MODULE[name])
