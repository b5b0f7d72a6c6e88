"""Wrong arguments of the NTM's functionals: one table, fed to every mode; never a crash."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from op_suite import MODES
from torch import Tensor

from seqmem_fast import ops

BATCH, SLOTS, WIDTH, TAPS = 3, 6, 5, 3
z = torch.zeros
VECTOR, ROW = (BATCH, WIDTH), (BATCH, SLOTS)
MEMORY = {"memory": (BATCH, SLOTS, WIDTH)}
OPS: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "ntm_content_addressing": (
        ops.ntm_content_addressing,
        {**MEMORY, "key": VECTOR, "beta": (BATCH,)},
    ),
    "ntm_addressing": (
        ops.ntm_addressing,
        {
            **MEMORY,
            "key": VECTOR,
            "beta": (BATCH,),
            "gate": (BATCH,),
            "shift": (BATCH, TAPS),
            "gamma": (BATCH,),
            "prev_weights": ROW,
        },
    ),
    "ntm_read": (ops.ntm_read, {**MEMORY, "weights": ROW}),
    "ntm_write": (ops.ntm_write, {**MEMORY, "weights": ROW, "erase": VECTOR, "add": VECTOR}),
}


class Bad(NamedTuple):
    name: str
    change: dict[str, Tensor]
    error: type[Exception]
    says: str  # a pattern that the message must contain, after "seqmem::op: expected"


def table(op: str) -> list[Bad]:
    """Every argument with a wrong size, rank, dtype, layout; and what is wrong of this op alone."""
    shapes = OPS[op][1]
    rows = []
    for name, shape in shapes.items():
        wrong = (*shape[:-1], shape[-1] + 2)
        rows += [
            Bad(f"{name} rank", {name: z(1, *shape, 1)}, ValueError, f"expected {name} "),
            Bad(f"{name} integer", {name: z(shape).long()}, TypeError, name),
            Bad(f"{name} bool", {name: z(shape).bool()}, TypeError, name),
            Bad(f"{name} complex", {name: z(shape).cfloat()}, TypeError, name),
            Bad(f"{name} float8", {name: z(shape).to(torch.float8_e4m3fn)}, TypeError, name),
            Bad(f"{name} sparse", {name: z(shape).to_sparse()}, TypeError, name),
            Bad(f"{name} dtype", {name: z(shape).double()}, TypeError, "dtype"),
            Bad(f"{name} batch", {name: z(BATCH + 1, *shape[1:])}, ValueError, "of shape"),
        ]
        if name != "shift" and (op, name) != ("ntm_read", "memory"):  # any width fits there
            rows.append(Bad(f"{name} size", {name: z(wrong)}, ValueError, "of shape"))
    everything = {name: z(shape).int() for name, shape in shapes.items()}
    rows += [
        Bad("all integer", everything, TypeError, "expected memory of dtype"),
        Bad("memory 1-D", {"memory": z(WIDTH)}, ValueError, "memory with 2 or 3 dimensions"),
        Bad("memory 4-D", {"memory": z(1, 3, 6, 5)}, ValueError, "memory with 2 or 3 dimensions"),
        Bad("no slots", {"memory": z(BATCH, 0, WIDTH)}, ValueError, "at least one slot"),
        Bad("no width", {"memory": z(BATCH, SLOTS, 0)}, ValueError, "at least one value"),
    ]
    first = next(name for name in ("key", "weights") if name in shapes)
    headed = (BATCH, 0, shapes[first][-1])
    rows.append(Bad("no heads", {first: z(headed)}, ValueError, "at least one head"))
    if op != "ntm_read":
        rows.append(Bad("one with heads", {first: z(BATCH, 2, headed[-1])}, ValueError, "of shape"))
    if op == "ntm_addressing":
        rows += [
            Bad("even shift", {"shift": z(BATCH, 4)}, ValueError, r"odd .* got 4"),
            Bad("no taps", {"shift": z(BATCH, 0)}, ValueError, r"odd .* got 0"),
            Bad(
                "shift wider than memory",
                {"shift": z(BATCH, 9)},
                ValueError,
                r"moves by at most 3 \(half the slots of memory\), got one that moves by 4",
            ),
            Bad("a scalar gate", {"gate": z(())}, ValueError, r"gate of shape \[3\], got \[\]"),
        ]
    return rows


ROWS = [pytest.param(op, bad, id=f"{op}-{bad.name}") for op in OPS for bad in table(op)]
every_row = pytest.mark.parametrize(("op", "bad"), ROWS)


def build(op: str, change: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**{name: z(shape) for name, shape in OPS[op][1].items()}, **change}


def expect(op: str, bad: Bad, call: Callable[[], Any]) -> str:
    with pytest.raises(bad.error) as caught:
        call()
    message = str(caught.value)
    assert re.match(rf"seqmem::{op}: expected .*got ", message, re.DOTALL), message
    assert re.search(bad.says, message), message
    return message.split("\n")[0]


@pytest.mark.parametrize("op", OPS)
def test_the_unchanged_arguments_are_right(op: str) -> None:
    """Else the table would prove nothing."""
    assert torch.isfinite(OPS[op][0](**build(op, {}))).all()


@pytest.mark.sanitize
@every_row
def test_refused_alike_in_every_grad_mode(op: str, bad: Bad) -> None:
    messages = set()
    for mode in MODES.values():
        with mode():
            messages.add(expect(op, bad, lambda: OPS[op][0](**build(op, bad.change))))
    leaves = {
        name: t.requires_grad_() if t.is_floating_point() and t.dtype.itemsize > 1 else t
        for name, t in build(op, bad.change).items()
    }
    messages.add(expect(op, bad, lambda: OPS[op][0](**leaves)))
    assert len(messages) == 1


@every_row
def test_refused_on_meta(op: str, bad: Bad) -> None:
    if "sparse" in bad.name:
        pytest.skip("sparse tensors have no such meta kernel")
    tensors = {name: t.to("meta") for name, t in build(op, bad.change).items()}
    expect(op, bad, lambda: OPS[op][0](**tensors))


COMPILED = ("memory rank", "beta size", "add dtype", "shift wider than memory", "weights integer")


@pytest.mark.parametrize(("op", "bad"), [p for p in ROWS if p.values[1].name in COMPILED])
def test_refused_compiled(op: str, bad: Bad) -> None:
    torch.compiler.reset()
    compiled = torch.compile(OPS[op][0], fullgraph=True, backend="eager")
    with pytest.raises(bad.error, match=f"seqmem::{op}: expected "):
        compiled(**build(op, bad.change))


@pytest.mark.parametrize("op", OPS)
def test_devices_do_not_mix(op: str) -> None:
    for name, shape in list(OPS[op][1].items())[1:]:
        with pytest.raises(TypeError, match=rf"seqmem::{op}: expected {name} on memory's device"):
            OPS[op][0](**build(op, {name: torch.zeros(shape, device="meta")}))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["quantized", "mkldnn", "nested"])
def test_exotic_inputs_are_refused(op: str, layout: str) -> None:
    memory = z(BATCH, SLOTS, WIDTH)
    exotic = {
        "quantized": lambda: torch.quantize_per_tensor(memory, 0.1, 0, torch.qint8),
        "mkldnn": memory.to_mkldnn,
        "nested": lambda: torch.nested.nested_tensor(list(memory)),
    }[layout]()
    with pytest.raises(TypeError, match=f"seqmem::{op}: expected "):
        OPS[op][0](**build(op, {"memory": exotic}))


def test_the_widest_shift_is_taken() -> None:
    """Its two ends move to the same slot."""
    weights = ops.ntm_addressing(**build("ntm_addressing", {"shift": z(BATCH, 7) + 1}))
    assert torch.isfinite(weights).all()
