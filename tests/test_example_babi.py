"""The stories mean what they say, and the example learns from them."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from example_modules import load_example


@pytest.fixture(scope="module")
def babi() -> ModuleType:
    return load_example("babi", "rich", "matplotlib")


def answer(facts: list[str], asked: str, babi: ModuleType) -> str | None:
    """Where it is, told by walking through the story's text."""
    where: dict[str, str] = {}
    carried: dict[str, list[str]] = {name: [] for name in babi.PEOPLE}
    for fact in facts:
        who, *_, what = fact.split()
        if what in babi.PLACES:
            for name in (who, *carried[who]):
                where[name] = what
        elif any(fact.startswith(f"{who} {taking}") for taking in babi.TOOK):
            carried[who].append(what)
            where.pop(what, None)
            if who in where:
                where[what] = where[who]
        else:
            carried[who].remove(what)
    return where.get(asked)


@pytest.mark.parametrize("task", [0, 1])
def test_answers_follow_from_the_supporting_facts(babi: ModuleType, task: int) -> None:
    tell = list(babi.TASKS.values())[task]
    rng = random.Random(0)
    for _ in range(300):
        story = tell(rng, rng.randint(2, babi.MOST_FACTS))
        asked = story.question.split()[-1]
        assert story.answer == answer(story.facts, asked, babi)
        assert len(story.support) == task + 1
        assert asked in story.facts[story.support[0]]
        assert story.facts[story.support[-1]].endswith(story.answer)


def test_stories_become_numbers(babi: ModuleType) -> None:
    story = babi.Story(["Ben picked up the map", "Ben ran to the barn"], "Where is the map", "barn",
                       [0, 1])  # fmt: skip
    short = babi.Story(["Anna ran to the attic"], "Where is Anna", "attic", [0])
    batch = babi.batch_of([story, short])
    assert batch.facts.shape == (2, 2, babi.MOST_WORDS)
    assert batch.lengths.tolist() == [2, 1]
    assert batch.age[0].tolist() == [1, 0]
    assert not batch.facts[1, 1].any()
    assert batch.support.t().tolist() == [[0, 1], [0, 0]]
    told = [babi.WORDS[number - 1] for number in batch.facts[0, 1].tolist() if number]
    assert " ".join(told) == story.facts[1]


def test_a_dnc_is_asked_right_after_each_storys_facts(babi: ModuleType) -> None:
    rng = random.Random(0)
    told = [babi.one_fact_story(rng, length) for length in (2, 5, 3)]
    model = babi.DNCReader(8, 6, 4).eval()
    shown = model.steps(babi.batch_of(told))
    assert shown.shape == (3, 5 + babi.HOPS, 8)
    scores, attention = model(babi.batch_of(told))
    assert attention.shape == (babi.HOPS, 3, 5)
    for row, story in enumerate(told):  # each as if it were read alone
        alone = babi.batch_of([story])
        length = len(story.facts)
        torch.testing.assert_close(shown[row, : length + babi.HOPS], model.steps(alone)[0])
        assert torch.equal(shown[row, length], shown[row, length + 1])
        torch.testing.assert_close(scores[row : row + 1], model(alone)[0])
        torch.testing.assert_close(attention[:, row, :length], model(alone)[1][:, 0])
    loss = torch.nn.functional.cross_entropy(scores, babi.batch_of(told).answer)
    torch.testing.assert_close(model.loss(babi.batch_of(told)), loss)


def test_the_example_runs_with_a_dnc(
    babi: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_threads: Any
) -> None:
    monkeypatch.setattr(babi, "accuracy", functools.partial(babi.accuracy, count=5))
    out = tmp_path / "reads.png"
    found = babi.main(["--model", "dnc", "--steps", "2", "--out", str(out)])
    assert found.keys() == babi.TASKS.keys() and all(0 <= share <= 1 for share in found.values())
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_short_training_learns_the_first_task(
    babi: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], restored_threads: Any
) -> None:
    out = tmp_path / "hops.png"
    found = babi.main(["--steps", "150", "--out", str(out)])
    assert found["one supporting fact"] > 0.5  # a guess is right once in six
    assert found["two supporting facts"] > 0.3
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "Where is" in capsys.readouterr().out
