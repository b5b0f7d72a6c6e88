"""plot.ntm and `plot copy`: what is in the figure, not how its pixels fall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import check_drawn, panels, shown, trained

pytest.importorskip("matplotlib")

from seqmem_fast import cli, plot
from seqmem_fast.plot.ntm import used_slots
from seqmem_fast.tasks.model import BUILDERS

T, CHANNELS, SLOTS = 6, 3, 10


def case(**changes: Any) -> dict[str, Any]:
    weightings = torch.zeros(T, 2, SLOTS)
    for t in range(T):
        weightings[t, 0, (8 + t) % SLOTS] = 1  # from slot 8 round the end to slot 3
        weightings[t, 1, 9] = 1
    target = (torch.rand(T, CHANNELS) > 0.5).float()
    mask = torch.tensor([0.0, 0, 0, 1, 1, 1])
    return {
        "input": torch.rand(T, CHANNELS + 1),
        "output": torch.rand(T, CHANNELS),
        "target": target,
        "mask": mask,
        "weightings": weightings,
        **changes,
    }


def test_panels_hold_what_they_say() -> None:
    given = case()
    found = panels(plot.ntm(**given, title="copy"))
    assert list(found) == ["input", "output", "error", "write weighting", "read weighting"]
    assert torch.equal(shown(found["input"]), given["input"].t())
    output, error = shown(found["output"]), shown(found["error"])
    assert output[:, :3].isnan().all() and error[:, :3].isnan().all()
    assert torch.equal(output[:, 3:], given["output"][3:].t())
    assert torch.equal(error[:, 3:], (given["output"] - given["target"]).abs()[3:].t())
    slots = used_slots(given["weightings"])
    for head, name in enumerate(("write weighting", "read weighting")):
        assert torch.equal(shown(found[name]), given["weightings"][:, head, slots].t())


def test_only_slots_in_use_are_shown_round_the_end() -> None:
    assert used_slots(case()["weightings"], margin=0) == [8, 9, 0, 1, 2, 3]
    assert used_slots(case()["weightings"], margin=1) == [7, 8, 9, 0, 1, 2, 3, 4]
    assert used_slots(case()["weightings"], margin=5) == [(3 + k) % 10 for k in range(10)]
    assert used_slots(torch.zeros(2, 1, 4)) == [0, 1, 2, 3]
    assert used_slots(torch.eye(3)[:1], margin=0) == [0]


def test_a_network_without_heads_has_three_panels() -> None:
    found = panels(plot.ntm(**case(weightings=None)))
    assert list(found) == ["input", "output", "error"]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("input", (T + 1, 2), r"expected input of shape \[6, 2\], got \[7, 2\]"),
        ("output", (T, 5), r"expected output of shape \[6, 3\], got \[6, 5\]"),
        ("mask", (T, 1), r"expected mask of shape \[6\], got \[6, 1\]"),
        ("weightings", (T, 1, 4), r"expected weightings of shape \[6, 2, 4\], got \[6, 1, 4\]"),
    ],
)
def test_what_does_not_fit_is_named(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.ntm(**case(**{name: torch.zeros(shape)}))


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(BUILDERS))
def test_the_command_draws_a_checkpoint(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = trained("copy", model, tmp_path, "--bits=2", "--max-length=3")
    out = tmp_path / "pictures" / "copy.png"
    check_drawn("copy", out, kept, "--length=4")
    assert f"{out}: " in capsys.readouterr().out
    assert cli.main(["plot", "priority_sort", kept, f"--out={out}"]) == 2
    assert "was trained on copy" in capsys.readouterr().err
    assert cli.main(["plot", "copy", f"--checkpoint={tmp_path / 'none'}"]) == 2
    assert "no checkpoint in" in capsys.readouterr().err
