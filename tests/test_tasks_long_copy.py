"""Long copy: the task by hand, attention to a window and to all steps, and the picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from seqmem_fast import cli, tasks
from seqmem_fast.tasks import display, evaluate
from seqmem_fast.tasks.model import AttentionModel
from seqmem_fast.tasks.settings import standard
from seqmem_fast.tasks.training import Training

TINY = {"controller_size": 8, "read_heads": 2, "memory_size": 4, "batch_size": 3, "steps": 6}


@pytest.fixture(autouse=True)
def one_thread(restored_threads: None) -> None:
    """Tiny networks on two threads do little but wait for each other."""
    torch.set_num_threads(1)


def test_by_hand() -> None:
    task = tasks.LongCopyTask(symbols=5, delays=3, length=9)
    batch = task.batch(40, torch.Generator().manual_seed(0), length=12)
    assert batch.input.shape == (13, 40, 8) and batch.lengths.tolist() == [13] * 40
    delays = set()
    for row in range(40):
        header, *text = batch.input[:, row].argmax(1).tolist()
        delay = header - 5 + 1
        delays.add(delay)
        assert batch.mask[:, row].tolist() == [0] * (1 + delay) + [1] * (12 - delay)
        assert batch.target[1 + delay :, row].argmax(1).tolist() == text[: 12 - delay]
        assert not batch.target[: 1 + delay, row].any()
    assert delays == {1, 2, 3}
    assert task.in_words(batch)[0] in "123" and len(task.in_words(batch)) == 13
    assert task.further(batch.target, batch)["right"].tolist() == [1.0] * 40
    assert [probe.size["length"] for probe in tasks.LongCopyTask().probes()] == [32, 64, 1024, 8192]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"symbols": 1}, "symbols from 2, got 1"),
        ({"delays": 0}, "delays from 1, got 0"),
        ({"delays": 4, "length": 4}, "length from 5, got 4"),
    ],
)
def test_wrong_sizes(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.LongCopyTask(**sizes)


def test_a_window_as_long_as_the_text_is_dense_attention() -> None:
    chosen = standard("long_copy").with_changes(sizes={"length": 20}, **TINY)
    batch = chosen.build_task().batch(2, torch.Generator().manual_seed(0), length=20)
    made = [Training(chosen.with_changes(model=m, memory_size=32)).model for m in ("band", "dense")]
    assert all(isinstance(model, AttentionModel) for model in made)
    made[1].load_state_dict(made[0].state_dict())
    torch.testing.assert_close(made[0](batch.input), made[1](batch.input))
    assert isinstance(made[0], AttentionModel)
    logits, weights = made[0].trace(batch.input)
    torch.testing.assert_close(logits, made[0](batch.input))
    assert [w.band.shape for w in weights] == [(2, 2, 21, 32)] * 2


def test_what_is_beyond_the_window_changes_nothing_but_the_header_does() -> None:
    chosen = standard("long_copy").with_changes(sizes={"length": 30}, num_layers=1, **TINY)
    model = Training(chosen).model
    batch = chosen.build_task().batch(1, torch.Generator().manual_seed(0), length=30)
    with torch.no_grad():
        expected = model(batch.input)
        other = batch.input.clone()
        other[5] = other[5].roll(1)
        changed = (model(other) != expected).flatten(1).any(1).nonzero().flatten().tolist()
        assert changed == [5, 6, 7, 8]
        other = batch.input.clone()
        other[0] = other[0].roll(1)
        assert (model(other) != expected).flatten(1).any(1).all()


def test_the_command_draws_what_was_trained(tmp_path: Path) -> None:
    kept, out = f"--checkpoint={tmp_path / 'kept'}", tmp_path / "picture.png"
    tiny = ["--sequences=1", *(f"--{k.replace('_', '-')}={v}" for k, v in TINY.items())]
    for model in ("band", "dense", "ntm", "dnc", "mann"):
        more = ["--restart", f"--model={model}"]
        assert cli.main(["train", "long_copy", kept, *tiny, *more]) == 0
        assert cli.main(["plot", "long_copy", kept, "--length=9", f"--out={out}"]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_short_text_teaches_a_long_one() -> None:
    training = Training(standard("long_copy").with_changes(steps=320))
    while training.step_count < training.last_step:
        training.step()
    score = evaluate(
        training.model, training.task, {"length": 4096}, 2, display.EVALUATION_SEED, batch_size=2
    )
    assert score.further["right"] > 0.99
