"""Associative recall (NTM paper, arXiv 1410.5401, section 4.3): which item came after this one?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Generator

from .task import Batch, BitsTask, Probe, random_bits, require_from, require_positive


@dataclass(frozen=True)
class AssociativeRecallTask(BitsTask):
    """Items, each a few random vectors with a delimiter before it; then one of them again between
    two query delimiters; the item that had followed it is the answer.

    Any but the last item may be asked for. In the paper: items of 3 vectors of 6 bits, 2 to 6
    items, tested up to 20. Item and query delimiters have a channel each.

    With V vectors an item and K items: input [K (V + 1) + V + 2 + V, B, bits + 2], target
    [.., B, bits], the last V steps count.

    Raises:
        ValueError: a number below 1, fewer than 2 items, a minimum above its maximum.
    """

    name = "associative_recall"
    flags = 2

    bits: Annotated[int, "of each vector"] = 6
    item_length: Annotated[int, "vectors in an item"] = 3
    min_items: Annotated[int, "fewest items in a sequence"] = 2
    max_items: Annotated[int, "most items in a sequence"] = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.name, item_length=self.item_length)
        require_from(self.name, 2, min_items=self.min_items)

    def ranges(self) -> dict[str, tuple[int, int]]:
        return {"items": (self.min_items, self.max_items)}

    def batch(self, batch_size: int, generator: Generator, *, items: int = 6) -> Batch:
        require_from(self.name, 2, items=items)
        vectors, width = self.item_length, self.bits
        sequence = random_bits(items, vectors, batch_size, width, generator=generator)
        asked = torch.randint(items - 1, (batch_size,), generator=generator)
        rows = torch.arange(batch_size)
        query = sequence[asked, :, rows].transpose(0, 1)  # [V, B, bits]
        answer = sequence[asked + 1, :, rows].transpose(0, 1)

        listed = items * (vectors + 1)
        steps = listed + vectors + 2 + vectors
        shown = sequence.new_zeros(steps, batch_size, self.input_size)
        blocks = shown[:listed].view(items, vectors + 1, batch_size, self.input_size)
        blocks[:, 0, :, width] = 1
        blocks[:, 1:, :, :width] = sequence
        shown[listed, :, width + 1] = 1
        shown[listed + 1 : listed + 1 + vectors, :, :width] = query
        shown[listed + 1 + vectors, :, width + 1] = 1
        target = sequence.new_zeros(steps, batch_size, width)
        target[-vectors:] = answer
        mask = sequence.new_zeros(steps, batch_size)
        mask[-vectors:] = 1
        return Batch(shown, target, mask, torch.full((batch_size,), steps))

    def probes(self) -> list[Probe]:
        sizes = sorted({self.max_items, *(n for n in (8, 10, 12, 15, 20) if n > self.max_items)})
        return [Probe(f"{n} items", {"items": n}, n <= self.max_items) for n in sizes]
