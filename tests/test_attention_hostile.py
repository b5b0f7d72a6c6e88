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

BATCH, QUERIES, KEYS, WIDTH, VALUES = 3, 4, 5, 6, 2
z = torch.zeros


def arguments() -> dict[str, Any]:
    return {
        "query": z(BATCH, QUERIES, WIDTH),
        "key": z(BATCH, KEYS, WIDTH),
        "value": z(BATCH, KEYS, VALUES),
        "mask": z(BATCH, QUERIES, KEYS).bool(),
    }


class Bad(NamedTuple):
    name: str
    change: dict[str, Any]
    error: type[Exception]
    says: str  # a pattern that the message must contain, after "seqmem::attention: expected"


ROWS = [
    Bad("query 1-D", {"query": z(WIDTH)}, ValueError, "query with at least 2 dim"),
    Bad("query 0-D", {"query": z(())}, ValueError, "query with at least 2 dim"),
    Bad("query width 0", {"query": z(3, 4, 0)}, ValueError, "query with at least one feature"),
    Bad("query width", {"query": z(3, 4, 7)}, ValueError, r"key of shape \[\.\.\., 5, 7\]"),
    Bad("query batch", {"query": z(2, 4, 6)}, ValueError, r"key .*broadcast to \[2\]"),
    Bad("query integer", {"query": z(3, 4, 6).int()}, TypeError, "query of dtype float32"),
    Bad("query bool", {"query": z(3, 4, 6).bool()}, TypeError, "query of dtype float32"),
    Bad("query complex", {"query": z(3, 4, 6).cfloat()}, TypeError, "query of dtype float32"),
    Bad("query float8", {"query": z(3, 4, 6).to(torch.float8_e4m3fn)}, TypeError, "query of dt"),
    Bad("query double", {"query": z(3, 4, 6).double()}, TypeError, "key of query's dtype Double"),
    Bad("query sparse", {"query": z(3, 4, 6).to_sparse()}, TypeError, "query to be a dense"),
    Bad("query csr", {"query": z(4, 6).to_sparse_csr()}, TypeError, "query to be a dense"),
    Bad("key 1-D", {"key": z(WIDTH)}, ValueError, "key with at least 2 dim"),
    Bad("key batch", {"key": z(4, 5, 6)}, ValueError, r"key .*broadcast to \[3\], got .*\[4, 5, 6"),
    Bad("key half", {"key": z(3, 5, 6).half()}, TypeError, "key of query's dtype Float, got Half"),
    Bad("key sparse", {"key": z(3, 5, 6).to_sparse()}, TypeError, "key to be a dense"),
    Bad("key rows", {"key": z(3, 6, 6)}, ValueError, r"value of shape \[\.\.\., 6, 2\]"),
    Bad("value 1-D", {"value": z(KEYS)}, ValueError, "value with at least 2 dim"),
    Bad("value batch", {"value": z(2, 5, 2)}, ValueError, "value .*broadcast"),
    Bad("value outer", {"query": z(2, 3, 4, 6), "value": z(4, 3, 5, 2)}, ValueError, "value .*bro"),
    Bad("value dtype", {"value": z(3, 5, 2).bfloat16()}, TypeError, "value of query's dtype"),
    Bad("value integer", {"value": z(3, 5, 2).long()}, TypeError, "value of query's dtype"),
    Bad("mask keys", {"mask": z(3, 4, 4).bool()}, ValueError, r"mask that .*\[\.\.\., 4, 5\]"),
    Bad("mask queries", {"mask": z(3, 5, 5).bool()}, ValueError, "mask that broadcasts"),
    Bad("mask 1-D", {"mask": z(4).bool()}, ValueError, "mask that broadcasts"),
    Bad("mask batch", {"mask": z(2, 4, 5).bool()}, ValueError, r"mask .*broadcast to \[3\]"),
    Bad("mask dtype", {"mask": z(3, 4, 5).double()}, TypeError, "mask of dtype bool, an integer"),
    Bad("mask complex", {"mask": z(3, 4, 5).cfloat()}, TypeError, "mask of dtype bool"),
    Bad("mask sparse", {"mask": z(3, 4, 5).to_sparse()}, TypeError, "mask to be a dense"),
    Bad("one query", {"query": z(3, 1, 6), "mask": z(3, 4, 5)}, ValueError, "mask that broadcasts"),
]
every_row = pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.name) for bad in ROWS])


def expect(bad: Bad, call: Callable[[], Any]) -> str:
    with pytest.raises(bad.error) as caught:
        call()
    message = str(caught.value)
    assert re.match(r"seqmem::attention: expected .*got ", message, re.DOTALL), message
    assert re.search(bad.says, message), message
    return message.split("\n")[0]


