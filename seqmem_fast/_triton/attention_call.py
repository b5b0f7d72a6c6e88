"""What attention's launchers on GPU share: a call's arguments and sizes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common import as_bytes, cdiv, next_power_of_2, product_precision, two_leading


class Tiles(NamedTuple):
    """Queries and keys of a block, warps of a program."""

    queries: int
    keys: int
    warps: int


class Operands(NamedTuple):
    """Of both ops."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None


class Call:
    """One call's sizes, and its arguments as [Z0, Z1, rows, columns]."""

    def __init__(self, operands: Operands, scale: float | None) -> None:
        query, key, value, mask = operands
        mask_lead = () if mask is None else mask.shape[:-2]
        shapes = [t.shape[:-2] for t in (query, key, value)]
        self.lead = tuple(torch.broadcast_shapes(*shapes, mask_lead))
        self.queries, self.width = query.shape[-2:]
        self.keys, self.value_width = value.shape[-2:]
        self.scale = 1 / math.sqrt(self.width) if scale is None else scale
        self.query, self.key, self.value = (self.matrices(t) for t in (query, key, value))
        self.mask = None if mask is None else self.scores(as_bytes(mask))
        self.like = query

    def matrices(self, t: Tensor) -> Tensor:
        """t with two leading dimensions and dense rows."""
        return two_leading(t if t.stride(-1) == 1 else t.contiguous(), self.lead)

    def scores(self, t: Tensor) -> Tensor:
        """What broadcasts to [..., Tq, Tk], with any strides."""
        return two_leading(t.expand(*self.lead, self.queries, self.keys), self.lead)

    def empty(self, rows: int, columns: int) -> Tensor:
        return self.like.new_empty(*self.lead, rows, columns)

    @property
    def batch(self) -> int:
        return math.prod(self.lead)

    @property
    def heads(self) -> int:
        """The last leading dimension."""
        return 1 if len(self.lead) < 1 else self.lead[-1]

    @staticmethod
    def columns(width: int) -> int:
        """What a block of rows of this width takes."""
        return max(16, next_power_of_2(width))

    def arguments(self, tile: Tiles, block: int, rows: int) -> dict[str, Any]:
        """What every kernel takes; its programs own `block` of `rows` rows each."""
        return {
            "scale": self.scale,
            "queries": self.queries,
            "keys": self.keys,
            "width": self.width,
            "value_width": self.value_width,
            "heads": self.heads,
            "blocks": cdiv(rows, block),
            "PRECISION": product_precision(self.like.dtype, self.like.device),
            "BM": tile.queries,
            "BN": tile.keys,
            "BD": self.columns(self.width),
            "BV": self.columns(self.value_width),
            "num_warps": tile.warps,
            "num_stages": 1,
        }
