"""A network that walks along a graph: which of the edges it was told it looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .common import check_shapes, colour_bar, frame, heat, new_figure
from .one_shot import RIGHT, WRONG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Edge = tuple[str, str, str]  # from, by, to
CELL = 0.19  # inches


def looked_at(write_weights: Tensor, read_weights: Tensor, told: int) -> Tensor:
    """How much of what was written at each of the first `told` steps each later read holds.

    [T, W, N] and [T, R, N] -> [T - told, told]; as long as no slot is written twice.
    """
    written = write_weights[:told].sum(1).float()
    return read_weights[told:].mean(1).float() @ written.t()


def graph_traversal(
    edges: Sequence[Edge],
    walks: Sequence[Sequence[Edge]],
    answers: Sequence[str],
    looked: Tensor | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Questions across, the edges of the graph down: a frame where the answer is to be found, green
    where it was named rightly and red where not, and colour where the network looked.

    Args:
        edges: E of them as (from, by, to), in the order told.
        walks: the edges that each question goes along.
        answers: what the network said at each step of all walks, S in all.
        looked: [S, E], how much of each edge was read at each step (:func:`looked_at`); None where
            there is no memory to look into.
        title: above the picture.

    Returns:
        A matplotlib Figure; `figure.savefig("graph.png")` keeps it.

    Raises:
        ValueError: an answer too few or too many, a walk along an unknown edge, `looked` of another
            shape.
        ImportError: matplotlib is not installed.
    """
    from_each = sorted(range(len(edges)), key=lambda k: edges[k])
    row_of = {edges[k]: row for row, k in enumerate(from_each)}
    steps = [edge for walk in walks for edge in walk]
    if len(answers) != len(steps):
        raise ValueError(f"plot.graph_traversal: expected {len(steps)} answers, got {len(answers)}")
    if unknown := set(steps) - set(row_of):
        raise ValueError(f"plot.graph_traversal: expected walks along edges, got {min(unknown)}")
    if looked is None:
        looked = torch.zeros(len(steps), len(edges))
    check_shapes("graph_traversal", {"looked": looked}, {"looked": (len(steps), len(edges))})
    rows = [f"{a}, {by}: {b}" for a, by, b in sorted(edges)]
    columns = [
        f"{a + ', ' if first else ''}{by}" for walk in walks for first, (a, by, _) in _marked(walk)
    ]
    wide, high = (0.07 * max(map(len, texts)) for texts in (rows, columns))
    above = 0.07 * max(map(len, answers))
    size = CELL * len(steps) + wide + 0.8, CELL * len(edges) + high + above + 0.9
    figure = new_figure(*size, title, 10)
    axes = figure.subplots()
    shown = looked.detach().to("cpu", torch.float32)[:, from_each].t().numpy()
    image = heat(axes, shown, cmap="magma", vmin=0, vmax=1)
    for step, (edge, said) in enumerate(zip(steps, answers, strict=True)):
        colour = RIGHT if said == edge[2] else WRONG
        corner = step - 0.5, row_of[edge] - 0.5
        axes.add_patch(frame(corner, colour))
        axes.text(step, -0.8, said, rotation=90, ha="center", va="bottom", fontsize=7, color=colour)
    at = 0
    for walk in walks[:-1]:
        at += len(walk)
        axes.axvline(at - 0.5, color="white", linewidth=1.5)
    axes.set_yticks(range(len(edges)), rows, fontsize=7)
    axes.set_xticks(range(len(steps)), columns, fontsize=7, rotation=90)
    axes.set_xlabel("asked; above: the answers", fontsize=8)
    axes.set_ylabel("told", fontsize=8)
    colour_bar(image, axes, pad=0.01, fraction=0.04, aspect=20)
    return figure


def _marked(walk: Sequence[Edge]) -> list[tuple[bool, Edge]]:
    """Each edge, and whether it is the first, before which the node is named too."""
    return [(place == 0, edge) for place, edge in enumerate(walk)]
