"""What the pictures share: matplotlib imported late, white space made visible, one look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.patches import Rectangle

STEP, CHANNEL, SLOT = 0.11, 0.09, 0.045  # inches
VISIBLE = {" ": "␣", "\n": "↵", "\t": "→"}  # white space a reader can see


def new_figure(width: float, height: float, title: str | None, points: int = 11) -> Figure:
    """An empty Figure of that size in inches that makes room for its labels, with the title, of so
    many points, above."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "seqmem_fast.plot needs matplotlib: run `pip install matplotlib`"
        ) from error
    lines = (title or "").splitlines()
    width = max([width, *(0.6 * points / 72 * len(line) for line in lines)])  # letters of that size
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=points)
    return figure


def visible(tokens: str | Sequence[str]) -> list[str]:
    """The labels of characters or tokens; a dollar sign begins no formula."""
    return [VISIBLE.get(token, token).replace("$", r"\$") for token in tokens]


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


def frame(corner: tuple[float, float], colour: str) -> Rectangle:
    """Around a cell whose upper left corner that is."""
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=1.5)


class Panel(NamedTuple):
    """One band of a picture whose time goes across."""

    name: str
    values: Tensor  # [T, rows]
    inches: float  # a row's height
    rows: list[str] | None = None  # what each is, or the axis has `side` alone
    side: str = "channel"
    colours: str = "magma"
    low: float = 0.0
    top: float = 1.0


def answer_panels(
    input: Tensor, output: Tensor, target: Tensor, mask: Tensor, inches: float = CHANNEL
) -> list[Panel]:
    """What went in, what came out, and how far from the target it is where that counts."""
    counted = mask.bool().unsqueeze(1)
    nothing = torch.tensor(float("nan"))
    low, top = min(0.0, float(input.min())), max(1.0, float(input.max()))
    error = torch.where(counted, (output - target).abs(), nothing)
    return [
        Panel("input", input, inches, low=low, top=top),
        Panel("output", torch.where(counted, output, nothing), inches),
        Panel("error", error, inches, colours="Reds"),
    ]


def height_of(panel: Panel) -> float:
    return max(0.6, panel.values.shape[1] * panel.inches)


def height_of_all(panels: Sequence[Panel]) -> float:
    """One below the other, with names and axis."""
    return sum(map(height_of, panels)) + 0.33 * len(panels) + 0.5


def draw_panel(axes: Axes, panel: Panel) -> None:
    shown = panel.values.detach().to("cpu", torch.float32).t().numpy()
    image = heat(axes, shown, cmap=panel.colours, vmin=panel.low, vmax=panel.top)
    axes.set_facecolor("0.9")
    axes.set_title(panel.name, loc="left", fontsize=10)
    axes.set_ylabel(panel.side, fontsize=8)
    axes.set_yticks([])
    if panel.rows is not None:
        apart = max(1, len(panel.rows) // 5) if panel.side == "slot" else 1
        some = range(0, len(panel.rows), apart)
        axes.set_yticks(some, [panel.rows[row] for row in some], fontsize=7)
    colour_bar(image, axes, pad=0.01, fraction=0.03, aspect=10)


def draw_panels(figure: Any, panels: Sequence[Panel]) -> None:
    """One below the other, time across."""
    heights = [height_of(panel) for panel in panels]
    axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights)
    for each, panel in zip(axes, panels, strict=True):
        draw_panel(each, panel)
    axes[-1].set_xlabel("time step")


def check_shapes(
    picture: str, found: dict[str, Tensor], expected: dict[str, tuple[int, ...]]
) -> None:
    for name, tensor in found.items():
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"plot.{picture}: expected {name} of shape {list(expected[name])}, "
                f"got {list(tensor.shape)}"
            )
