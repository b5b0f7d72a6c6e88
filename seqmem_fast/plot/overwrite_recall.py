"""Keys that are written again and again: which of its values is each one answered with?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .common import check_shapes, colour_bar, frame, heat, new_figure
from .one_shot import RIGHT, WRONG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 0.14  # inches


def overwrite_recall(
    keys: Tensor, values: Tensor, chances: Tensor, *, title: str | None = None
) -> Figure:
    """Keys down, writes across: each write's cell is the chance that its key is answered with its
    value. The last write of a key, which has the right one, is framed: green where the likeliest
    answer is that, red where not.

    Args:
        keys: int64 [W], which key each write writes.
        values: int64 [W], and which value.
        chances: [K, V] of each value when a key is asked for, all keys in order.
        title: above the picture.

    Returns:
        A matplotlib Figure; `figure.savefig("overwrite.png")` keeps it.

    Raises:
        ValueError: tensors that do not fit each other, a key or value out of range.
        ImportError: matplotlib is not installed.
    """
    count, (known, worth) = len(keys), chances.shape
    check_shapes("overwrite_recall", {"values": values}, {"values": (count,)})
    for name, each, most in (("keys", keys, known), ("values", values, worth)):
        if count and not 0 <= int(each.min()) <= int(each.max()) < most:
            raise ValueError(f"plot.overwrite_recall: expected {name} from 0 to {most - 1}")
    shown = torch.full((known, count), float("nan"))
    shown[keys, torch.arange(count)] = chances.detach().to("cpu", torch.float32)[keys, values]
    figure = new_figure(CELL * count + 1.6, CELL * known + 1.0, title, 10)
    axes = figure.subplots()
    image = heat(axes, shown.numpy(), cmap="magma", vmin=0.0, vmax=1.0)
    axes.set_facecolor("0.93")
    said = chances.argmax(1)
    for key in range(known):
        writes = (keys == key).nonzero().flatten().tolist()
        if writes:
            right = said[key] == values[writes[-1]]
            corner = writes[-1] - 0.5, key - 0.5
            axes.add_patch(frame(corner, RIGHT if right else WRONG))
    axes.set_yticks(range(known), [str(key) for key in range(known)], fontsize=7)
    axes.set_ylabel("key", fontsize=9)
    axes.set_xlabel("write", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    colour_bar(image, axes, pad=0.01, fraction=0.04, aspect=20)
    return figure
