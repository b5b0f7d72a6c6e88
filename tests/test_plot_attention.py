"""plot.attention: what is in the figure, not how its pixels fall."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from seqmem_fast import ops, plot

pytest.importorskip("matplotlib")

SOURCE, TARGET = ["the", "red", "house"], "ab c"


def weights(*heads: int) -> torch.Tensor:
    return torch.rand(*heads, len(TARGET), len(SOURCE)).softmax(-1)


def panels(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.images]


def test_the_panel_holds_the_weights_with_both_texts() -> None:
    shown = weights().requires_grad_()
    (axes,) = panels(plot.attention(shown, SOURCE, TARGET))
    values = torch.from_numpy(axes.images[0].get_array().data.copy())
    assert torch.equal(values, shown.detach())
    assert [label.get_text() for label in axes.get_xticklabels()] == SOURCE
    assert [label.get_text() for label in axes.get_yticklabels()] == list("ab␣c")
    assert [label.get_rotation() for label in axes.get_xticklabels()] == [90] * 3


def test_heads_stand_side_by_side_on_one_scale() -> None:
    shown = weights(3).to(torch.bfloat16)
    found = panels(plot.attention(shown, SOURCE, TARGET))
    assert [axes.get_xlabel() for axes in found] == ["head 0", "head 1", "head 2"]
    assert {axes.images[0].get_clim() for axes in found} == {(0.0, float(shown.max()))}


@pytest.mark.parametrize("heads", [(), (2,)])
def test_a_band_is_drawn_at_its_keys(heads: tuple[int, ...]) -> None:
    options: dict[str, Any] = {"dilation": 2, "offset": 1}
    q, k = torch.randn(1, 2, 4, 5), torch.randn(1, 2, 9, 5)
    _, band, first = ops.window_attention(q, k, k, 2, 1, global_keys=2, **options)
    wanted = torch.zeros(2, 4, 9)
    for i in range(4):
        for c in range(4):
            if 0 <= (key := 1 + i + 2 * (c - 2)) < 9:
                wanted[:, i, key] += band[0, :, i, c]
    wanted[:, :, :2] += first[0]
    some = (slice(None),) if heads else (0,)
    figure = plot.attention(
        band[0][some], "012345678", "abcd", left=2, global_weights=first[0][some], **options
    )
    for axes, right in zip(panels(figure), wanted[: len(heads) + 1], strict=True):
        torch.testing.assert_close(torch.from_numpy(axes.images[0].get_array().data.copy()), right)


def test_a_band_without_bound_on_the_left() -> None:
    q, k = torch.randn(1, 1, 4, 5), torch.randn(1, 1, 4, 5)
    _, band, _ = ops.window_attention(q, k, k, -1, 0)
    _, dense = ops.attention(q, k, k, is_causal=True)
    (axes,) = panels(plot.attention(band[0, 0], "0123", "abcd", left=-1))
    shown = torch.from_numpy(axes.images[0].get_array().data.copy())
    torch.testing.assert_close(shown, dense[0, 0])


def test_global_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"global_weights of shape \[4, G\] or \[2, 4, G\]"):
        plot.attention(torch.rand(2, 4, 3), "0123", "abcd", left=2, global_weights=torch.rand(3, 4))


def test_it_can_be_saved(tmp_path: Any) -> None:
    path = tmp_path / "picture.png"
    plot.attention(weights(), SOURCE, TARGET, title="where it looks").savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    dollars = ["$", "$$", "$x_{$"]  # no formulas
    figure = plot.attention(weights(), dollars, TARGET)
    figure.savefig(path)
    assert len(panels(figure)[0].get_xticklabels()) == 3


def test_a_title_fits() -> None:
    title = "where it looks, " * 10
    figure = plot.attention(weights(), SOURCE, TARGET, title=title)
    figure.canvas.draw()
    (text,) = [text for text in figure.texts if text.get_text() == title]
    drawn = text.get_window_extent()
    assert drawn.x0 >= 0 and drawn.x1 <= figure.bbox.width


@pytest.mark.parametrize(
    ("shape", "source", "message"),
    [
        ((4,), SOURCE, r"weights of shape .* got \[4\]"),
        ((1, 2, 4, 3), SOURCE, r"weights of shape .* got \[1, 2, 4, 3\]"),
        ((0, 3), SOURCE, r"weights of shape .* got \[0, 3\]"),
        ((4, 2), SOURCE, "expected 2 source_tokens, got 3"),
        ((5, 3), SOURCE, "expected 5 target_tokens, got 4"),
        ((4, 3), "four", "expected 3 source_tokens, got 4"),
    ],
)
def test_what_does_not_fit_is_named(shape: tuple[int, ...], source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.attention(torch.zeros(shape), source, TARGET)


def test_without_matplotlib_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot.attention(weights(), SOURCE, TARGET)
