"""Priority sort (NTM paper, arXiv 1410.5401, section 4.5): say the vectors in order of priority."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Generator

from .task import Batch, BitsTask, Probe, random_bits


@dataclass(frozen=True)
class PrioritySortTask(BitsTask):
    """Random vectors, each with a priority uniform in [-1, 1] on a channel of its own; then the
    vectors of highest priority, the highest first.

    In the paper: 20 vectors of 8 bits, the 16 highest.

    With K of `items` vectors asked for: input [items + K, B, bits + 1], target
    [items + K, B, bits], the last K steps count.

    Raises:
        ValueError: a number below 1, more asked for than there are.
    """

    name = "priority_sort"
    fixed = ("items", "highest")

    items: Annotated[int, "vectors shown"] = 20
    highest: Annotated[int, "vectors asked for"] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_sizes(self.items, self.highest)

    def _require_sizes(self, items: int, highest: int) -> None:
        if not 1 <= highest <= items:
            raise ValueError(
                f"priority_sort: expected 1 <= highest <= items, got {highest} and {items}"
            )

    def batch(
        self, batch_size: int, generator: Generator, *, items: int = 20, highest: int = 16
    ) -> Batch:
        self._require_sizes(items, highest)
        vectors = random_bits(items, batch_size, self.bits, generator=generator)
        priority = torch.rand(items, batch_size, generator=generator) * 2 - 1
        shown = vectors.new_zeros(items + highest, batch_size, self.input_size)
        shown[:items, :, : self.bits] = vectors
        shown[:items, :, self.bits] = priority
        order = priority.argsort(0, descending=True)[:highest]  # [K, B]
        target = vectors.new_zeros(items + highest, batch_size, self.bits)
        target[items:] = vectors[order, torch.arange(batch_size)]
        mask = vectors.new_zeros(items + highest, batch_size)
        mask[items:] = 1
        return Batch(shown, target, mask, torch.full((batch_size,), items + highest))

    def probes(self) -> list[Probe]:
        sizes = [(self.items * f // 2, self.highest * f // 2) for f in (2, 3, 4)]
        return [
            Probe(
                f"{highest} highest of {items}",
                {"items": items, "highest": highest},
                items <= self.items,
            )
            for items, highest in sizes
        ]
