"""The gates and cell states of an LSTM over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .common import colour_bar, heat, label_columns, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GATES = {
    "i": "input gate $i$: how much of the new is let in",
    "f": "forget gate $f$: how much of the old is kept",
    "g": "candidate $g$: the new",
    "o": "output gate $o$: how much is shown",
    "c": "cell state $c$: what is remembered",
}


class Gates(Protocol):
    """What `LSTM(..., return_gates=True)` hands back, each [layers * directions, T, B, H]."""

    @property
    def i(self) -> Tensor: ...
    @property
    def f(self) -> Tensor: ...
    @property
    def g(self) -> Tensor: ...
    @property
    def o(self) -> Tensor: ...
    @property
    def c(self) -> Tensor: ...


def liveliest(cells: Tensor, count: int) -> list[int]:
    """The `count` units of a [T, H] trace that change most, earliest peak first.

    Change is that of tanh(c), the part of c that can be seen: a unit that counts ever upwards
    would otherwise push aside those that switch.
    """
    seen = cells.tanh()
    chosen = seen.var(0, correction=0).topk(min(count, cells.shape[1])).indices
    peaks = (seen - seen.mean(0)).abs().argmax(0)
    return sorted(chosen.tolist(), key=lambda unit: int(peaks[unit]))


def _trace(gates: Gates, name: str, layer: int, batch: int, batch_first: bool) -> Tensor:
    """One gate of one layer and one batch row, [T, H], on the CPU in float32."""
    whole: Tensor = getattr(gates, name)
    if whole.dim() not in (3, 4):
        raise ValueError(f"plot.gates: expected gates of 3 or 4 dimensions, got {whole.dim()}")
    if not -whole.shape[0] <= layer < whole.shape[0]:
        raise ValueError(f"plot.gates: expected layer below {whole.shape[0]}, got {layer}")
    trace = whole[layer]
    if trace.dim() == 3:
        axis = 0 if batch_first else 1
        if not -trace.shape[axis] <= batch < trace.shape[axis]:
            raise ValueError(f"plot.gates: expected batch below {trace.shape[axis]}, got {batch}")
        trace = trace.select(axis, batch)
    return trace.detach().to("cpu", torch.float32)


def _draw(axes: Axes, name: str, values: Tensor, units: Sequence[int]) -> None:
    """One panel: units by time; gates on one scale 0 to 1, signed values on one around 0."""
    signed = name in "gc"
    reach = max(1.0, float(values.abs().max())) if name == "c" else 1.0
    image = heat(
        axes,
        values.t().numpy(),
        cmap="RdBu_r" if signed else "magma",
        vmin=-reach if signed else 0.0,
        vmax=reach,
    )
    axes.set_title(GATES[name], loc="left", fontsize=10)
    axes.set_ylabel("unit", fontsize=8)
    axes.set_yticks(range(len(units)), [str(unit) for unit in units], fontsize=7)
    colour_bar(image, axes, pad=0.01, fraction=0.03, aspect=10)


def gates(
    gates: Gates,
    *,
    layer: int = 0,
    batch: int = 0,
    units: int | Sequence[int] = 12,
    text: str | Sequence[str] | None = None,
    show: str = "ifoc",
    batch_first: bool = False,
    title: str | None = None,
) -> Figure:
    """The gates and cell states of an LSTM over time, one panel each.

    Shows i, f, o and c of i, f, g, o = act(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh),
    c_t = f c_{t-1} + i g, h_t = o tanh(c_t) (Hochreiter & Schmidhuber 1997; Gers et al. 2000):
    units down, time across. Gates share the scale 0 to 1, c has one symmetric about 0.

    Args:
        gates: the third result of `LSTM(..., return_gates=True)`; each of its tensors
            [L*D, T, B, H], [L*D, B, T, H] if `batch_first`, or [L*D, T, H] unbatched.
        layer: which of the L*D layers and directions.
        batch: which batch row.
        units: the hidden units to show, 0 <= unit < H, in that order, or how many of those
            whose cell state varies most.
        text: a label for each time step, such as the characters or tokens read; a string
            gives its characters. Without it steps are numbered.
        show: which of "ifgoc", in that order.
        batch_first: the layout of `gates`.
        title: above the picture.

    Returns:
        A matplotlib Figure; `figure.savefig("gates.png")` keeps it.

    Raises:
        ValueError: layer, batch, units, show out of range, or a text that is not T long.
        ImportError: matplotlib is not installed.
    """
    if not show or set(show) - set(GATES):
        raise ValueError(f"plot.gates: expected show made of 'ifgoc', got {show!r}")
    cells = _trace(gates, "c", layer, batch, batch_first)
    steps, hidden = cells.shape
    chosen = liveliest(cells, units) if isinstance(units, int) else list(units)
    if not chosen or not all(0 <= unit < hidden for unit in chosen):
        raise ValueError(f"plot.gates: expected units from 0 to {hidden - 1}, got {units}")
    if text is not None and len(text) != steps:
        raise ValueError(f"plot.gates: expected text of {steps} steps, got {len(text)}")

    height = 0.4 + 0.125 * len(chosen)
    figure = new_figure(max(5.0, 1.6 + 0.145 * steps), 0.7 + height * len(show), title)
    panels = figure.subplots(len(show), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, show, strict=True):
        _draw(axes, name, _trace(gates, name, layer, batch, batch_first)[:, chosen], chosen)
    if text is not None:
        label_columns(panels[-1], text, fontsize=9)
    panels[-1].set_xlabel("time step" if text is None else "time")
    return figure
