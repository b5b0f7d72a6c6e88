"""The scenes are what they say, and looking where the policy says pays."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_modules import load_example


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("glimpse", "rich", "matplotlib", "sklearn")


@pytest.mark.slow
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
