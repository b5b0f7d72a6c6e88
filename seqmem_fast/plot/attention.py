"""Where each step of an output looked: attention weights as a heat map with both texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..reference.window_attention import bounds
from .common import colour_bar, heat, label_columns, new_figure, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 0.2  # inches


def attention(
    weights: Tensor,
    source_tokens: str | Sequence[str],
    target_tokens: str | Sequence[str],
    *,
    title: str | None = None,
    left: int | None = None,
    dilation: int = 1,
    offset: int = 0,
    global_weights: Tensor | None = None,
) -> Figure:
    """The alignment picture: target tokens down, source tokens across, weights as colours.

    As Bahdanau, Cho & Bengio drew it (arXiv 1409.0473, figure 3). All heads share one scale, from
    0 to the largest weight.

    Args:
        weights: [Tq, Tk], one row for each target token, or [heads, Tq, Tk], one panel each. Of a
            batch choose a row: ``weights[0]``.
        source_tokens: Tk labels of what was attended to; a string gives its characters.
        target_tokens: Tq labels of what attended.
        title: above the picture.
        left: where not None, the weights are a band [Tq, W] or [heads, Tq, W], as
            ``ops.window_attention`` gives it for these arguments; what no query sees is drawn as 0.
        dilation, offset: likewise.
        global_weights: of a band, [Tq, G] or [heads, Tq, G].

    Returns:
        A matplotlib Figure; ``figure.savefig("attention.png")`` keeps it.

    Raises:
        ValueError: weights of other dimensions or empty, or labels that are not as many as the
            weights' rows and columns.
        ImportError: matplotlib is not installed.
    """
    if weights.dim() not in (2, 3) or weights.numel() == 0:
        raise ValueError(
            "plot.attention: expected weights of shape [Tq, Tk] or [heads, Tq, Tk], got "
            f"{list(weights.shape)}"
        )
    heads = weights.detach().to("cpu", torch.float32)
    heads = heads[None] if heads.dim() == 2 else heads
    if left is not None:
        heads = _spread(heads, len(source_tokens), left, dilation, offset, global_weights)
    count, rows, columns = heads.shape
    named = ("source_tokens", source_tokens, columns), ("target_tokens", target_tokens, rows)
    for name, tokens, wanted in named:
        if len(tokens) != wanted:
            raise ValueError(f"plot.attention: expected {wanted} {name}, got {len(tokens)}")

    figure = new_figure(count * max(1.6, CELL * columns) + 1.6, max(1.6, CELL * rows) + 1.2, title)
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    top = float(heads.max())
    for index, (axes, values) in enumerate(zip(panels, heads, strict=True)):
        image = heat(axes, values.numpy(), cmap="magma", vmin=0.0, vmax=top)
        axes.xaxis.tick_top()
        label_columns(axes, source_tokens, fontsize=9)
        if count > 1:
            axes.set_xlabel(f"head {index}", fontsize=9)
    panels[0].set_yticks(range(rows), visible(target_tokens), family="monospace", fontsize=9)
    colour_bar(image, list(panels), pad=0.01, fraction=0.04, aspect=15)
    return figure


def _spread(
    band: Tensor,
    columns: int,
    left: int,
    dilation: int,
    offset: int,
    global_weights: Tensor | None,
) -> Tensor:
    """A band [heads, Tq, W] as [heads, Tq, Tk]."""
    count, rows, width = band.shape
    left, _ = bounds(left, 0, dilation, offset, rows, columns)
    key = offset + torch.arange(rows)[:, None] + (torch.arange(width) - left) * dilation
    key = torch.where((key >= 0) & (key < columns), key, columns)
    whole = band.new_zeros(count, rows, columns + 1)
    whole.scatter_(2, key.expand(count, -1, -1), band)
    if global_weights is not None:
        first = global_weights.detach().to("cpu", torch.float32)
        if (
            first.dim() not in (2, 3)
            or first.shape[-2] != rows
            or first.shape[:-2] not in ((), (count,))
        ):
            raise ValueError(
                f"plot.attention: expected global_weights of shape [{rows}, G] or "
                f"[{count}, {rows}, G], got {list(first.shape)}"
            )
        whole[:, :, : first.size(-1)] += first
    return whole[:, :, :columns]
