"""One-shot classification: the letters, the episodes and what their score says."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")

from seqmem_fast import cli, tasks
from seqmem_fast.tasks import glyphs
from seqmem_fast.tasks.one_shot import sights

SIDE, LETTERS = 10, 60


@pytest.fixture(scope="module")
def task() -> tasks.OneShotTask:
    return tasks.OneShotTask(classes=3, images=4, side=SIDE, letters=LETTERS)


@pytest.fixture(scope="module")
def known() -> glyphs.Glyphs:
    return glyphs.load(SIDE, LETTERS)


def test_training_and_test_share_no_letter(known: glyphs.Glyphs) -> None:
    train, test = ({known.letters[k] for k in part} for part in (known.train, known.test))
    assert train and test and not train & test
    assert len(known.train) + len(known.test) == len(known.letters) == len(known.pictures)


def test_letters_that_look_alike_are_one_class() -> None:
    shapes = glyphs.load(20, 60).letters
    counts = {letter: shapes.count(letter) for letter in "AFHIXbdpqnu"}
    assert counts["A"] == counts["H"] == counts["I"] == counts["X"] == 2  # as of their symmetry
    turned = {counts[pair[0]] + counts[pair[1]] for pair in ("dp", "bq", "un")}
    assert turned <= {2, 3, 4}  # one turned by half is the other
    assert len(shapes) < 4 * len(set(shapes))


def test_letters_fill_the_picture_in_ten_styles_or_more(known: glyphs.Glyphs) -> None:
    assert known.known.sum(1).min() >= glyphs.LEAST_STYLES
    inked = known.pictures.flatten(2).any(2)
    assert torch.equal(inked, known.known)
    most = glyphs.MARGIN
    assert known.pictures.shape[2:] == (SIDE + 2 * most,) * 2
    inner = known.pictures[..., 2 * most - 1 : -2 * most + 1, 2 * most - 1 : -2 * most + 1]
    assert torch.equal(inner.sum(), known.pictures.sum())


def test_moving_by_hand() -> None:
    most = glyphs.MARGIN
    pictures = torch.zeros(2, 5 + 2 * most, 5 + 2 * most, dtype=torch.uint8)
    pictures[1, 2 + most, 2 + most] = 9
    found = glyphs.moved(pictures, torch.tensor([1, 0, 1]), torch.tensor([0, 1, 2]),
                         torch.tensor([0, 1, -1]))  # fmt: skip
    assert found.shape == (3, 5, 5)
    assert found.nonzero().tolist() == [[0, 2, 2], [2, 4, 1]]


def pictures_of(known: glyphs.Glyphs, classes: Tensor) -> dict[bytes, int]:
    """Every picture that these classes may show, and its class."""
    reach = range(-glyphs.MARGIN, glyphs.MARGIN + 1)
    places = torch.tensor([[down, right] for down in reach for right in reach])
    found = {}
    for one in classes.tolist():
        for style in known.known[one].nonzero().flatten().tolist():
            again = torch.zeros(len(places), dtype=torch.int64)
            shown = glyphs.moved(known.pictures[one, style][None], again, *places.t())
            found |= {picture.numpy().tobytes(): one for picture in shown}
    return found


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_episode_by_hand(part: str, task: tasks.OneShotTask, known: glyphs.Glyphs) -> None:
    draw = task.training_batch if part == "train" else task.batch
    batch = draw(20, torch.Generator().manual_seed(1), images=4)
    steps, rows, width = batch.input.shape
    assert (steps, rows, width) == (12, 20, SIDE * SIDE + 3)
    assert bool((batch.mask == 1).all()) and bool((batch.target.sum(2) == 1).all())
    assert bool((batch.target.sum(0) == 4).all())
    assert torch.equal(batch.input[1:, :, SIDE * SIDE :], batch.target[:-1])
    assert not batch.input[0, :, SIDE * SIDE :].any()
    names = pictures_of(known, getattr(known, part))
    shown = (batch.input[..., : SIDE * SIDE] * 255).round().to(torch.uint8)
    meanings = set()
    for row in range(rows):
        seen = [names[shown[t, row].numpy().tobytes()] for t in range(steps)]
        pairs = set(zip(seen, batch.target[:, row].argmax(1).tolist(), strict=True))
        assert len(pairs) == len(set(seen)) == 3  # each class has a label of its own
        meanings |= pairs
    assert len({one for one, _ in meanings}) < len(meanings)  # which other episodes give to others


def test_a_class_shows_each_style_once_before_one_comes_again() -> None:
    task = tasks.OneShotTask(classes=2, images=20, side=SIDE, letters=LETTERS)
    known = glyphs.load(SIDE, LETTERS)
    batch = task.batch(1, torch.Generator().manual_seed(2), images=20)
    # Brought back to its corner a picture tells its style.
    styles: dict[int, set[bytes]] = {0: set(), 1: set()}
    for picture, label in zip(batch.input[:, 0, : SIDE * SIDE], batch.target[:, 0], strict=True):
        ink = picture.view(SIDE, SIDE)
        down, right = (int(ink.any(axis).nonzero()[0]) for axis in (1, 0))
        styles[int(label.argmax())].add(ink.roll((-down, -right), (0, 1)).numpy().tobytes())
    assert min(map(len, styles.values())) >= glyphs.LEAST_STYLES - 1
    assert known.known.shape[1] == 16


def test_sights_are_counted_by_class() -> None:
    target = torch.eye(2)[[0, 1, 1, 0, 1]].unsqueeze(1)
    assert sights(target)[:, 0].tolist() == [1, 1, 2, 2, 3]


def test_the_score_by_hand(task: tasks.OneShotTask) -> None:
    batch = task.batch(5, torch.Generator().manual_seed(0), images=10)
    right = batch.target * 50
    assert task.wrong(right, batch).tolist() == [0] * 5
    assert task.loss(right, batch) < 1e-6
    assert task.loss(torch.zeros_like(right), batch).item() == pytest.approx(math.log(3))
    assert task.chance == pytest.approx(math.log(3))
    blind = right.clone()
    blind[sights(batch.target) == 1] = 0
    blind[sights(batch.target) == 1] -= right[sights(batch.target) == 1]  # the first sight wrong
    assert task.wrong(blind, batch).tolist() == [3] * 5
    found = task.further(blind, batch)
    assert list(found) == ["1st", "2nd", "5th", "10th"]
    assert [share.tolist() for share in found.values()] == [[0.0] * 5] + [[1.0] * 5] * 3
    short = task.batch(1, torch.Generator(), images=2)
    assert list(task.further(short.target, short)) == ["1st", "2nd"]
    score = tasks.evaluate(lambda x: torch.zeros(*x.shape[:2], 3), task, None, 30, 0)  # type: ignore[arg-type]
    assert score.cost == pytest.approx(12 * math.log2(3), rel=1e-4)
    assert abs(score.wrong_bits - 8) < 1e-6 and score.further["2nd"] < 1


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("rich")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sizes = ["--side=9", "--letters=50"]  # not drawn before
    assert cli.main(["train", "one_shot", f"--checkpoint={tmp_path / 'kept'}", *sizes]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