def test_the_unchanged_arguments_are_right() -> None:
    """Else the table would prove nothing."""
    output, weights = sf.ops.attention(**arguments())
    assert not output.any() and (weights == 1 / KEYS).all()


@pytest.mark.sanitize
@every_row
def test_refused_alike_in_every_mode(bad: Bad) -> None:
    call = {**arguments(), **bad.change}
    messages = set()
    for mode in MODES.values():
        for return_weights in (True, False):
            with mode():
                messages.add(
                    expect(bad, lambda: sf.ops.attention(**call, return_weights=return_weights))  # noqa: B023
                )
    leaves = {
        k: v.detach().requires_grad_() if v.is_floating_point() else v for k, v in call.items()
    }
    messages.add(expect(bad, lambda: sf.ops.attention(**leaves)))
    assert len(messages) == 1


@pytest.mark.sanitize
@every_row
def test_refused_on_meta(bad: Bad) -> None:
    moved = {k: v.to("meta") for k, v in {**arguments(), **bad.change}.items()}
    expect(bad, lambda: sf.ops.attention(**moved))


@every_row
def test_refused_compiled(bad: Bad) -> None:
    call = {**arguments(), **bad.change}
    torch.compiler.reset()
    traceable = all(t.layout == torch.strided for t in call.values())  # Dynamo takes no sparse ones
    compiled = torch.compile(sf.ops.attention, backend="eager", fullgraph=traceable)
    expect(bad, lambda: compiled(**call))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", arguments())
def test_devices_do_not_mix(name: str) -> None:
    call = arguments()
    call[name] = call[name].to("meta")
    with pytest.raises(TypeError, match=r"seqmem::attention: expected .*(meta|cpu)"):
        sf.ops.attention(**call)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", ["quantized", "mkldnn", "nested"])
def test_exotic_inputs_are_refused(layout: str) -> None:
    x: Tensor = z(BATCH, QUERIES, WIDTH)
    if layout == "quantized":
        x = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    elif layout == "mkldnn":
        x = x.to_mkldnn()
    else:
        x = torch.nested.nested_tensor([z(2, WIDTH), z(3, WIDTH)])
    with pytest.raises(TypeError, match="seqmem::attention: expected query to be a dense tensor"):
        sf.ops.attention(**{**arguments(), "query": x})


def module(**options: Any) -> sf.Attention:
    return sf.Attention(6, 2, **options)


x, long = z(4, 3, 6), z(5, 3, 6)
MODULE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "heads": (lambda: sf.Attention(6, 4), ValueError, "embed_dim > 0 that num_heads"),
    "no heads": (lambda: sf.Attention(6, 0), ValueError, "embed_dim > 0 that num_heads"),
    "query 4-D": (lambda: module()(x[None], x, x), ValueError, "query with 2 or 3 dim"),
    "query width": (lambda: module()(z(4, 3, 5), x, x), ValueError, r"query of shape \[4, 3, 6\]"),
    "key 2-D": (lambda: module()(x, z(4, 6), x), ValueError, "key of shape"),
    "key width": (lambda: module(kdim=5)(x, x, x), ValueError, r"key of shape \[4, 3, 5\]"),
    "key batch": (lambda: module()(x, z(4, 2, 6), x), ValueError, r"key of shape \[4, 3, 6\]"),
    "value length": (lambda: module()(x, long, x), ValueError, r"value of shape \[5, 3, 6\]"),
    "value width": (lambda: module(vdim=7)(x, x, x), ValueError, r"value of shape \[4, 3, 7\]"),
    "batch_first": (
        lambda: module(batch_first=True)(x, long, long),
        ValueError,
        r"key of shape \[4, 3, 6\], got shape \[5, 3, 6\]",
    ),
    "padding shape": (
        lambda: module()(x, long, long, z(5, 3).bool()),
        ValueError,
        r"key_padding_mask of shape \[3, 5\]",
    ),
    "padding dtype": (lambda: module()(x, x, x, z(3, 4).int()), TypeError, "key_padding_mask of d"),
    "mask shape": (
        lambda: module()(x, long, long, attn_mask=z(3, 4, 5)),
        ValueError,
        r"attn_mask of shape \[4, 5\] or \[6, 4, 5\]",
    ),
    "mask dtype": (lambda: module()(x, x, x, attn_mask=z(4, 4).int()), TypeError, "attn_mask of d"),
    "causal": (lambda: module()(x, x, x, is_causal=True), ValueError, "attn_mask with is_causal"),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("name", MODULE)
def test_module_refuses(name: str) -> None:
    call, kind, says = MODULE[name]
    messages = set()
    for mode in MODES.values():
        with mode(), pytest.raises(kind, match="seqmem::attention: expected") as caught:
            call()
        assert re.search(says, str(caught.value)), str(caught.value)
        messages.add(str(caught.value))
    assert len(messages) == 1
