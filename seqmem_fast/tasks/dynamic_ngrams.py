"""Dynamic n-grams (NTM paper, arXiv 1410.5401, section 4.4): learn new statistics on the fly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Generator, Tensor

from .task import Batch, Probe, Task, random_bits, require_from, require_positive


@dataclass(frozen=True)
class DynamicNgramsTask(Task):
    """Bits drawn from a fresh n-gram table for every sequence; predict each from those before it.

    The chance of a 1 after each of the 2^(n-1) contexts is drawn from Beta(1/2, 1/2); the first
    n - 1 bits are fair coins and are not to be predicted. In the paper: 6-grams, 200 bits.

    input [length - 1, B, 1], target [length - 1, B, 1] the next bit, from step n - 2 on it counts.

    Raises:
        ValueError: order below 2, a length that leaves nothing to predict.
    """

    fixed = ("length",)

    order: Annotated[int, "n: a bit depends on the n - 1 before it"] = 6
    length: Annotated[int, "bits"] = 200

    def __post_init__(self) -> None:
        require_from("dynamic_ngrams", 2, order=self.order)
        self._require_length(self.length)

    def _require_length(self, length: int) -> None:
        if length < self.order:
            raise ValueError(f"dynamic_ngrams: expected length from {self.order} on, got {length}")

    @property
    def input_size(self) -> int:
        return 1

    @property
    def output_size(self) -> int:
        return 1

    def batch(self, batch_size: int, generator: Generator, *, length: int = 200) -> Batch:
        self._require_length(length)
        require_positive("dynamic_ngrams", batch_size=batch_size)
        known, contexts = self.order - 1, 2 ** (self.order - 1)
        # Beta(1/2, 1/2) is the arcsine law: sin^2 of an angle uniform over a quarter turn.
        angles = torch.rand(batch_size, contexts, generator=generator) * (math.pi / 2)
        chances = angles.sin().square()
        coins = torch.rand(length, batch_size, generator=generator)
        bits = torch.empty(length, batch_size)
        bits[:known] = random_bits(known, batch_size, generator=generator)
        context = _contexts(bits[:known], self.order)[0]
        for t in range(known, length):
            chance = chances.gather(1, context.unsqueeze(1)).squeeze(1)
            bits[t] = (coins[t] < chance).to(bits.dtype)
            context = (context * 2 + bits[t].long()) % contexts
        mask = torch.zeros(length - 1, batch_size)
        mask[known - 1 :] = 1
        target = bits[1:] * mask
        steps = torch.full((batch_size,), length - 1)
        return Batch(bits[:-1].unsqueeze(2), target.unsqueeze(2), mask, steps)

    def best_cost(self, batch: Batch) -> float:
        """The optimal Bayesian estimator's: P(1) = (N1 + 1/2) / (N0 + N1 + 1) in each context."""
        known = self.order - 1
        contexts = _contexts(batch.input[..., 0], self.order)
        following = batch.target[known - 1 :, :, 0].long()
        steps, rows = following.shape
        seen = torch.zeros(rows, 2**known, 2)
        row, cost = torch.arange(rows), 0.0
        for t in range(steps):
            here = seen[row, contexts[t]]
            chance = (here[row, following[t]] + 0.5) / (here.sum(1) + 1)
            cost -= float(chance.log2().sum())
            seen[row, contexts[t], following[t]] += 1
        return cost / rows

    def probes(self) -> list[Probe]:
        return [
            Probe(f"length {n}", {"length": n}, n <= self.length)
            for n in (self.length, 2 * self.length, 4 * self.length)
        ]


def _contexts(bits: Tensor, order: int) -> Tensor:
    """[T, B] bits to [T - (order - 2), B] numbers: the order - 1 bits up to each step."""
    windows = bits.long().unfold(0, order - 1, 1)  # [T - (order - 2), B, order - 1]
    return (windows * 2 ** torch.arange(order - 2, -1, -1)).sum(2)
