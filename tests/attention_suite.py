"""The tests that both attentions inherit: ops of queries, keys and values, with a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hostile_suite import Bad
from op_suite import Function, OpSuite, compare
from torch import Tensor

MASKS: dict[str, Callable[[], Tensor]] = {
    "one value": lambda: torch.tensor(True),
    "keys": lambda: torch.rand(7) < 0.7,
    "queries": lambda: torch.rand(5, 1) < 0.7,
    "padding": lambda: (torch.rand(2, 1, 1, 7) < 0.7).expand(2, 3, 5, 7),
    "heads": lambda: torch.randint(0, 2, (3, 1, 1)).expand(2, 3, 5, 7),
    "bytes": lambda: torch.randint(0, 3, (2, 1, 5, 7), dtype=torch.uint8),
    "added to keys": lambda: torch.randn(7, dtype=torch.float64),
    "added to queries": lambda: torch.randn(3, 5, 1, dtype=torch.float64),
    "added to all": lambda: torch.randn((), dtype=torch.float64),
    "transposed": lambda: torch.randn(7, 5, dtype=torch.float64).t(),
    "more dimensions": lambda: torch.rand(2, 2, 1, 5, 7) < 0.5,
}
EMPTY = [(2, 0, 7, 4, 3), (2, 5, 0, 4, 3), (2, 0, 0, 4, 3), (0, 5, 7, 4, 3), (2, 5, 7, 4, 0)]


class AttentionSuite(OpSuite):
    op: ClassVar[Function]
    reference: ClassVar[Function]
    options: ClassVar[Sequence[dict[str, Any]]] = ({},)

    def operands(self, *batch: int, sizes: Sequence[int] = (5, 7, 4, 3)) -> tuple[Tensor, ...]:
        """All arguments but the mask; sizes = (Tq, Tk, width, Dv)."""
        queries, keys, width, values = sizes
        shapes = (queries, width), (keys, width), (keys, values)
        return tuple(torch.randn(*batch, *shape, dtype=torch.float64) for shape in shapes)

    def compare(self, *tensors: Tensor | None) -> None:
        for options in self.options:
            ours, theirs = (partial(f, **options) for f in (self.op, self.reference))
            compare(ours, theirs, tensors, tensors)

    @pytest.mark.sanitize
    @pytest.mark.parametrize("mask", MASKS)
    def test_masks_broadcast(self, mask: str) -> None:
        self.compare(*self.operands(2, 3), MASKS[mask]())

    @pytest.mark.sanitize
    @pytest.mark.parametrize("mask", [None, torch.bool, torch.float64], ids=str)
    @pytest.mark.parametrize("sizes", EMPTY, ids=str)
    def test_empty(self, sizes: tuple[int, ...], mask: torch.dtype | None) -> None:
        batch, queries, keys, _, values = sizes
        given = None if mask is None else torch.ones(queries, keys).to(mask)
        tensors = (*self.operands(batch, sizes=sizes[1:]), given)
        self.compare(*tensors)
        output, weights = self.op(*tensors)
        assert output.shape == (batch, queries, values)
        assert weights.shape == (batch, queries, keys) and (keys or not output.any())

    @pytest.mark.isa
    @pytest.mark.sanitize
    def test_a_row_of_minus_infinity_is_nan_and_alone(self) -> None:
        mask = torch.zeros(5, 7, dtype=torch.float64)
        mask[1], mask[2, 3] = -torch.inf, -torch.inf
        output, weights = self.op(*self.operands(), mask)
        assert output[1].isnan().all() and weights[1].isnan().all()
        assert weights[2, 3] == 0 and output[[0, 2, 3, 4]].isfinite().all()


def wrong_operands(arguments: dict[str, Any]) -> list[Bad]:
    """Spoilt query [B, Tq, D], key [B, Tk, D], value [B, Tk, Dv] and mask [B, Tq, Tk]."""
    z = torch.zeros
    names = ("query", "key", "value", "mask")
    query, key, value, mask = (arguments[name].float() for name in names)
    (b, queries, width), (keys, values) = query.shape, value.shape[1:]
    tall, wide = z(b, keys + 1, width), z(b, queries, width + 1)
    float8 = query.to(torch.float8_e4m3fn)
    every = {name: t for name, t in arguments.items() if t.is_floating_point()}
    return [
        Bad("query 1-D", {"query": z(width)}, ValueError, "query with at least 2 dim"),
        Bad("query 0-D", {"query": z(())}, ValueError, "query with at least 2 dim"),
        Bad("query width", {"query": wide}, ValueError, rf"key of shape .*{width + 1}\], got"),
        Bad("query batch", {"query": z(b + 2, queries, width)}, ValueError, "key .*broadcast to"),
        Bad("query integer", {"query": query.int()}, TypeError, "query of dtype float32"),
        Bad("query bool", {"query": query.bool()}, TypeError, "query of dtype float32"),
        Bad("query complex", {"query": query.cfloat()}, TypeError, "query of dtype float32"),
        Bad("query float8", {"query": float8}, TypeError, "query of dtype float32"),
        Bad("query double", {"query": query.double()}, TypeError, "key of query's dtype Double"),
        Bad("query sparse", {"query": query.to_sparse()}, TypeError, "query to be a dense"),
        Bad("query csr", {"query": query[0].to_sparse_csr()}, TypeError, "query to be a dense"),
        Bad("key 1-D", {"key": z(width)}, ValueError, "key with at least 2 dim"),
        Bad("key batch", {"key": z(b + 2, keys, width)}, ValueError, "key .*broadcast to"),
        Bad("key empty", {"key": z(0, keys, width)}, ValueError, "key with leading dimensions"),
        Bad("key rows", {"key": tall}, ValueError, rf"value of shape .*, {keys + 1}, {values}\]"),
        Bad("key half", {"key": key.half()}, TypeError, "key of query's dtype Float, got Half"),
        Bad("key sparse", {"key": key.to_sparse()}, TypeError, "key to be a dense"),
        Bad("value 1-D", {"value": z(values)}, ValueError, "value with at least 2 dim"),
        Bad("value batch", {"value": z(b + 2, keys, values)}, ValueError, "value .*broadcast"),
        Bad("value dtype", {"value": value.bfloat16()}, TypeError, "value of query's dtype"),
        Bad("value integer", {"value": value.long()}, TypeError, "value of query's dtype"),
        Bad("value sparse", {"value": value.to_sparse()}, TypeError, "value to be a dense"),
        Bad("mask columns", {"mask": mask[..., 1:]}, ValueError, rf"mask .*{queries}, {keys}\]"),
        Bad("mask rows", {"mask": mask[:, 1:]}, ValueError, "mask that broadcasts"),
        Bad("mask 1-D", {"mask": mask[0, 0, 1:]}, ValueError, "mask that broadcasts"),
        Bad("mask batch", {"mask": z(b + 2, queries, keys)}, ValueError, "mask with leading dim"),
        Bad("mask dtype", {"mask": mask.double()}, TypeError, "mask of dtype bool, an integer"),
        Bad("mask complex", {"mask": mask.cfloat()}, TypeError, "mask of dtype bool"),
        Bad("mask sparse", {"mask": mask.to_sparse()}, TypeError, "mask to be a dense"),
        Bad("all complex", {k: t.cfloat() for k, t in every.items()}, TypeError, "query of dtype"),
        Bad("all integer", {k: t.long() for k, t in every.items()}, TypeError, "query of dtype"),
    ]
