"""What the pictures share: matplotlib imported late, white space made visible, one look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

VISIBLE = {" ": "␣", "\n": "↵", "\t": "→"}  # white space a reader can see


def new_figure(width: float, height: float) -> Figure:
    """An empty Figure of that size in inches that makes room for its labels."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "seqmem_fast.plot needs matplotlib: run `pip install matplotlib`"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def visible(tokens: str | Sequence[str]) -> list[str]:
    """The labels of characters or tokens."""
    return [VISIBLE.get(token, token) for token in tokens]


def label_columns(axes: Axes, tokens: str | Sequence[str], **style: Any) -> None:
    """A token under, or over, each column; upright where any is longer than a character."""
    axes.set_xticks(range(len(tokens)), visible(tokens), family="monospace", **style)
    if any(len(token) > 1 for token in tokens):
        axes.tick_params(axis="x", rotation=90)


def heat(axes: Axes, values: Any, **limits: Any) -> AxesImage:
    """A matrix as coloured cells, without frame and ticks."""
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **limits)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def colour_bar(image: AxesImage, axes: Any, **place: Any) -> None:
    """The scale of an image beside the given axes."""
    bar = image.figure.colorbar(image, ax=axes, **place)
    bar.ax.tick_params(labelsize=8)
    bar.ax.spines["outline"].set_visible(False)
