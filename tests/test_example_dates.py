"""examples/dates.py: its generator, its pieces, and that a short training learns."""

from __future__ import annotations

import datetime
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_modules import load_example


@pytest.fixture(scope="module")
def dates() -> ModuleType:
    return load_example("dates", "rich")


def test_every_form_of_one_date(dates: ModuleType) -> None:
    date = datetime.date(1998, 3, 3)
    written = {form(date, "Mar") for form in dates.FORMS}
    assert len(written) == len(dates.FORMS)
    assert {"3rd of Mar 1998", "Mar 3rd, '98", "03.03.1998", "Tuesday, 3 Mar 1998"} <= written
    assert {text for form in dates.FORMS for text in form(date, "Mar").lower()} <= set(dates.SOURCE)


@pytest.mark.parametrize(
    ("day", "text"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (13, "13th"),
     (21, "21st"), (22, "22nd"), (30, "30th"), (31, "31st")],
)  # fmt: skip
def test_ordinals(dates: ModuleType, day: int, text: str) -> None:
    assert dates.ordinal(day) == text


def test_no_text_has_two_meanings(dates: ModuleType) -> None:
    rng = random.Random(0)
    meaning: dict[str, str] = {}
    for text, answer in (dates.draw(rng) for _ in range(20000)):
        assert meaning.setdefault(text, answer) == answer


def test_padding_changes_nothing(dates: ModuleType) -> None:
    torch.manual_seed(0)
    model = dates.Translator(width=16)
    texts = ["3/3/1998", "the 3rd of March, 1998"]
    together, weights = model(*dates.encode(texts))
    alone, _ = model(*dates.encode(texts[:1]))
    torch.testing.assert_close(together[:1], alone)
    assert not weights[0, :, len(texts[0]) :].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, dates.LENGTH))


@pytest.mark.slow
def test_a_short_training_learns_and_draws(
    dates: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    restored_threads: None,
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "alignment.png"
    torch.set_num_threads(1)
    options = ["--steps", "80", "--batch", "32", "--text", "May 5, 55", "--out", str(out)]
    found = dates.main(options)
    assert found["first_loss"] > 2.2 and found["last_loss"] < 1.0  # dashes, decades, some months
    assert 0 <= found["accuracy"] <= 1
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "of 2,000 fresh dates" in capsys.readouterr().out


@pytest.mark.slow
def test_two_normalizers_side_by_side(
    dates: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], restored_threads: None
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "alignment.png"
    torch.set_num_threads(1)
    options = ["--steps", "2", "--batch", "8", "--normalizer", "sparsemax", "--out", str(out)]
    dates.main(options)
    said = capsys.readouterr().out
    assert "softmax: 0.0% of the weights are exactly 0" in said and "sparsemax: " in said
    assert out.read_bytes().startswith(b"\x89PNG")


def test_weights_are_exact_zeros(dates: ModuleType) -> None:
    torch.manual_seed(0)
    model = dates.Translator(width=16, normalizer="sparsemax")
    with torch.no_grad():
        model.attention.query.weight.mul_(50)
    _, weights = model(*dates.encode(["3/3/1998", "the 3rd of March, 1998"]))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, dates.LENGTH))
    assert (weights[1] == 0).double().mean() > 0.3
    assert dates.zeros(model, 20) > 0.1


def test_strange_characters_are_named(
    dates: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        dates.main(["--text", "3. März 1998"])
    assert "ä" in capsys.readouterr().err
