"""One-shot classification (Santoro et al. 2016, arXiv 1605.06065): classes never seen before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from . import glyphs
from .task import AnswersTask, Batch, Probe, ordinal, require_from, require_positive

SIGHTS = (1, 2, 5, 10)  # at which accuracy is told


@dataclass(frozen=True)
class OneShotTask(AnswersTask):
    """Episodes of `classes` letters with `images` pictures each, in random order; at every step a
    picture is to be named while the label of the step before is shown.

    Which letter has which label is drawn anew for each episode, so nothing that is learnt about
    letters helps: pictures and labels must be bound while the episode lasts. The first sight of
    a class can but be guessed. Pictures are letters of the fonts that matplotlib ships, in up to
    16 styles and four rotations (each a class of its own), moved by up to 2 pixels. Letters that
    look alike are one class. Every fifth letter is kept back: training never shows it, and
    :meth:`batch` shows nothing else. In the paper: 5 classes of 10 pictures of
    20 by 20, from Omniglot.

    With T = classes * images: input [T, B, side * side + classes], target [T, B, classes] with a 1
    for the right label; every step counts.

    Raises:
        ValueError: a number out of range.
        MissingPackage: from the first batch on, where matplotlib is not installed.
    """

    fixed = ("images",)

    classes: Annotated[int, "letters in an episode"] = 5
    images: Annotated[int, "pictures of each letter"] = 10
    side: Annotated[int, "pixels a side of a picture"] = 20
    letters: Annotated[int, "to draw from, at most; the fonts have fewer"] = 2000

    def __post_init__(self) -> None:
        require_positive("one_shot", images=self.images)
        require_from("one_shot", 2, classes=self.classes)
        require_from("one_shot", 2 * glyphs.MARGIN + 4, side=self.side)
        require_from("one_shot", 10 * self.classes, letters=self.letters)

    @property
    def input_size(self) -> int:
        return self.side * self.side + self.classes

    @property
    def output_size(self) -> int:
        return self.classes

    def batch(self, batch_size: int, generator: Generator, *, images: int = 10) -> Batch:
        return self._batch(self._glyphs().test, batch_size, generator, images)

    def training_batch(self, batch_size: int, generator: Generator, *, images: int = 10) -> Batch:
        return self._batch(self._glyphs().train, batch_size, generator, images)

    def _glyphs(self) -> glyphs.Glyphs:
        return glyphs.load(self.side, self.letters)

    def _batch(self, classes: Tensor, rows: int, generator: Generator, images: int) -> Batch:
        require_positive("one_shot", images=images)
        steps = self.classes * images
        chosen = torch.rand(rows, len(classes), generator=generator).topk(self.classes).indices
        label = torch.rand(rows, steps, generator=generator).argsort(1) % self.classes  # [B, T]
        target = F.one_hot(label, self.classes).to(torch.get_default_dtype())
        sight = sights(target.transpose(0, 1)).t() - 1  # [B, T]

        # A class shows all its styles, in random order, before one comes again.
        pictures, known = self._glyphs().pictures, self._glyphs().known[classes[chosen]]
        order = torch.rand(known.shape, generator=generator).masked_fill(~known, -1)
        order = order.argsort(2, descending=True)  # [B, classes, styles]
        row = torch.arange(rows).unsqueeze(1)
        style = order[row, label, sight % known.sum(2)[row, label]]
        which = classes[chosen[row, label]] * pictures.shape[1] + style
        most = glyphs.MARGIN
        down, right = torch.randint(-most, most + 1, (2, rows, steps), generator=generator)
        shown = glyphs.moved(pictures.flatten(0, 1), which, down, right).flatten(2)
        shown = shown.to(target.dtype) / 255
        before = F.pad(target[:, :-1], (0, 0, 1, 0))  # no label at the first step
        input = torch.cat((shown, before), 2).transpose(0, 1).contiguous()
        mask = input.new_ones(steps, rows)
        return Batch(input, target.transpose(0, 1), mask, torch.full((rows,), steps))

    def further(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The share of right answers at the 1st, 2nd, 5th, 10th sight of a class."""
        right = self.right(logits, batch).float()
        at = sights(batch.target)
        return {
            ordinal(sight): (right * (at == sight)).sum(0) / self.classes
            for sight in SIGHTS
            if len(right) >= self.classes * sight
        }

    def probes(self) -> list[Probe]:
        return [
            Probe(f"{n} images a class", {"images": n}, n <= self.images)
            for n in (self.images, 2 * self.images)
        ]


def sights(target: Tensor) -> Tensor:
    """Of [T, B, classes]: how many pictures of a step's class were there, itself included."""
    return (target.cumsum(0) * target).sum(2).long()
