"""Wrong arguments: one table, fed to every mode; always the same clear exception, never a crash."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from op_suite import MODES
from torch import Tensor

import seqmem_fast as sf

B, TQ, TK, A, DV = 2, 3, 4, 5, 6
z = torch.zeros


def arguments(**change: Any) -> dict[str, Any]:
    good = {
        "query": z(B, TQ, A),
        "key": z(B, TK, A),
        "value": z(B, TK, DV),
        "score_weight": z(A),
        "mask": None,
    }
    return {**good, **change}


class Bad(NamedTuple):
    name: str
    change: dict[str, Any]
    error: type[Exception]
    says: str  # a pattern that the message must contain, after "seqmem::op: expected"


all_of = {name: t for name, t in arguments().items() if t is not None}
TABLE = [
    Bad("query 1-D", {"query": z(A)}, ValueError, "query with at least 2"),
    Bad("query 0-D", {"query": z(())}, ValueError, "query with at least 2"),
    Bad("key 1-D", {"key": z(A)}, ValueError, "key with at least 2"),
    Bad("key width", {"key": z(B, TK, 4)}, ValueError, r"key of shape .*5\], got \[2, 4, 4\]"),
    Bad("value 1-D", {"value": z(DV)}, ValueError, "value with at least 2"),
    Bad("value rows", {"value": z(B, 3, DV)}, ValueError, r"value of shape .*got \[2, 3, 6\]"),
    Bad("key batch", {"key": z(3, TK, A)}, ValueError, "key with leading dimensions"),
    Bad("value batch", {"value": z(3, TK, DV)}, ValueError, "value with leading dimensions"),
    Bad("empty batch", {"key": z(0, TK, A)}, ValueError, "key with leading dimensions"),
    Bad("score_weight size", {"score_weight": z(4)}, ValueError, r"score_weight of shape \[5\]"),
    Bad("score_weight 2-D", {"score_weight": z(1, A)}, ValueError, r"score_weight of shape \[5\]"),
    Bad("mask columns", {"mask": z(TQ, 3).bool()}, ValueError, r"broadcasts .*got \[3, 3"),
    Bad("mask rows", {"mask": z(2, TK).bool()}, ValueError, r"mask that broadcasts .*got \[2, 4"),
    Bad("mask 1-D", {"mask": z(TQ)}, ValueError, r"mask that broadcasts .*got \[3\]"),
    Bad("mask batch", {"mask": z(3, TQ, TK).bool()}, ValueError, "mask with leading dimensions"),
    Bad("mask dtype", {"mask": z(TQ, TK).double()}, TypeError, "mask of dtype bool"),
    Bad("mask complex", {"mask": z(TQ, TK).cfloat()}, TypeError, "mask of dtype bool"),
    Bad("mask sparse", {"mask": z(TQ, TK).to_sparse()}, TypeError, "mask to be a dense"),
    Bad("key dtype", {"key": z(B, TK, A).double()}, TypeError, "key of query's dtype"),
    Bad("value dtype", {"value": z(B, TK, DV).half()}, TypeError, "value of query's dtype"),
    Bad("score_weight dtype", {"score_weight": z(A).bfloat16()}, TypeError, "score_weight"),
    Bad("score_weight integer", {"score_weight": z(A).long()}, TypeError, "score_weight"),
    Bad("query integer", {"query": z(B, TQ, A).int()}, TypeError, "query of dtype"),
    Bad("query float8", {"query": z(TQ, A).to(torch.float8_e4m3fn)}, TypeError, "query of dtype"),
    Bad("query sparse", {"query": z(B, TQ, A).to_sparse()}, TypeError, "query to be a dense"),
    Bad("query csr", {"query": z(TQ, A).to_sparse_csr()}, TypeError, "query to be a dense"),
    Bad("value sparse", {"value": z(B, TK, DV).to_sparse()}, TypeError, "value to be a dense"),
    Bad("all complex", {k: t.cfloat() for k, t in all_of.items()}, TypeError, "query of dtype"),
    Bad("all integer", {k: t.long() for k, t in all_of.items()}, TypeError, "query of dtype"),
]
every_row = pytest.mark.parametrize("bad", TABLE, ids=[bad.name for bad in TABLE])


def expect(bad: Bad, call: Callable[[], Any]) -> str:
    with pytest.raises(bad.error) as caught:
        call()
    message = str(caught.value)
    assert re.match(r"seqmem::additive_attention: expected .*got ", message, re.DOTALL), message
    assert re.search(bad.says, message), message
    return message.split("\n")[0]


def invoke(given: dict[str, Any]) -> Any:
    return sf.ops.additive_attention(**given)


def test_the_unchanged_arguments_are_right() -> None:
    """Else the table would prove nothing."""
    assert not invoke(arguments())[0].any()


@pytest.mark.sanitize
@every_row
def test_refused_alike_in_every_grad_mode(bad: Bad) -> None:
    messages = set()
    for mode in MODES.values():
        with mode():
            messages.add(expect(bad, lambda: invoke(arguments(**bad.change))))
    tracked = {
        name: t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in arguments(**bad.change).items()
    }
    messages.add(expect(bad, lambda: invoke(tracked)))
    assert len(messages) == 1


@pytest.mark.sanitize
@every_row
def test_refused_on_meta(bad: Bad) -> None:
    given = arguments(**bad.change)
    moved = {k: t.to("meta") if isinstance(t, Tensor) else t for k, t in given.items()}
    expect(bad, lambda: invoke(moved))


@every_row
def test_refused_compiled(bad: Bad) -> None:
    torch.compiler.reset()
    tensors = [t for t in bad.change.values() if isinstance(t, Tensor)]
    traceable = all(t.layout == torch.strided for t in tensors)  # Dynamo takes no sparse tensors
    compiled = torch.compile(invoke, backend="eager", fullgraph=traceable)
    expect(bad, lambda: compiled(arguments(**bad.change)))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", all_of)
def test_devices_do_not_mix(name: str) -> None:
    given = arguments(mask=z(TQ, TK).bool())
    for moved in (name, "mask"):
        mixed = {**given, moved: given[moved].to("meta")}
        with pytest.raises(TypeError, match=r"seqmem::additive_attention: expected .*(meta|cpu)"):
            invoke(mixed)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", ["quantized", "mkldnn", "nested"])
def test_exotic_inputs_are_refused(layout: str) -> None:
    x = z(B, TQ, A)
    if layout == "quantized":
        x = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    elif layout == "mkldnn":
        x = x.to_mkldnn()
    else:
        x = torch.nested.nested_tensor([z(2, A), z(3, A)])
    with pytest.raises(TypeError, match="seqmem::additive_attention: expected"):
        invoke(arguments(query=x))


def module() -> sf.AdditiveAttention:
    return sf.AdditiveAttention(7, 8, A)


MODULE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no width": (lambda: sf.AdditiveAttention(7, 0, A), ValueError, "key_dim > 0, got 0"),
    "query is a list": (lambda: module()([], z(B, TK, 8), z(B, TK, DV)), TypeError, "query to be"),
    "key is None": (lambda: module()(z(B, TQ, 7), None, z(B, TK, DV)), TypeError, "key to be"),
    "query width": (
        lambda: module()(z(B, TQ, 6), z(B, TK, 8), z(B, TK, DV)),
        ValueError,
        r"query of shape \[..., T, 7\], got \[2, 3, 6\]",
    ),
    "query 1-D": (lambda: module()(z(7), z(B, TK, 8), z(B, TK, DV)), ValueError, "query of shape"),
    "key width": (lambda: module()(z(TQ, 7), z(TK, 7), z(TK, DV)), ValueError, "key of shape"),
    "key dtype": (
        lambda: module()(z(TQ, 7), z(TK, 8).double(), z(TK, DV)),
        TypeError,
        "key of dtype torch.float32, got torch.float64",
    ),
    "projected key width": (
        lambda: module()(z(TQ, 7), z(TK, 8), z(TK, DV), keys_projected=True),
        ValueError,
        "key of shape",
    ),
}


@pytest.mark.parametrize("name", MODULE)
def test_module_refuses(name: str) -> None:
    call, kind, says = MODULE[name]
    for mode in MODES.values():
        with mode(), pytest.raises(kind, match=says):
            call()
