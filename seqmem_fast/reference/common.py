"""What the references of all ops share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

MASKED = -1e9  # the score of a masked entry; a row without any other is uniform


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with a mask applied: a floating one is added, any other masks where it is 0."""
    if mask is None:
        return scores
    if mask.is_floating_point():
        return scores + mask
    return torch.where(mask == 0, max(MASKED, torch.finfo(scores.dtype).min), scores)


def attend(weights: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """weights [..., Tq, Tk], value [..., Tk, Dv] -> output, and weights in the batch of both."""
    batch = torch.broadcast_shapes(weights.shape[:-2], value.shape[:-2])
    weights = weights.expand(*batch, -1, -1)
    return weights @ value, weights


class Sample(NamedTuple):
    """The arguments of one call, under a name that says which option it reaches."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    function: str = ""  # the function's name in `ops/<op>.py`, where it is not the op's own
