"""The harness that trains the NTM paper's tasks seed by seed, on small networks."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from seqmem_fast.tasks import TASKS, Score
from seqmem_fast.tasks.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks" / "__main__.py").is_file():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)
sys.path.append(str(ROOT))  # last, so that an installed seqmem_fast stays the one tested

from benchmarks.harness import machine  # noqa: E402
from benchmarks.studies import ntm_tasks  # noqa: E402

TINY = {"controller_size": 8, "memory_size": 6, "memory_dim": 4, "steps": 4}


def test_every_seed_is_trained_judged_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(ntm_tasks, "SEQUENCES", 8)
    monkeypatch.setattr(ntm_tasks, "LARGER", 2)
    monkeypatch.setattr(ntm_tasks, "standard", functools.partial(Settings, **TINY))
    path = tmp_path / "kept.json"
    arguments = ["associative_recall", "--seeds", "3", "4", "--json", str(path)]
    assert ntm_tasks.main(arguments) == 0
    assert "0 of 2 seeds within 600 s" in capsys.readouterr().out
    kept = json.loads(path.read_text())
    assert [run["seed"] for run in kept["runs"]] == [3, 4]
    for run in kept["runs"]:
        assert run["steps"] == 4 and run["learnt_at"] is None and run["reached"] is False
        assert next(iter(run["scores"])) == ntm_tasks.TRAINED and "20 items" in run["scores"]
        assert 0 < run["training_s"] < run["seconds"]
    assert (tmp_path / "ntm_associative_recall.png").is_file()


@pytest.mark.parametrize("task", ntm_tasks.BARS)
def test_a_bar_is_of_sizes_that_are_measured(task: str) -> None:
    measured = {ntm_tasks.TRAINED, *(probe.label for probe in TASKS[task]().probes())}
    assert {size for size, _, _ in ntm_tasks.BARS[task]} <= measured


def test_a_bar_names_the_sizes_and_the_figure_it_asks_for() -> None:
    def scored(here: float, at_40: float) -> dict[str, Score]:
        both = {ntm_tasks.TRAINED: here, "length 40": at_40}
        return {size: Score(wrong, 0.0, 1.0, None, {}) for size, wrong in both.items()}

    assert ntm_tasks.passes("copy", scored(0.009, 0.9)) is True
    assert ntm_tasks.passes("copy", scored(0.01, 0.9)) is False
    assert ntm_tasks.passes("copy", scored(0.0, 1.0)) is False
    assert ntm_tasks.passes("priority_sort", {}) is None
