"""An NTM at work on a sequence: what it saw and said, and where its heads were."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .common import (
    SLOT,
    STEP,
    Panel,
    answer_panels,
    check_shapes,
    draw_panels,
    height_of_all,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS = {"w": "write weighting", "r": "read weighting"}
USED = 0.02  # a slot that no head gives more is not worth a row


def used_slots(weightings: Tensor, margin: int = 2) -> list[int]:
    """The shortest run of slots, round the end if need be, that holds all that any head used.

    weightings [..., N] -> slots in order, with a few unused ones on both sides.
    """
    slots = weightings.shape[-1]
    used = (weightings.reshape(-1, slots) > USED).any(0).nonzero().flatten().tolist()
    if not used:
        return list(range(slots))
    after = [*used[1:], used[0] + slots]
    gaps = [second - first for first, second in zip(used, after, strict=True)]
    widest = max(range(len(gaps)), key=gaps.__getitem__)
    first = after[widest] % slots - margin
    count = min(slots, slots - gaps[widest] + 1 + 2 * margin)
    return [(first + k) % slots for k in range(count)]


def ntm(
    input: Tensor,
    output: Tensor,
    target: Tensor,
    mask: Tensor,
    weightings: Tensor | None = None,
    *,
    heads: str = "wr",
    title: str | None = None,
) -> Figure:
    """One sequence of an algorithmic task, time across: the NTM paper's figures 4 to 6 in one.

    Panels: the input; the output; its distance from the target, where the target counts; and the
    weighting of each head over the slots. A head that walks through the memory step by step draws
    a diagonal, and one that reads what was written draws the same diagonal later.

    Args:
        input: [T, I].
        output: [T, O], chances from 0 to 1.
        target: [T, O] of 0 and 1.
        mask: [T], 1 where the target counts; the output is shown there alone.
        weightings: [T, Hd, N] as `NTM(..., return_weightings=True)` gives them; None for a network
            without heads. Only slots in use are shown.
        heads: what each of the Hd heads does, as the NTM was built.
        title: above the picture.

    Returns:
        A matplotlib Figure; `figure.savefig("ntm.png")` keeps it.

    Raises:
        ValueError: tensors that do not fit each other.
        ImportError: matplotlib is not installed.
    """
    steps, channels = target.shape
    expected = {"input": (steps, input.shape[-1]), "output": (steps, channels), "mask": (steps,)}
    found = {"input": input, "output": output, "mask": mask}
    if weightings is not None:
        expected["weightings"] = (steps, len(heads), weightings.shape[-1])
        found["weightings"] = weightings
    check_shapes("ntm", found, expected)
    panels = answer_panels(input, output, target, mask)
    if weightings is not None:
        slots = used_slots(weightings)
        rows = [str(slot) for slot in slots]
        panels += [
            Panel(HEADS[kind], weightings[:, head, slots], SLOT, rows, "slot")
            for head, kind in enumerate(heads)
        ]
    figure = new_figure(max(5.0, 1.5 + STEP * steps), height_of_all(panels), title)
    draw_panels(figure, panels)
    return figure
