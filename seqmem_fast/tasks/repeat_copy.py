"""Repeat copy (NTM paper, arXiv 1410.5401, section 4.2): say it as often as told, then stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Generator, Tensor

from .task import Batch, BitsTask, Probe, random_bits, require_positive

BLANK_SHARE = 1 / 8  # of training's rows, in which one vector has no bits


@dataclass(frozen=True)
class RepeatCopyTask(BitsTask):
    """`length` random vectors, the number of copies as a scalar on a channel of its own, then the
    copies one after the other and an end marker on an output channel of its own.

    A curriculum lets the copies grow; all lengths are there from its start, since two short vectors
    fit into the controller, and a network that holds them there is slow to discover its memory.

    The scalar is normalised to mean 0 and variance 1 over training's numbers of copies. In the
    paper: 8 bits, lengths 1 to 10, 1 to 10 copies, tested up to length 20 and 20 copies.

    A vector without bits differs from the scalar of 5 or 6 copies by 0.17 alone. Random bits show
    it once in 256 vectors, too seldom for a network to learn to tell them apart: a training's
    batches have one in every eighth row, while :meth:`batch` draws as the paper does.

    input [L + 1 + L R + 1, B, bits + 1], target [.., B, bits + 1], the last L R + 1 steps count.

    Raises:
        ValueError: a number below 1, a minimum above its maximum.
    """

    name = "repeat_copy"

    min_length: Annotated[int, "fewest vectors"] = 1
    max_length: Annotated[int, "most vectors"] = 10
    min_repeats: Annotated[int, "fewest copies"] = 1
    max_repeats: Annotated[int, "most copies"] = 10

    @property
    def output_size(self) -> int:
        return self.bits + 1

    def ranges(self) -> dict[str, tuple[int, int]]:
        return {
            "length": (self.min_length, self.max_length),
            "repeats": (self.min_repeats, self.max_repeats),
        }

    def normalised(self, repeats: int) -> float:
        """That number of copies as the network is shown it."""
        numbers = self.max_repeats - self.min_repeats + 1
        deviation = max(((numbers**2 - 1) / 12) ** 0.5, 1e-8)  # of a uniform whole number
        if numbers == 1:
            return 1.0  # always the same number: a flag
        return (repeats - (self.min_repeats + self.max_repeats) / 2) / deviation

    def batch(
        self, batch_size: int, generator: Generator, *, length: int = 10, repeats: int = 10
    ) -> Batch:
        require_positive(self.name, length=length, repeats=repeats)
        return self._batch(random_bits(length, batch_size, self.bits, generator=generator), repeats)

    def training_batch(
        self, batch_size: int, generator: Generator, *, length: int = 10, repeats: int = 10
    ) -> Batch:
        require_positive(self.name, length=length, repeats=repeats)
        sequence = random_bits(length, batch_size, self.bits, generator=generator)
        chosen = torch.rand(batch_size, generator=generator) < BLANK_SHARE
        place = torch.randint(length, (batch_size,), generator=generator)
        blank = chosen & (torch.arange(length).unsqueeze(1) == place)
        return self._batch(sequence.masked_fill(blank.unsqueeze(2), 0), repeats)

    def _batch(self, sequence: Tensor, repeats: int) -> Batch:
        length, batch_size, _ = sequence.shape
        start = length + 1
        steps = start + length * repeats + 1
        shown = sequence.new_zeros(steps, batch_size, self.input_size)
        shown[:length, :, : self.bits] = sequence
        shown[length, :, self.bits] = self.normalised(repeats)
        target = sequence.new_zeros(steps, batch_size, self.output_size)
        target[start:-1, :, : self.bits] = sequence.repeat(repeats, 1, 1)
        target[-1, :, self.bits] = 1
        mask = sequence.new_zeros(steps, batch_size)
        mask[start:] = 1
        return Batch(shown, target, mask, torch.full((batch_size,), steps))

    def probes(self) -> list[Probe]:
        most, often = self.max_length, self.max_repeats
        return [
            Probe(
                f"length {length}, {repeats} copies",
                {"length": length, "repeats": repeats},
                length <= most and repeats <= often,
            )
            for length, repeats in (
                (most, often),
                (2 * most, often),
                (most, 2 * often),
                (2 * most, 2 * often),
            )
        ]
