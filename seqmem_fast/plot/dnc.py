"""A DNC at work on a sequence: what it used, freed, wrote and read, and what followed what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import DNCTrace
from .common import (
    CHANNEL,
    SLOT,
    STEP,
    Panel,
    answer_panels,
    check_shapes,
    colour_bar,
    draw_panels,
    heat,
    height_of_all,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 24  # slots that are all shown, in rows high enough to be read
USED = 0.05  # among many, a slot that no head ever gives more is not worth a row
GATE, ROW = 0.13, 0.1  # inches
LINKS = 1.7  # inches: the side of a link matrix


def used_slots(trace: DNCTrace) -> list[int]:
    """Those that some head wrote to or read from; all of a few, or where none was."""
    slots = trace.usage.shape[-1]
    weightings = torch.cat((trace.write_weights, trace.read_weights), 1)
    used = (weightings > USED).any(0).any(0).nonzero().flatten().tolist()
    return list(range(slots)) if slots <= FEW or not used else used


def dnc(
    trace: DNCTrace,
    *,
    input: Tensor | None = None,
    output: Tensor | None = None,
    target: Tensor | None = None,
    mask: Tensor | None = None,
    links: Tensor | None = None,
    links_at: Sequence[int] = (),
    title: str | None = None,
) -> Figure:
    """One sequence, time across, as the DNC paper's extended figure 1; then the links.

    Panels: input, output and error where given; how far each slot is in use; the allocation gate
    (does the write go to a free slot, or to what content finds?), the write gate and the free gate
    of each read head (may what it has just read be written over?); the weighting of each head over
    the slots; the mode of each read head (backward and forward along the links, or by content); and
    a matrix for each step of links_at, bright at [i, j] where slot i was written right after j.

    Args:
        trace: of one sequence: usage [T, N], write_weights [T, W, N], ..., as an unbatched
            `DNC(..., return_trace=True)` gives it.
        input: [T, I], or None.
        output, target, mask: [T, O], [T, O], [T] as in `plot.ntm`, all with input; or None.
        links: [len(links_at), W, N, N], as an unbatched `DNC(..., links_at=...)` gives them.
        links_at: the steps that they are from.
        title: above the picture.

    Returns:
        A matplotlib Figure; `figure.savefig("dnc.png")` keeps it.

    Raises:
        ValueError: tensors that do not fit each other.
        ImportError: matplotlib is not installed.
    """
    panels = _checked(trace, input, output, target, mask, links, links_at)
    slots = used_slots(trace)
    panels += _panels(trace, slots)
    width = max(6.0, 1.7 + STEP * len(trace.usage))
    height = height_of_all(panels)
    squares = 0.0 if links is None else links.shape[1] * (LINKS + 0.4) * bool(links_at)
    above: Any = new_figure(width, height + squares, title)
    figure: Figure = above
    if links is not None and squares:
        above, below = above.subfigures(2, 1, height_ratios=[height, squares])
        _draw_links(below, links[..., slots, :][..., slots], links_at, slots)
    draw_panels(above, panels)
    return figure


def _draw_links(figure: Any, links: Tensor, links_at: Sequence[int], slots: list[int]) -> None:
    heads = links.shape[1]
    grid = figure.subplots(heads, len(links_at), squeeze=False)
    some = range(0, len(slots), max(1, len(slots) // 5))
    named = [str(slots[row]) for row in some]
    for at, axes in enumerate(grid.flat):
        h, k = divmod(at, len(links_at))
        shown = links[k, h].detach().to("cpu", torch.float32).numpy()
        image = heat(axes, shown, cmap="magma", vmin=0, vmax=1)
        axes.set_aspect("equal")
        axes.set_title(f"links{_of(h, heads)} after step {links_at[k]}", loc="left", fontsize=9)
        axes.set_xticks(some, named, fontsize=7)
        axes.set_yticks(some, named, fontsize=7)
    grid[-1, 0].set_xlabel("slot written before", fontsize=8)
    grid[-1, 0].set_ylabel("slot written after", fontsize=8)
    colour_bar(image, grid.ravel().tolist(), pad=0.01, fraction=0.03, aspect=10)


def _of(head: int, heads: int) -> str:
    """A head's number where there are several."""
    return f" {head}" if heads > 1 else ""


def _panels(trace: DNCTrace, slots: list[int]) -> list[Panel]:
    writes, reads = trace.write_weights.shape[1], trace.read_weights.shape[1]
    rows = [str(slot) for slot in slots]
    row = ROW if trace.usage.shape[-1] <= FEW else SLOT
    gates = [f"allocation{_of(h, writes)}" for h in range(writes)]
    gates += [f"write{_of(h, writes)}" for h in range(writes)]
    gates += [f"free{_of(r, reads)}" for r in range(reads)]
    values = torch.cat((trace.allocation_gates, trace.write_gates, trace.free_gates), 1)
    panels = [
        Panel("usage", trace.usage[:, slots], row, rows, "slot"),
        Panel("gates", values, GATE, gates, ""),
    ]
    for name, weights, heads in (
        ("write weighting", trace.write_weights, writes),
        ("read weighting", trace.read_weights, reads),
    ):
        panels += [
            Panel(f"{name}{_of(h, heads)}", weights[:, h, slots], row, rows, "slot")
            for h in range(heads)
        ]
    if trace.read_modes.shape[-1]:
        modes = [f"backward{_of(h, writes)}" for h in range(writes)]
        modes += ["content", *(f"forward{_of(h, writes)}" for h in range(writes))]
        panels += [
            Panel(f"read mode{_of(r, reads)}", trace.read_modes[:, r], GATE, modes, "")
            for r in range(reads)
        ]
    return panels


def _checked(
    trace: DNCTrace,
    input: Tensor | None,
    output: Tensor | None,
    target: Tensor | None,
    mask: Tensor | None,
    links: Tensor | None,
    links_at: Sequence[int],
) -> list[Panel]:
    """The panels of the task, after a look at all shapes."""
    if trace.usage.dim() != 2:
        raise ValueError(
            f"plot.dnc: expected usage of shape [T, N], got {list(trace.usage.shape)}; "
            "draw one row of a batch"
        )
    steps, slots = trace.usage.shape
    writes, reads = trace.write_weights.shape[1], trace.read_weights.shape[1]
    expected: dict[str, tuple[int, ...]] = {
        "write_weights": (steps, writes, slots),
        "read_weights": (steps, reads, slots),
        "allocation_gates": (steps, writes),
        "write_gates": (steps, writes),
        "free_gates": (steps, reads),
        "read_modes": (steps, reads, trace.read_modes.shape[-1]),
    }
    found = {name: getattr(trace, name) for name in expected}
    if links is not None:
        found["links"], expected["links"] = links, (len(links_at), writes, slots, slots)
    if input is not None:
        found["input"], expected["input"] = input, (steps, input.shape[-1])
    together = output, target, mask
    if any(each is not None for each in together):
        if input is None or output is None or target is None or mask is None:
            raise ValueError("plot.dnc: expected input, output, target and mask together")
        channels = target.shape[-1]
        found |= {"output": output, "target": target, "mask": mask}
        expected |= {"output": (steps, channels), "target": (steps, channels), "mask": (steps,)}
        check_shapes("dnc", found, expected)
        return answer_panels(input, output, target, mask)
    check_shapes("dnc", found, expected)
    return [] if input is None else [Panel("input", input, CHANNEL)]
