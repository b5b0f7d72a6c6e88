"""plot.one_shot: what is in the figure, not how its pixels fall."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pictures import check_drawn, trained
from torch import Tensor

pytest.importorskip("matplotlib")

from seqmem_fast import plot
from seqmem_fast.plot.one_shot import RIGHT, WRONG, read_from
from seqmem_fast.tasks.model import BUILDERS

T, SIDE, CLASSES, SLOTS = 6, 4, 2, 5
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


class Trace(NamedTuple):
    usage: Tensor
    write_weights: Tensor
    read_weights: Tensor


def trace(heads: int = 2) -> Trace:
    torch.manual_seed(0)
    weights = torch.rand(2, T, heads, SLOTS).softmax(3)
    return Trace(torch.rand(T, SLOTS), *weights)


def test_reads_are_told_apart_by_what_wrote_them() -> None:
    """The matrix times the additions is the read, for additions and erasures as in the memory."""
    given = trace()
    adds = torch.randn(T, 3)
    memory, before = torch.zeros(SLOTS, 3), torch.zeros(SLOTS)
    for t in range(T):
        memory[before.argmin()] = 0
        memory += given.write_weights[t].sum(0)[:, None] * adds[t]
        before = given.usage[t]
        read = given.read_weights[t].mean(0) @ memory
        torch.testing.assert_close(read_from(given)[t] @ adds, read)
    assert not read_from(given).triu(1).any()


@pytest.mark.parametrize("with_trace", [True, False])
def test_panels_hold_what_they_say(with_trace: bool) -> None:
    pictures, chances = torch.rand(T, SIDE, SIDE), torch.rand(T, CLASSES)
    given = trace() if with_trace else None
    figure = plot.one_shot(pictures, chances, LABELS, given, title="an episode")
    shown = [axes for axes in figure.axes if axes.images and axes.get_visible()]
    order = [0, 3, 5, 1, 2, 4]
    for axes, step in zip(shown[:T], order, strict=True):
        held = torch.from_numpy(axes.images[0].get_array().filled(0).copy())
        assert torch.equal(held, 1 - pictures[step])
        right = chances[step].argmax() == LABELS[step]
        assert colour_of(axes) == (RIGHT if right else WRONG)
        assert axes.get_title() == f"{float(chances[step, LABELS[step]]):.2f}"
    if with_trace:
        reads = next(axes for axes in figure.axes if "read" in axes.get_title(loc="left"))
        held = torch.from_numpy(reads.images[0].get_array().filled(0).copy())
        # The last picture, step 5, has its label seen by no step.
        assert torch.equal(held, read_from(trace())[order][:, [1, 4, 2, 3, 5]])


def colour_of(axes: Any) -> str:
    from matplotlib.colors import to_hex

    return to_hex(axes.spines["left"].get_edgecolor())


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected labels of shape \[6\], got \[5\]"):
        plot.one_shot(torch.rand(T, SIDE, SIDE), torch.rand(T, CLASSES), LABELS[1:])


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(BUILDERS))
def test_the_command_draws_an_episode(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--side=8", "--letters=40", "--classes=2", "--images=3"]
    kept = trained("one_shot", model, tmp_path, *sizes)
    check_drawn("one_shot", tmp_path / "one_shot.png", kept)
    assert "wrong answers" in capsys.readouterr().out
