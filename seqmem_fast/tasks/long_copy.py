"""Long copy: a long text, each of whose symbols is to be said again as late as the header asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .task import AnswersTask, Batch, Probe, require_from

LONG = (1024, 8192)  # steps of the texts that a training is judged by


@dataclass(frozen=True)
class LongCopyTask(AnswersTask):
    """The first step, the header, shows a delay of 1 to `delays`, the `length` steps after a text.
    Each of them asks for the symbol that came so many steps before.

    What a step needs is near, or at the very beginning: attention to a window and a global key sees
    both, at a price that grows with the text and not with its square. It is judged on texts of
    1,024 and 8,192 steps as well.

    Input [1 + length, B, symbols + delays]; target [.., B, symbols] with a 1 for the right symbol;
    a step counts where the text has one so many steps before.

    Raises:
        ValueError: fewer than 2 symbols, no delay, a text no longer than the longest delay.
    """

    fixed = ("length",)

    symbols: Annotated[int, "of the text"] = 8
    delays: Annotated[int, "the longest delay"] = 4
    length: Annotated[int, "of a text in training"] = 64

    def __post_init__(self) -> None:
        require_from("long_copy", 2, symbols=self.symbols)
        require_from("long_copy", 1, delays=self.delays)
        self._check(self.length)

    def _check(self, length: int) -> None:
        require_from("long_copy", self.delays + 1, length=length)

    @property
    def header(self) -> int:
        """How many first steps all later ones may need."""
        return 1

    @property
    def input_size(self) -> int:
        return self.symbols + self.delays

    @property
    def output_size(self) -> int:
        return self.symbols

    def batch(self, batch_size: int, generator: Generator, *, length: int = 64) -> Batch:
        self._check(length)
        delay = torch.randint(self.delays, (batch_size,), generator=generator)
        text = torch.randint(self.symbols, (batch_size, length), generator=generator)
        header = F.pad(F.one_hot(delay, self.delays), (self.symbols, 0)).unsqueeze(1)
        shown = F.one_hot(text, self.symbols)  # [B, T, symbols]
        input = torch.cat((header, F.pad(shown, (0, self.delays))), 1)
        source = torch.arange(length) - (delay + 1).unsqueeze(1)  # [B, T]
        mask = source >= 0
        answer = text.gather(1, source.clamp(min=0))
        target = F.one_hot(answer, self.symbols) * mask.unsqueeze(2)
        input, target, mask = (
            part.transpose(0, 1).contiguous().to(torch.get_default_dtype())
            for part in (input, F.pad(target, (0, 0, 1, 0)), F.pad(mask, (1, 0)))
        )
        return Batch(input, target, mask, torch.full((batch_size,), 1 + length))

    def in_words(self, batch: Batch) -> list[str]:
        """What the first sequence of a batch shows: its delay, then a letter for each symbol."""
        shown = batch.input[:, 0].argmax(1).tolist()
        letters = [chr(ord("a") + symbol) for symbol in shown[1:]]
        return [str(shown[0] - self.symbols + 1), *letters]

    def further(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The share of right answers."""
        right = (self.right(logits, batch) * batch.mask).sum(0)
        return {"right": right / batch.mask.sum(0)}

    def probes(self) -> list[Probe]:
        return [
            Probe(f"{length:,} steps", {"length": length}, length <= self.length)
            for length in sorted({max(self.delays + 1, self.length // 2), self.length, *LONG})
        ]
