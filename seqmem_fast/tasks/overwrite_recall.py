"""Overwriting recall: keys get new values again and again; which value has each of them now?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .task import AnswersTask, Batch, Probe, require_from, require_positive


@dataclass(frozen=True)
class OverwriteRecallTask(AnswersTask):
    """Each of `keys` keys is given a value, `writes` times in all, in random order; then all keys
    are asked for, each once, in random order: the answer is the value that it was given last.

    A memory that only adds holds all the values that a key ever had; one that keeps the newest
    writes loses the keys that were not among them. Every key is written at least once. It is judged
    on sequences with twice as many writes too.

    With K keys, V values and W writes: input [W + K, B, K + V + 1], key and value of a write at one
    step, the last channel on in questions; target [.., B, V] with a 1 for the right value; the last
    K steps count.

    Raises:
        ValueError: fewer than 2 keys or values, fewer writes than keys.
    """

    fixed = ("writes",)

    keys: Annotated[int, "different keys"] = 16
    values: Annotated[int, "different values"] = 64
    writes: Annotated[int, "before the questions"] = 48

    def __post_init__(self) -> None:
        require_from("overwrite_recall", 2, keys=self.keys, values=self.values)
        self._check(self.writes)

    def _check(self, writes: int) -> None:
        require_from("overwrite_recall", self.keys, writes=writes)

    @property
    def input_size(self) -> int:
        return self.keys + self.values + 1

    @property
    def output_size(self) -> int:
        return self.values

    def batch(self, batch_size: int, generator: Generator, *, writes: int = 48) -> Batch:
        require_positive("overwrite_recall", batch_size=batch_size)
        self._check(writes)
        rows = torch.arange(batch_size).unsqueeze(1)
        again = torch.randint(self.keys, (batch_size, writes - self.keys), generator=generator)
        each = torch.arange(self.keys).expand(batch_size, -1)
        order = torch.rand(batch_size, writes, generator=generator).argsort(1)
        key = torch.cat((each, again), 1)[rows, order]  # [B, W]
        value = torch.randint(self.values, (batch_size, writes), generator=generator)
        asked = torch.rand(batch_size, self.keys, generator=generator).argsort(1)  # [B, K]
        answer = value[rows, last_writes(key, asked)]

        shown = torch.get_default_dtype()
        keys = F.one_hot(torch.cat((key, asked), 1), self.keys).to(shown)
        values = F.pad(F.one_hot(value, self.values).to(shown), (0, 0, 0, self.keys))
        asks = F.pad(values.new_ones(batch_size, self.keys, 1), (0, 0, writes, 0))
        target = F.pad(F.one_hot(answer, self.values).to(shown), (0, 0, writes, 0))
        input = torch.cat((keys, values, asks), 2).transpose(0, 1).contiguous()
        mask = asks.squeeze(2).t().contiguous()
        lengths = torch.full((batch_size,), writes + self.keys)
        return Batch(input, target.transpose(0, 1).contiguous(), mask, lengths)

    def in_numbers(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [B, W] and values [B, W] that a batch writes, keys [B, K] that it asks for."""
        keys, values, _ = batch.input.transpose(0, 1).split((self.keys, self.values, 1), 2)
        key, value = keys.argmax(2), values.argmax(2)
        return key[:, : -self.keys], value[:, : -self.keys], key[:, -self.keys :]

    def further(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The share of right answers."""
        return {"right": (self.right(logits, batch) * batch.mask).sum(0) / self.keys}

    def probes(self) -> list[Probe]:
        return [
            Probe(f"{writes} writes", {"writes": writes}, writes <= self.writes)
            for writes in (self.writes, 2 * self.writes)
        ]


def last_writes(key: Tensor, asked: Tensor) -> Tensor:
    """At which of the writes [B, W] each key of [B, Q] was written last, [B, Q]."""
    at = torch.arange(1, key.shape[1] + 1)
    return ((key.unsqueeze(1) == asked.unsqueeze(2)) * at).argmax(2)
