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

B, N, M, H = 4, 3, 5, 6
z = torch.zeros


def arguments() -> dict[str, Any]:
    return {
        "query": z(B, H),
        "memory": z(N, M),
        "gate_weight": z(M, M + H),
        "gate_bias": z(M),
        "write_weight": z(M, M + H),
        "write_bias": z(M),
        "score_query": z(B, M),
        "mask": torch.ones(B, N, dtype=torch.bool),
        "num_hops": 2,
    }


class Bad(NamedTuple):
    name: str
    change: dict[str, Any]
    error: type[Exception]
    says: str  # a pattern that the message must contain, after "seqmem::op: expected"


def of_type(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {
        k: change(v) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in arguments().items()
    }


TABLE = [
    Bad("query 1-D", {"query": z(H)}, ValueError, "query with 2 dimensions, got 1"),
    Bad("query 3-D", {"query": z(1, B, H)}, ValueError, "query with 2 dimensions, got 3"),
    Bad("query width", {"query": z(B, 7)}, ValueError, r"gate_weight of shape \[5, 12\]"),
    Bad("query rows", {"query": z(2, H)}, ValueError, r"score_query of shape \[2, 5\]"),
    Bad("query integer", {"query": z(B, H).int()}, TypeError, "query of dtype"),
    Bad("query complex", {"query": z(B, H).cfloat()}, TypeError, "query of dtype"),
    Bad("query float8", {"query": z(B, H).to(torch.float8_e4m3fn)}, TypeError, "query of dtype"),
    Bad("query sparse", {"query": z(B, H).to_sparse()}, TypeError, "query to be a dense"),
    Bad("query csr", {"query": z(B, H).to_sparse_csr()}, TypeError, "query to be a dense"),
    Bad("memory 1-D", {"memory": z(M)}, ValueError, r"memory of shape \[N, m\] or \[B, N, m\]"),
    Bad("memory 4-D", {"memory": z(1, B, N, M)}, ValueError, "memory of shape"),
    Bad("memory rows", {"memory": z(2, N, M)}, ValueError, r"\[4, 3, 5\], got \[2, 3, 5\]"),
    Bad("memory width", {"memory": z(N, 4)}, ValueError, r"gate_weight of shape \[4, 10\]"),
    Bad("no slots", {"memory": z(0, M)}, ValueError, "at least one slot"),
    Bad("empty slots", {"memory": z(N, 0)}, ValueError, "at least one slot"),
    Bad("memory dtype", {"memory": z(N, M).double()}, TypeError, "memory of query's dtype"),
    Bad("memory sparse", {"memory": z(N, M).to_sparse()}, TypeError, "memory to be a dense"),
    Bad("gate_weight rows", {"gate_weight": z(4, 11)}, ValueError, r"\[5, 11\], got \[4, 11\]"),
    Bad("gate_weight 1-D", {"gate_weight": z(55)}, ValueError, r"\[5, 11\], got \[55\]"),
    Bad("gate_weight dtype", {"gate_weight": z(M, 11).half()}, TypeError, "gate_weight of query"),
    Bad("gate_bias size", {"gate_bias": z(6)}, ValueError, r"gate_bias of shape \[5\], got \[6\]"),
    Bad("gate_bias integer", {"gate_bias": z(M).long()}, TypeError, "gate_bias of query's dtype"),
    Bad("write_weight width", {"write_weight": z(M, M)}, ValueError, r"\[5, 11\], got \[5, 5\]"),
    Bad("write_weight sparse", {"write_weight": z(M, 11).to_sparse()}, TypeError, "write_weight"),
    Bad("write_bias 2-D", {"write_bias": z(M, 1)}, ValueError, r"\[5\], got \[5, 1\]"),
    Bad("score_query width", {"score_query": z(B, H)}, ValueError, r"\[4, 5\], got \[4, 6\]"),
    Bad("score_query absent", {"score_query": None}, ValueError, "score_query where query is 6"),
    Bad("score_query dtype", {"score_query": z(B, M).bfloat16()}, TypeError, "score_query of"),
    Bad("mask dtype", {"mask": z(B, N)}, TypeError, "mask of dtype bool"),
    Bad("mask integer", {"mask": z(B, N).long()}, TypeError, "mask of dtype bool"),
    Bad("mask shape", {"mask": z(B, M).bool()}, ValueError, r"\[4, 3\], got \[4, 5\]"),
    Bad("mask 1-D", {"mask": z(N).bool()}, ValueError, r"mask of shape \[4, 3\], got \[3\]"),
    Bad("hops negative", {"num_hops": -1}, ValueError, "num_hops >= 0, got -1"),
    Bad("all integer", of_type(Tensor.long), TypeError, "query of dtype"),
    Bad("all complex", of_type(Tensor.cfloat), TypeError, "query of dtype"),
]
every_row = pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)


def invoke(arguments: dict[str, Any]) -> Any:
    return ops.dynamic_memory(**arguments)


def expect(bad: Bad, call: Callable[[], Any]) -> str:
    with pytest.raises(bad.error) as caught:
        call()
    message = str(caught.value)
    assert re.match(r"seqmem::dynamic_memory: expected .*got ", message, re.DOTALL), message
    assert re.search(bad.says, message), message
    return message.split("\n")[0]


def test_the_unchanged_arguments_are_right() -> None:
    """Else the table would prove nothing."""
    final, attention = invoke(arguments())
    assert not final.any() and torch.isfinite(attention).all()


@pytest.mark.sanitize
@every_row
def test_refused_alike_in_every_grad_mode(bad: Bad) -> None:
    messages = set()
    given = {**arguments(), **bad.change}
    for mode in MODES.values():
        with mode():
            messages.add(expect(bad, lambda: invoke(given)))
    tracked = {
        k: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in given.items()
    }
    messages.add(expect(bad, lambda: invoke(tracked)))
    assert len(messages) == 1


@pytest.mark.sanitize
@every_row
def test_refused_on_meta(bad: Bad) -> None:
    given = {**arguments(), **bad.change}
    moved = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()}
    expect(bad, lambda: invoke(moved))


@every_row
def test_refused_compiled(bad: Bad) -> None:
    torch.compiler.reset()
    tensors = [v for v in bad.change.values() if isinstance(v, Tensor)]
    traceable = all(t.layout == torch.strided for t in tensors)  # Dynamo takes no sparse tensors
    compiled = torch.compile(invoke, backend="eager", fullgraph=traceable)
    expect(bad, lambda: compiled({**arguments(), **bad.change}))


@pytest.mark.sanitize
def test_devices_do_not_mix() -> None:
    for name, value in arguments().items():
        if isinstance(value, Tensor):
            with pytest.raises(TypeError, match=r"seqmem::dynamic_memory: expected .*(meta|cpu)"):
                invoke({**arguments(), name: value.to("meta")})


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", ["quantized", "mkldnn", "nested"])
@pytest.mark.parametrize("name", ["query", "memory"])
def test_exotic_layouts_are_refused(name: str, layout: str) -> None:
    value = arguments()[name]
    if layout == "quantized":
        value = torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)
    elif layout == "mkldnn":
        value = value.to_mkldnn()
    else:
        value = torch.nested.nested_tensor([z(2, H), z(3, H)])
    with pytest.raises(TypeError, match="seqmem::dynamic_memory: expected"):
        invoke({**arguments(), name: value})
