"""Wrong arguments: one table, fed to every mode; always the same clear exception, never a crash."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from op_suite import MODES
from torch import Tensor

from seqmem_fast import ops
from seqmem_fast.ops.hard_attention import sample_at

z = torch.zeros


class Bad(NamedTuple):
    name: str
    change: dict[str, Any]
    error: type[Exception]
    says: str  # a pattern that the message must contain, after "seqmem::op: expected"
    needs_values: bool = False  # meta tensors have none


LOGITS = [
    Bad("logits 0-D", {"logits": z(())}, ValueError, "logits with at least one action"),
    Bad("no actions", {"logits": z(4, 0)}, ValueError, r"at least one action .* got \[4, 0\]"),
    Bad("logits integer", {"logits": z(4, 5).long()}, TypeError, "logits of dtype"),
    Bad("logits complex", {"logits": z(4, 5).cfloat()}, TypeError, "logits of dtype"),
    Bad("logits float8", {"logits": z(4, 5).to(torch.float8_e5m2)}, TypeError, "logits of dtype"),
    Bad("logits sparse", {"logits": z(4, 5).to_sparse()}, TypeError, "logits to be a dense"),
]
SAMPLE = [
    *LOGITS,
    Bad("rows", {"logits": z(3, 5)}, ValueError, r"uniform of shape \[3\], got \[4\]"),
    Bad("uniform 2-D", {"uniform": z(4, 1)}, ValueError, r"uniform of shape \[4\], got \[4, 1\]"),
    Bad("uniform dtype", {"uniform": z(4).double()}, TypeError, "uniform of dtype"),
    Bad("uniform for bfloat16", {"uniform": z(4).bfloat16()}, TypeError, "uniform of dtype"),
    Bad("uniform sparse", {"uniform": z(4).to_sparse()}, TypeError, "uniform to be a dense"),
]
LOSS = [
    *LOGITS,
    Bad("rows", {"logits": z(3, 5)}, ValueError, r"action of shape \[3\], got \[4\]"),
    Bad("action 2-D", {"action": z(4, 1).long()}, ValueError, r"\[4\], got \[4, 1\]"),
    Bad("action float", {"action": z(4)}, TypeError, "action of dtype int64"),
    Bad("action int32", {"action": z(4).int()}, TypeError, "action of dtype int64"),
    Bad("action sparse", {"action": z(4).long().to_sparse()}, TypeError, "action to be a dense"),
    Bad("action low", {"action": torch.tensor([0, -1, 0, 0])}, ValueError, "0..4, got -1", True),
    Bad("action high", {"action": torch.tensor([0, 5, 0, 0])}, ValueError, "0..4, got 5", True),
    Bad("action huge", {"action": torch.tensor([0, 2**62, 0, 0])}, ValueError, "in 0..4", True),
    Bad("returns size", {"returns": z(3)}, ValueError, r"returns of shape \[4\], got \[3\]"),
    Bad("returns dtype", {"returns": z(4).double()}, TypeError, "returns of logits's dtype"),
    Bad("returns integer", {"returns": z(4).long()}, TypeError, "returns of logits's dtype"),
    Bad("baseline size", {"baseline": z(5)}, ValueError, r"baseline of shape \[4\], got \[5\]"),
    Bad("baseline dtype", {"baseline": z(4).half()}, TypeError, "baseline of logits's dtype"),
    Bad("baseline sparse", {"baseline": z(4).to_sparse()}, TypeError, "baseline to be a dense"),
    Bad("reduction", {"reduction": "max"}, ValueError, "reduction 'sum', 'mean' or 'none'"),
    Bad(
        "bonus of no action",
        {"action": None, "logits": z(4), "entropy_weight": 0.1},
        ValueError,
        "action",
    ),
    Bad("log_prob shape", {"action": None}, ValueError, r"returns of shape \[4, 5\], got \[4\]"),
    Bad("log_prob integer", {"action": None, "logits": z(4).long()}, TypeError, "log-prob"),
    Bad(
        "log_prob dtype",
        {"action": None, "logits": z(4).double()},
        TypeError,
        "returns of dtype torch.float64",
    ),
]
OPS: dict[str, tuple[Callable[..., Any], list[Bad], dict[str, Any]]] = {
    "categorical_sample": (sample_at, SAMPLE, {"logits": z(4, 5), "uniform": z(4)}),
    "reinforce_loss": (
        ops.reinforce_loss,
        LOSS,
        {
            "logits": z(4, 5),
            "action": torch.tensor([0, 1, 2, 4]),
            "returns": torch.ones(4),
            "baseline": z(4),
            "entropy_weight": 0.0,
            "reduction": "sum",
        },
    ),
}
ROWS = [
    pytest.param(op, bad, id=f"{op}-{bad.name}") for op, (_, rows, _) in OPS.items() for bad in rows
]
every_row = pytest.mark.parametrize(("op", "bad"), ROWS)


def invoke(op: str, arguments: dict[str, Any]) -> Any:
    return OPS[op][0](**arguments)


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
    invoke(op, OPS[op][2])


@pytest.mark.sanitize
@every_row
def test_refused_alike_in_every_grad_mode(op: str, bad: Bad) -> None:
    messages = set()
    given = {**OPS[op][2], **bad.change}
    for mode in MODES.values():
        with mode():
            messages.add(expect(op, bad, lambda: invoke(op, given)))
    tracked = {
        k: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in given.items()
    }
    messages.add(expect(op, bad, lambda: invoke(op, tracked)))
    assert len(messages) == 1


@pytest.mark.sanitize
@every_row
def test_refused_on_meta(op: str, bad: Bad) -> None:
    if bad.needs_values:
        pytest.skip("meta tensors have no values")
    given = {**OPS[op][2], **bad.change}
    moved = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()}
    expect(op, bad, lambda: invoke(op, moved))


@every_row
def test_refused_compiled(op: str, bad: Bad) -> None:
    torch.compiler.reset()
    tensors = [v for v in bad.change.values() if isinstance(v, Tensor)]
    # Dynamo takes no sparse tensors, and makes an error of its own of what Python raises.
    op_refuses = all(t.layout == torch.strided for t in tensors)
    op_refuses &= "action" not in bad.change or bad.change["action"] is not None
    op_refuses &= "reduction" not in bad.change
    compiled = torch.compile(invoke, backend="eager", fullgraph=op_refuses)
    expect(op, bad, lambda: compiled(op, {**OPS[op][2], **bad.change}))


@pytest.mark.sanitize
@pytest.mark.parametrize("op", OPS)
def test_devices_do_not_mix(op: str) -> None:
    for name, value in OPS[op][2].items():
        if isinstance(value, Tensor):
            with pytest.raises(TypeError, match=rf"seqmem::{op}: expected .*(meta|cpu)"):
                invoke(op, {**OPS[op][2], name: value.to("meta")})


@pytest.mark.sanitize
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["quantized", "mkldnn", "nested"])
def test_exotic_layouts_are_refused(op: str, layout: str) -> None:
    logits = z(4, 5)
    if layout == "quantized":
        logits = torch.quantize_per_tensor(logits, 0.1, 0, torch.qint8)
    elif layout == "mkldnn":
        logits = logits.to_mkldnn()
    else:
        logits = torch.nested.nested_tensor([z(2, 5), z(3, 5)])
    with pytest.raises(TypeError, match=f"seqmem::{op}: expected"):
        invoke(op, {**OPS[op][2], "logits": logits})


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="seqmem::categorical_sample: expected logits to be"):
        ops.categorical_sample([0.1, 0.2])
    with pytest.raises((TypeError, RuntimeError)):
        ops.reinforce_loss(z(4, 5), [0, 1, 2, 3], torch.ones(4))
