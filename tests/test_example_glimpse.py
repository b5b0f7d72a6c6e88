"""The scenes are what they say, and looking where the policy says pays."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

PATH = Path(__file__).parents[1] / "examples" / "glimpse.py"
if not PATH.is_file():
    pytest.skip("the examples are not beside these tests", allow_module_level=True)
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_glimpse", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_glimpse_at_the_right_place_is_the_digit(example: ModuleType) -> None:
    training, held_out = example.Digits.load()
    assert len(training.images) + len(held_out.images) == 1797
    canvas, label, place = held_out.scenes(64, torch.Generator().manual_seed(1))
    patches = example.glimpse(canvas, place)
    matches = (patches[:, None] == held_out.images.flatten(1)).all(-1)  # [64, n]
    assert matches.any(-1).all()
    assert torch.equal(held_out.labels[matches.float().argmax(-1)], label)
    for number in (0, 63):
        row, column = divmod(int(place[number]), example.PLACES_A_SIDE)
        top, left = row * example.STRIDE, column * example.STRIDE
        direct = canvas[number, top : top + example.DIGIT, left : left + example.DIGIT]
        assert torch.equal(direct.flatten(), patches[number])
    others = canvas.sum((1, 2)) - patches.sum(1)
    assert (others > 0).all()  # there is clutter


@pytest.mark.slow
def test_a_short_training_beats_random_glimpses(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "SEEDS", 1)
    out = tmp_path / "glimpse.png"
    found = example.main(["--steps", "300", "--out", str(out)])
    [[random], [learnt]] = found.values()
    assert 0.1 < random < 0.3
    assert learnt > random + 0.2
    assert out.read_bytes().startswith(b"\x89PNG")
