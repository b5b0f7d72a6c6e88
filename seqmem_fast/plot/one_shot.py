"""An episode of one-shot classification: what was shown and said, and where the reads looked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .common import check_shapes, colour_bar, heat, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RIGHT, WRONG = "#2a9d4a", "#d0342c"
CELL = 0.55  # inches of a picture


class Trace(Protocol):
    """What `MANN(..., return_trace=True)` hands back, of one episode."""

    @property
    def usage(self) -> Tensor: ...  # [T, N]
    @property
    def write_weights(self) -> Tensor: ...  # [T, R, N]
    @property
    def read_weights(self) -> Tensor: ...  # [T, R, N]


def read_from(trace: Trace) -> Tensor:
    r"""How much of what was written at each step each later read holds, [T, T] (read, written).

    M_t = sum over s of w^w_s a_s for what has not been erased since, so that the mean read of step
    t has a_s with the weight sum over i of w^r_t[i] w^w_s[i]: the slot of least usage is set to
    zero before each step's write.
    """
    steps, _, slots = trace.read_weights.shape
    written = trace.write_weights.sum(1).float()  # [T, N]
    reads = trace.read_weights.mean(1).float()
    before = torch.cat((torch.zeros(1, slots), trace.usage.float()[:-1]))
    holds = torch.zeros(steps, slots)  # of each step's addition, by slot
    result = torch.zeros(steps, steps)
    for t in range(steps):
        holds[:, int(before[t].argmin())] = 0
        holds[t] = written[t]
        result[t] = holds @ reads[t]
    return result


def one_shot(
    pictures: Tensor,
    chances: Tensor,
    labels: Tensor,
    trace: Trace | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """One episode: each class in a row, its sights from left to right, framed green where named
    rightly; beside it where a network with a memory looked.

    There, each row is a picture to be named, each column a step that wrote, which had seen the
    picture before and its label. Both are sorted by class, so that looking up the class's own
    pictures draws squares along the diagonal.

    Args:
        pictures: [T, side, side], 1 for ink.
        chances: [T, classes] that the network gave to each label.
        labels: [T] int64, the right ones.
        trace: as `MANN(..., return_trace=True)` gives it, of one episode; None for a network
            without memory.
        title: above the picture.

    Returns:
        A matplotlib Figure; `figure.savefig("one_shot.png")` keeps it.

    Raises:
        ValueError: tensors that do not fit each other.
        ImportError: matplotlib is not installed.
    """
    steps, classes = chances.shape
    found = {"pictures": pictures, "labels": labels}
    check_shapes("one_shot", found, {"pictures": (steps, *pictures.shape[1:]), "labels": (steps,)})
    places = [(labels == label).nonzero().flatten().tolist() for label in range(classes)]
    most = max(map(len, places))
    wide = 0 if trace is None else 0.8 * CELL * most
    figure = new_figure(CELL * most + wide + 1, (CELL + 0.14) * classes + 0.7, title)
    halves = figure.subfigures(1, 1 if trace is None else 2, squeeze=False)[0]
    cells = halves[0].subplots(classes, most, squeeze=False)
    named = chances.argmax(1)
    for label, (row, times) in enumerate(zip(cells, places, strict=True)):
        row[0].set_ylabel(f"class {label}", fontsize=8)
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
        for axes in row[len(times) :]:
            axes.set_visible(False)
        for axes, step in zip(row, times, strict=False):
            axes.imshow(1 - pictures[step].float().numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_title(f"{float(chances[step, label]):.2f}", fontsize=7, pad=2)
            axes.spines[:].set(color=RIGHT if named[step] == label else WRONG, linewidth=1.5)
    halves[0].supxlabel("sights of a class; above each: the chance given to its label", fontsize=8)
    if trace is not None:
        order = [step for times in places for step in times]
        # The step after a picture sees its label; the last picture's label is never shown.
        wrote = [step + 1 for step in order if step + 1 < steps]
        axes = halves[1].subplots()
        image = heat(axes, read_from(trace)[order][:, wrote].numpy(), cmap="magma", vmin=0.0)
        edges = torch.tensor([len(times) for times in places]).cumsum(0)[:-1] - 0.5
        late = torch.tensor([sum(s + 1 < steps for s in times) for times in places])
        for edge, column in zip(edges, late.cumsum(0)[:-1] - 0.5, strict=True):
            axes.axhline(float(edge), color="white", linewidth=0.5)
            axes.axvline(float(column), color="white", linewidth=0.5)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel("picture to name, by class", fontsize=8)
        axes.set_xlabel("what was written as a label came, by that label", fontsize=8)
        axes.set_title("how much of it is read", loc="left", fontsize=9)
        colour_bar(image, axes, pad=0.01, fraction=0.04, aspect=20)
    return figure
