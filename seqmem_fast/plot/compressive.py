"""What attention over a compressive memory reads, over the steps of the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .common import colour_bar, heat, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 0.09  # inches


def over_steps(
    weights: Tensor, steps: int, memory_size: int, compressed_size: int, ratio: int
) -> tuple[Tensor, list[int]]:
    """Weights [.., slots + T] of a row, spread over the steps that the slots stand for.

    Args:
        weights: as :class:`seqmem_fast.CompressiveAttention` returns them, of one row.
        steps: ``state.steps`` of that row before the call.
        memory_size, compressed_size, ratio: of the memory.

    Returns:
        [.., S + T], where S steps are remembered, the oldest first: a compressed slot's weight in
        equal parts on `ratio` of them. And where memory of each kind begins: the first compressed
        step, the first one kept whole, the first of the segment.

    Raises:
        ValueError: weights narrower than the memory's slots.
    """
    slots = compressed_size + ratio - 1 + memory_size
    if weights.dim() == 0 or weights.size(-1) < slots:
        raise ValueError(
            f"plot.compressive: expected weights [.., {slots} + T] of that memory, "
            f"got shape {list(weights.shape)}"
        )
    left = max(0, steps - memory_size)
    groups = min(left // ratio, compressed_size)
    whole = left % ratio + min(steps, memory_size)
    coarse = weights[..., compressed_size - groups : compressed_size] / ratio
    fine = weights[..., slots - whole :]
    spread = torch.cat((coarse.repeat_interleave(ratio, -1), fine), -1)
    return spread, [0, groups * ratio, groups * ratio + whole]


def compressive(
    weights: Tensor,
    steps: int,
    memory_size: int,
    compressed_size: int,
    ratio: int,
    *,
    title: str | None = None,
) -> Figure:
    """The steps of a segment down, all that is remembered across, the newest at the right.

    Each cell is one step of the stream, coloured by its share of the weight; steps that were
    compressed together have one colour. Lines divide what is compressed, what is kept whole (the
    steps that wait to be compressed included) and the segment itself.

    Args:
        weights: [T, slots + T] of one row.
        steps, memory_size, compressed_size, ratio: see :func:`over_steps`.
        title: above the picture.

    Returns:
        A matplotlib Figure; ``figure.savefig("compressive.png")`` keeps it.

    Raises:
        ValueError: weights of other dimensions, empty, or narrower than the memory's slots.
        ImportError: matplotlib is not installed.
    """
    if weights.dim() != 2 or weights.numel() == 0:
        raise ValueError(
            f"plot.compressive: expected weights [T, slots + T], got {list(weights.shape)}"
        )
    values = weights.detach().to("cpu", torch.float32)
    values, (_, whole, segment) = over_steps(values, steps, memory_size, compressed_size, ratio)
    rows, columns = values.shape
    figure = new_figure(max(3.0, CELL * columns + 1.6), max(1.6, 2 * CELL * rows + 1.1), title)
    axes = figure.subplots()
    image = heat(axes, values.numpy(), cmap="magma", vmin=0.0, vmax=float(values.max()))
    borders = [0, whole, segment, columns]
    names = [f"compressed, {ratio} : 1", "whole", "segment"]
    for name, start, end in zip(names, borders, borders[1:], strict=False):
        if end > start:
            axes.axvline(start - 0.5, color="white", linewidth=1.0)
            axes.text((start + end - 1) / 2, -0.8, name, ha="center", va="bottom", fontsize=9)
    ticks = range(columns - 1, -1, -max(8, columns // 8))
    axes.set_xticks([*ticks], [str(columns - 1 - tick) for tick in ticks], fontsize=8)
    axes.set_xlabel("steps back from the newest", fontsize=9)
    axes.set_ylabel("step of the segment", fontsize=9)
    colour_bar(image, axes, pad=0.01, fraction=0.04, aspect=15)
    return figure
