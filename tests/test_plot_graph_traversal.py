"""plot.graph_traversal: what is in the figure, not how its pixels fall."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pictures import check_drawn, trained

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

from seqmem_fast import plot
from seqmem_fast.plot.graph_traversal import looked_at
from seqmem_fast.plot.one_shot import RIGHT, WRONG
from seqmem_fast.tasks.model import BUILDERS

EDGES = [("B", "2", "A"), ("A", "1", "B"), ("A", "2", "C")]
WALKS = [[EDGES[1], EDGES[0]], [EDGES[2]]]
SAID = ["B", "C", "C"]


def test_reads_are_told_apart_by_what_wrote_them() -> None:
    writes, reads = torch.zeros(5, 1, 4), torch.zeros(5, 2, 4)
    for step, slot in enumerate((2, 0, 3)):
        writes[step, 0, slot] = 1
    reads[3, :, 0] = 1
    reads[4, 0, 2] = reads[4, 1, 3] = 1
    assert looked_at(writes, reads, 3).tolist() == [[0, 1, 0], [0.5, 0, 0.5]]


@pytest.mark.parametrize("seen", [True, False])
def test_the_figure_holds_what_it_says(seen: bool) -> None:
    looked = torch.rand(3, 3) if seen else None
    figure = plot.graph_traversal(EDGES, WALKS, SAID, looked, title="a walk")
    axes = figure.axes[0]
    held = torch.from_numpy(axes.images[0].get_array().filled(0).copy())
    expected = torch.zeros(3, 3) if looked is None else looked[:, [1, 2, 0]].t()
    assert torch.equal(held, expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "A, 1: B",
        "A, 2: C",
        "B, 2: A",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["A, 1", "2", "A, 2"]
    frames = [(patch.get_xy(), to_hex(patch.get_edgecolor())) for patch in axes.patches]
    assert frames == [((-0.5, -0.5), RIGHT), ((0.5, 1.5), WRONG), ((1.5, 0.5), RIGHT)]
    assert [text.get_text() for text in axes.texts] == SAID


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="expected 3 answers, got 2"):
        plot.graph_traversal(EDGES, WALKS, SAID[:2])
    with pytest.raises(ValueError, match=r"along edges, got \('B', '1', 'A'\)"):
        plot.graph_traversal(EDGES, [[("B", "1", "A")]], ["A"])
    with pytest.raises(ValueError, match=r"expected looked of shape \[3, 3\], got \[2, 3\]"):
        plot.graph_traversal(EDGES, WALKS, SAID, torch.zeros(2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(BUILDERS))
def test_the_command_draws_a_walk(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = trained("graph_traversal", model, tmp_path)
    for place in (0, 1):
        check_drawn(
            "graph_traversal", tmp_path / f"{place}.png", kept, f"--map={place}", "--path=2"
        )
    assert "wrong answers" in capsys.readouterr().out
