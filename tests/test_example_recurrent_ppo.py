"""Both ways of the same training stay together, and the picture is drawn."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from example_modules import load_example


@pytest.mark.slow
def test_both_ways_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load_example("recurrent_ppo", "rich", "matplotlib", "sb3_contrib")
    monkeypatch.setattr(example, "HIDDEN", 8)
    monkeypatch.setattr(example, "ROLLOUT", 32)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a training leaves its logs' folder
    out = tmp_path / "ppo.png"
    options = ["--steps", "128", "--envs", "2", "--threads", str(torch.get_num_threads())]
    plain, ours = example.main([*options, "--out", str(out)])
    for learner in (plain, ours):
        assert learner.model.num_timesteps == 128
        assert learner.model.observation_space.shape == (2,)
        assert 1 <= learner.examine(1) <= 500
    assert [(steps, reward) for steps, _, reward in ours.curve] == [
        (steps, reward) for steps, _, reward in plain.curve
    ]
    assert len(ours.curve) >= 1
    assert out.read_bytes().startswith(b"\x89PNG")
