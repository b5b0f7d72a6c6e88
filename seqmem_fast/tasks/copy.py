"""Copy (NTM paper, arXiv 1410.5401, section 4.1): repeat what was shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Generator

from .task import Batch, BitsTask, Probe, random_bits, require_positive


@dataclass(frozen=True)
class CopyTask(BitsTask):
    """`length` random vectors, a delimiter flag on a channel of its own, then the same vectors.

    No input while the output is asked for. In the paper: 8 bits, lengths 1 to 20, tested up to 120.

    input [2 L + 1, B, bits + 1], target [2 L + 1, B, bits], the last L steps count.

    Raises:
        ValueError: bits or a length below 1, min_length above max_length.
    """

    name = "copy"

    min_length: Annotated[int, "fewest vectors"] = 1
    max_length: Annotated[int, "most vectors"] = 20

    def ranges(self) -> dict[str, tuple[int, int]]:
        return {"length": (self.min_length, self.max_length)}

    def batch(self, batch_size: int, generator: Generator, *, length: int = 20) -> Batch:
        require_positive(self.name, length=length)
        sequence = random_bits(length, batch_size, self.bits, generator=generator)
        steps = 2 * length + 1
        shown = sequence.new_zeros(steps, batch_size, self.input_size)
        shown[:length, :, : self.bits] = sequence
        shown[length, :, self.bits] = 1
        target = sequence.new_zeros(steps, batch_size, self.bits)
        target[length + 1 :] = sequence
        mask = sequence.new_zeros(steps, batch_size)
        mask[length + 1 :] = 1
        return Batch(shown, target, mask, torch.full((batch_size,), steps))

    def probes(self) -> list[Probe]:
        lengths = [self.max_length * factor for factor in (1, 2, 4, 6)]  # 20, 40, 80, 120
        return [
            Probe(f"length {each}", {"length": each}, each <= self.max_length) for each in lengths
        ]
