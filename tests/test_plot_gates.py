"""plot.gates: what is in the figure, not how its pixels fall."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import seqmem_fast
from seqmem_fast import plot

pytest.importorskip("matplotlib")

T, B, H = 7, 3, 5


def traced(batch_first: bool = False, unbatched: bool = False) -> seqmem_fast.LSTMGates:
    torch.manual_seed(1)
    lstm = seqmem_fast.LSTM(4, H, num_layers=2, batch_first=batch_first)
    shape = (T, 4) if unbatched else (B, T, 4) if batch_first else (T, B, 4)
    gates: seqmem_fast.LSTMGates = lstm(torch.randn(shape), return_gates=True)[2]
    return gates


def images(figure: Any) -> list[Tensor]:
    """What each panel shows, [units, T]."""
    shown = [axes.images[0] for axes in figure.axes if axes.images]
    return [torch.from_numpy(image.get_array().data.copy()) for image in shown]


def test_panels_hold_the_gates_of_the_chosen_units() -> None:
    gates = traced()
    figure = plot.gates(gates, layer=1, batch=2, units=[3, 0])
    found = images(figure)
    assert len(found) == 4
    for name, image in zip("ifoc", found, strict=True):
        assert torch.equal(image, getattr(gates, name)[1, :, 2][:, [3, 0]].detach().t())


def test_layouts_agree() -> None:
    gates = traced()
    transposed = seqmem_fast.LSTMGates(*(each.transpose(1, 2) for each in gates))
    single = seqmem_fast.LSTMGates(*(each[:, :, 1] for each in gates))
    wanted = images(plot.gates(gates, batch=1))
    for other in (plot.gates(transposed, batch=1, batch_first=True), plot.gates(single)):
        assert all(torch.equal(a, b) for a, b in zip(wanted, images(other), strict=True))


def test_gates_share_a_scale_and_signed_panels_are_symmetric() -> None:
    figure = plot.gates(traced(), show="ifogc")
    limits = [axes.images[0].get_clim() for axes in figure.axes if axes.images]
    assert limits[:3] == [(0, 1)] * 3
    assert all(low == -high for low, high in limits[3:])


def test_characters_label_the_steps_and_blanks_are_visible() -> None:
    axes = plot.gates(traced(), text="ab c\nde", show="i").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == list("ab␣c↵de")


def test_units_are_labelled_by_their_number() -> None:
    axes = plot.gates(traced(), units=[4, 1], show="c").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["4", "1"]


def test_the_liveliest_units_come_in_the_order_of_their_peaks() -> None:
    cells = torch.zeros(T, H)
    cells[5, 1], cells[2, 4], cells[3, 0] = 3.0, -4.0, 0.1
    assert plot.liveliest(cells, 2) == [4, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 2}, "layer below 2, got 2"),
        ({"batch": 3}, "batch below 3, got 3"),
        ({"units": [5]}, "units from 0 to 4"),
        ({"units": [-1]}, "units from 0 to 4"),
        ({"units": 0}, "units from 0 to 4"),
        ({"text": "short"}, "text of 7 steps, got 5"),
        ({"show": "ix"}, "made of 'ifgoc'"),
        ({"show": ""}, "made of 'ifgoc'"),
    ],
)
def test_wrong_choices_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.gates(traced(), **options)


def test_flat_gates_are_refused() -> None:
    flat = seqmem_fast.LSTMGates(*[torch.zeros(T, H)] * 5)
    with pytest.raises(ValueError, match="3 or 4 dimensions, got 2"):
        plot.gates(flat)


def test_without_matplotlib_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot.gates(traced())


def test_it_is_found_from_the_top() -> None:
    assert seqmem_fast.plot is plot
