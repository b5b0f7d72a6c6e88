"""Distant recall: a note among other words, asked for up to 80 steps later."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .task import AnswersTask, Batch, Probe, require_from

DISTANCES = (0, 16, 32, 48, 80)  # accuracy is told of notes between one and the next


@dataclass(frozen=True)
class DistantRecallTask(AnswersTask):
    """A stream of `history` steps has a note in every `apart` of them, at a random place: a key and
    its value. All other steps show a word that means nothing. Then all keys that were noted are
    asked for, each once, in random order.

    How far back a note is, is counted from the first question: the newest step is 1 back. Which
    memory knows what was how far back is told of runs of `apart` steps together. It is judged on
    longer streams too, as far as there are keys for their notes.

    With N = history / apart notes: input [history + N, B, keys + values + words + 1], the last
    channel on in questions; target [.., B, values] with a 1 for the right value; the last N steps
    count.

    Raises:
        ValueError: a number below 1, fewer than 2 values, a history that `apart` does not divide,
            more notes than keys.
    """

    fixed = ("history",)

    keys: Annotated[int, "different keys"] = 16
    values: Annotated[int, "different values"] = 16
    words: Annotated[int, "different words that mean nothing"] = 16
    history: Annotated[int, "steps before the questions"] = 80
    apart: Annotated[int, "steps that have one note among them"] = 8

    def __post_init__(self) -> None:
        require_from("distant_recall", 1, keys=self.keys, words=self.words, apart=self.apart)
        require_from("distant_recall", 2, values=self.values)
        self._check(self.history)

    def _check(self, history: int) -> None:
        most = self.keys * self.apart
        if not 1 <= history <= most or history % self.apart:
            raise ValueError(
                f"distant_recall: expected history up to {most}, a multiple of {self.apart}, got "
                f"{history}"
            )

    @property
    def input_size(self) -> int:
        return self.keys + self.values + self.words + 1

    @property
    def output_size(self) -> int:
        return self.values

    def batch(self, batch_size: int, generator: Generator, *, history: int = 80) -> Batch:
        self._check(history)
        notes = history // self.apart
        rows = torch.arange(batch_size).unsqueeze(1)
        at = torch.randint(self.apart, (batch_size, notes), generator=generator)
        at = at + self.apart * torch.arange(notes)
        key = torch.rand(batch_size, self.keys, generator=generator).argsort(1)[:, :notes]
        value = torch.randint(self.values, (batch_size, notes), generator=generator)
        word = torch.randint(self.words, (batch_size, history), generator=generator)
        order = torch.rand(batch_size, notes, generator=generator).argsort(1)

        input = torch.zeros(batch_size, history + notes, self.input_size)
        keys, values, words, asks = input.split((self.keys, self.values, self.words, 1), 2)
        words[:, :history] = F.one_hot(word, self.words)
        words[rows, at] = 0
        keys[rows, at, key] = 1
        values[rows, at, value] = 1
        keys[:, history:] = F.one_hot(key[rows, order], self.keys)
        asks[:, history:] = 1
        target = input.new_zeros(batch_size, history + notes, self.values)
        target[:, history:] = F.one_hot(value[rows, order], self.values)
        lengths = torch.full((batch_size,), history + notes)
        time_first = (part.transpose(0, 1).contiguous() for part in (input, target, asks))
        input, target, mask = time_first
        return Batch(input, target, mask.squeeze(2), lengths)

    def right_by_run(self, logits: Tensor, batch: Batch) -> Tensor:
        """Which notes were answered rightly, bool [B, N]: the one of the newest run first."""
        notes = int(batch.mask[:, 0].sum())
        keys = batch.input[..., : self.keys]
        noted, asked = keys[:-notes].unflatten(0, (notes, self.apart)).sum(1), keys[-notes:]
        question = (noted.transpose(0, 1) @ asked.permute(1, 2, 0)).argmax(2)  # [B, N] of each run
        return self.right(logits, batch)[-notes:].t().gather(1, question).flip(1)

    def further(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The share of right answers, by how far back the note's run began."""
        right = self.right_by_run(logits, batch).float()
        begins = self.apart * torch.arange(1, right.shape[1] + 1)
        shares = {}
        for low, high in pairwise(DISTANCES):
            among = (begins > low) & (begins <= high)
            if among.any():
                shares[f"{low + 1}-{high} back"] = right[:, among].mean(1)
        return shares

    def probes(self) -> list[Probe]:
        longest = min(2 * self.history, self.keys * self.apart)
        return [
            Probe(f"{history} steps", {"history": history}, history <= self.history)
            for history in sorted({self.history, longest})
        ]
