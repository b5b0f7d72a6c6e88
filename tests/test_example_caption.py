"""examples/caption.py: its scenes are what their captions say, and it trains, writes and draws."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_modules import load_example


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("caption", "rich", "matplotlib")


@pytest.mark.parametrize(
    ("a", "b", "word"), [(0, 10, "above"), (4, 20, "above"), (0, 2, "left of"), (0, 5, "."),
                         (0, 1, "."), (11, 14, "left of"), (2, 9, ".")],
)  # fmt: skip
def test_relations(example: ModuleType, a: int, b: int, word: str) -> None:
    assert example.WORDS[example.relation(a, b)] == word


def test_layouts_are_apart_and_say_what_is_true(example: ModuleType) -> None:
    tables = example.layouts()
    assert len(tables) == 6  # one or two of two words
    for words, table in tables.items():
        for places in table[:: max(1, len(table) // 20)].tolist():
            here = [place for place in places if place >= 0]
            assert len(here) == 3 - (words[1] == example.END)
            said = [example.relation(a, b) for a, b in itertools.pairwise(here)]
            assert tuple(said) == words[: len(said)]
            assert all(example.far(a, b) for a in here for b in here if a < b)


def test_scenes_show_the_digits_that_their_captions_name(example: ModuleType) -> None:
    painter = example.Painter(example.HELD_OUT)
    assert (painter.digits.flatten(2).amax(-1) > 0.5).all()
    scenes = painter.scenes(64, torch.Generator().manual_seed(1))
    assert set(scenes.lengths.tolist()) == {4, 6}
    digits = painter.digits.flatten(0, 1)
    windows = scenes.canvas.unfold(1, example.DIGIT, example.STRIDE)
    windows = windows.unfold(2, example.DIGIT, example.STRIDE)
    for window, words, length in zip(windows, scenes.words, scenes.lengths, strict=True):
        same = (window[:, :, None] == digits).flatten(-2).all(-1).flatten(0, 1)  # [places, digits]
        for word in words[: length - 1 : 2]:
            kinds = same.any(0).view(10, -1)
            assert kinds[word].any()
        assert (words[length - 1 :] == example.END).all()
        assert (words[1 : length - 1 : 2] >= example.ABOVE).all()


@pytest.mark.slow
def test_a_few_steps_train_write_and_draw(
    example: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    restored_threads: None,
) -> None:
    out, report = tmp_path / "caption.png", tmp_path / "caption.json"
    arguments = ["--seeds", "1", "--steps", "4", "--json", str(report), "--out", str(out)]
    found = example.main(arguments)
    assert list(found) == list(example.KINDS) and all(len(some) == 1 for some in found.values())
    assert json.loads(report.read_text())["captions_right"] == found
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "soft attention" in capsys.readouterr().out
