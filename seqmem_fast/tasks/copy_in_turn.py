"""Copy in turn (DNC paper, Graves et al. 2016, extended figure 1): forget what has been said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Generator

from .task import Batch, BitsTask, Probe, random_bits, require_positive


@dataclass(frozen=True)
class CopyInTurnTask(BitsTask):
    """`sequences` of `length` random vectors each, every one of which is copied before the next
    one comes.

    What has been copied is not needed again. With more vectors in all than the memory has slots (40
    by default, where 10 slots are enough), slots must be freed and used again. One flag is on while
    vectors are shown (one in 256 has no bits), another marks the step between a sequence and its
    copy. A curriculum lets the number of sequences grow.

    With L vectors and K sequences: input [K (2 L + 1), B, bits + 2], target [.., B, bits], the last
    L steps of each sequence count.

    Raises:
        ValueError: a number below 1, a minimum above its maximum.
    """

    name = "copy_in_turn"
    flags = 2

    min_length: Annotated[int, "fewest vectors in a sequence"] = 1
    max_length: Annotated[int, "most vectors in a sequence"] = 8
    min_sequences: Annotated[int, "fewest sequences"] = 1
    max_sequences: Annotated[int, "most sequences"] = 5

    def ranges(self) -> dict[str, tuple[int, int]]:
        return {
            "length": (self.min_length, self.max_length),
            "sequences": (self.min_sequences, self.max_sequences),
        }

    def batch(
        self, batch_size: int, generator: Generator, *, length: int = 8, sequences: int = 5
    ) -> Batch:
        require_positive(self.name, length=length, sequences=sequences)
        block = sequences, 2 * length + 1, batch_size
        vectors = random_bits(sequences, length, batch_size, self.bits, generator=generator)
        shown = vectors.new_zeros(*block, self.input_size)
        shown[:, :length, :, : self.bits] = vectors
        shown[:, :length, :, self.bits] = 1
        shown[:, length, :, self.bits + 1] = 1
        target = vectors.new_zeros(*block, self.bits)
        target[:, length + 1 :] = vectors
        mask = vectors.new_zeros(block)
        mask[:, length + 1 :] = 1
        steps = sequences * (2 * length + 1)
        lengths = torch.full((batch_size,), steps)
        return Batch(shown.flatten(0, 1), target.flatten(0, 1), mask.flatten(0, 1), lengths)

    def probes(self) -> list[Probe]:
        most, often = self.max_length, self.max_sequences
        sizes = ((most, often), (most, 2 * often), (most, 4 * often), (2 * most, often))
        return [
            Probe(
                f"{sequences} sequences of {length}",
                {"length": length, "sequences": sequences},
                length <= most and sequences <= often,
            )
            for length, sequences in sizes
        ]
