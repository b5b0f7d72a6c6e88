"""Overwriting recall and distant recall: the tasks by hand, the networks with a memory of a fixed
size, their pictures, and the study that trains them seed by seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

from seqmem_fast import cli, plot, tasks
from seqmem_fast.plot.one_shot import RIGHT, WRONG
from seqmem_fast.tasks import checkpoint, display, evaluate, loop
from seqmem_fast.tasks.model import AssociativeModel, CompressiveModel
from seqmem_fast.tasks.model_fixed import COMPRESSIONS
from seqmem_fast.tasks.settings import Settings, standard
from seqmem_fast.tasks.training import Training

ROOT = Path(__file__).resolve().parents[1]
ASSOCIATIVE = ("additive", "window", "delta", "gated_delta")


@pytest.fixture(autouse=True)
def one_thread(restored_threads: None) -> None:
    """Tiny networks on two threads do little but wait for each other."""
    torch.set_num_threads(1)


def settings(task: str, **changes: Any) -> Settings:
    sizes = {
        "overwrite_recall": {"keys": 4, "values": 4, "writes": 8},
        "distant_recall": {"keys": 12, "values": 2, "words": 2, "history": 24, "apart": 2},
    }
    tiny = {"controller_size": 8, "memory_size": 8, "memory_dim": 4, "batch_size": 3, "steps": 6}
    return standard(task).with_changes(sizes=sizes[task], segment=4, **{**tiny, **changes})


def test_overwrite_recall_by_hand() -> None:
    task = tasks.OverwriteRecallTask(keys=3, values=5, writes=6)
    batch = task.batch(40, torch.Generator().manual_seed(0), writes=8)
    assert batch.input.shape == (11, 40, 9)
    assert batch.mask[:, 0].tolist() == [0] * 8 + [1] * 3
    keys, values, asked = task.in_numbers(batch)
    for row in range(40):
        held: dict[int, int] = {}
        for step, shown in enumerate(batch.input[:8, row]):
            key, value = shown.nonzero().flatten().tolist()
            assert (key, value - 3) == (int(keys[row, step]), int(values[row, step]))
            held[key] = value - 3
        assert len(held) == 3
        for step, shown in enumerate(batch.input[8:, row]):
            key, flag = shown.nonzero().flatten().tolist()
            assert (key, flag) == (int(asked[row, step]), 8)
            assert batch.target[8 + step, row].nonzero().flatten().tolist() == [held[key]]
        assert sorted(asked[row].tolist()) == [0, 1, 2]


def test_keys_are_written_at_random() -> None:
    """Which writes are a key's last: the rest of a window is a matter of counting, see the docs."""
    task = tasks.OverwriteRecallTask()
    batch = task.batch(500, torch.Generator().manual_seed(0))
    keys, _, asked = task.in_numbers(batch)
    last = tasks.overwrite_recall.last_writes(keys, asked)
    assert torch.equal(keys.gather(1, last), asked)
    later = torch.arange(48) > last.unsqueeze(2)
    assert not (later & (keys.unsqueeze(1) == asked.unsqueeze(2))).any()
    counts = torch.nn.functional.one_hot(keys, 16).sum(1)
    assert counts.min() == 1 and abs(float(counts.float().var()) - 32 * 15 / 256) < 0.1


def test_distant_recall_by_hand() -> None:
    task = tasks.DistantRecallTask(keys=6, values=3, words=2, history=16, apart=4)
    batch = task.batch(40, torch.Generator().manual_seed(0), history=20)
    assert batch.input.shape == (25, 40, 12)
    assert batch.mask[:, 0].tolist() == [0] * 20 + [1] * 5
    logits = torch.zeros(25, 40, 3)
    for row in range(40):
        noted: dict[int, int] = {}
        for run in batch.input[:20, row].split(4):
            notes = [shown.nonzero().flatten().tolist() for shown in run if not shown[9:11].any()]
            ((key, value),) = notes  # one in each run, a word at all other steps
            noted[key] = value - 6
            assert run[:, 9:11].sum() == 3 and run[:, :9].sum() == 2
        assert len(noted) == 5
        for step, shown in enumerate(batch.input[20:, row], 20):
            key, flag = shown.nonzero().flatten().tolist()
            assert flag == 11 and batch.target[step, row].argmax() == noted[key]
            said = [*noted].index(key) >= 3  # right of the two newest notes alone
            logits[step, row, (noted[key] + (not said)) % 3] = 1
    assert torch.equal(
        task.right_by_run(logits, batch), torch.tensor([[True] * 2 + [False] * 3] * 40)
    )
    shares = task.further(logits, batch)
    assert [*shares] == ["1-16 back", "17-32 back"]
    assert shares["1-16 back"].tolist() == [0.5] * 40 and not shares["17-32 back"].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tasks.OverwriteRecallTask(keys=1), "expected keys from 2, got 1"),
        (lambda: tasks.OverwriteRecallTask(writes=15), "expected writes from 16, got 15"),
        (lambda: tasks.DistantRecallTask(values=1), "expected values from 2, got 1"),
        (lambda: tasks.DistantRecallTask(history=136), "history up to 128, a multiple of 8, got 1"),
        (lambda: tasks.DistantRecallTask(history=12), "up to 128, a multiple of 8, got 12"),
    ],
)
def test_sizes_out_of_range_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("task", "changes"),
    [("overwrite_recall", {"model": model}) for model in ASSOCIATIVE]
    + [("distant_recall", {"compression": name}) for name in COMPRESSIONS]
    + [("distant_recall", {"num_layers": 2})],
)
def test_a_resumed_training_takes_the_same_steps(
    task: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    chosen = settings(task, **changes)
    whole = Training(chosen)
    losses = [whole.step()[0] for _ in range(6)]
    assert len(set(losses)) == 6
    first = Training(chosen)
    assert [first.step()[0] for _ in range(3)] == losses[:3]
    checkpoint.save(tmp_path, first.tensors(), first.counters())
    again = loop.resume(tmp_path)
    assert [again.step()[0] for _ in range(3)] == losses[3:]
    assert all(
        map(torch.equal, whole.model.state_dict().values(), again.model.state_dict().values())
    )


def shown(writes: list[tuple[int, int]], asked: int) -> torch.Tensor:
    """Writes of (key, value), then a question, as 2 keys and 3 values: [T, 1, 6]."""
    input = torch.zeros(len(writes) + 1, 1, 6)
    for step, (key, value) in enumerate(writes):
        input[step, 0, key] = input[step, 0, 2 + value] = 1
    input[-1, 0, asked] = input[-1, 0, 5] = 1
    return input


@pytest.mark.parametrize("model", ASSOCIATIVE)
def test_what_an_associative_layer_keeps(model: str) -> None:
    """By hand: keys apart, beta 1, no decay. Additive answers with the sum, delta with the last."""
    made = Training(settings("overwrite_recall", model=model, memory_size=4)).model
    assert isinstance(made, AssociativeModel)
    layer: Any = made.layers[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.norm.weight.fill_(1)
        features = layer.keys
        for at in (0, features):  # of queries, then of keys
            layer.project.weight[at, 0] = layer.project.weight[at + 1, 1] = 9
        for value in range(3):
            layer.project.weight[2 * features + value, 2 + value] = 1
        layer.output.weight[:, :4] = torch.eye(8, 4)
        if model == "window":
            layer.newer.fill_(50)  # the newest write alone, of those in the window
        else:
            layer.gates.weight[0, 5] = -1e4
            layer.gates.bias.fill_(50)
        x = torch.zeros(4, 1, 8)
        x[:, :, :6] = shown([(0, 1), (1, 0), (0, 2)], asked=0)
        read = layer(x.transpose(0, 1))[0, -1, :3]
    expected = {"additive": [0, 2, 2], "delta": [0, 0, 2], "gated_delta": [0, 0, 2]}
    if model == "window":  # of two steps: the question and the write before it
        assert layer.kept == 2 and read.abs().max() < 2
    else:
        # each of two ones among eight entries is 2 after the norm
        assert read.tolist() == pytest.approx(expected[model], abs=1e-4)


@pytest.mark.parametrize("model", ASSOCIATIVE)
def test_a_step_sees_nothing_later_and_a_window_nothing_older(model: str) -> None:
    training = Training(settings("overwrite_recall", model=model))
    batch = training.task.batch(2, torch.Generator().manual_seed(0), writes=8)
    changed = batch.input.clone()
    changed[5] += 1
    with torch.no_grad():
        before, after = training.model(batch.input), training.model(changed)
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert not any(moved[:5]) and moved[5]
    within = 4 if model == "window" else 7  # steps that step 5 reaches
    assert all(moved[5 : 5 + within]) and not any(moved[5 + within :])


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_how_far_back_a_compressive_network_sees(compression: str) -> None:
    """Of 4 + 4 slots: 8 steps plain, 4 + 4 * 4 compressed, as the last segment sees."""
    training = Training(settings("distant_recall", compression=compression))
    model = training.model
    assert isinstance(model, CompressiveModel)
    input = torch.randn(24, 2, training.task.input_size, requires_grad=True)
    logits, weights = model.trace(input)
    plain = compression == "none"
    assert weights.shape == (2, 4, (4 + 4 if plain else 4 + 3 + 4) + 4)
    reach = 8 if plain else 20
    with torch.no_grad():
        for step in range(20):
            changed = input.detach().clone()
            changed[step] += 1
            seen = not torch.equal(model(changed)[20:], logits[20:])
            if compression != "most_used":  # where one of four steps is enough to be kept
                assert seen == (step >= 20 - reach)
            elif step < 20 - reach:
                assert not seen


def test_the_side_loss_trains_the_convolution_alone() -> None:
    training = Training(settings("distant_recall", compression="conv_reconstruction"))
    model: Any = training.model
    batch = training.task.batch(3, torch.Generator().manual_seed(0), history=24)
    training.task.loss(model(batch.input), batch).backward()
    conv = model.memory.conv.weight
    assert conv.grad is None
    others = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.side_loss.backward()
    assert conv.grad.abs().max() > 0
    rest = [p for name, p in model.named_parameters() if ".conv." not in name]
    assert all(torch.equal(p.grad, g) for p, g in zip(rest, others, strict=True))
    before = conv.detach().clone()
    training.step()
    assert not torch.equal(conv, before)
    model.eval()
    model(batch.input)
    assert model.side_loss is None


@pytest.mark.parametrize(
    ("keys", "values", "chances", "message"),
    [
        (
            torch.tensor([0, 1]),
            torch.tensor([0]),
            torch.rand(2, 3),
            r"values of shape \[2\], got \[1\]",
        ),
        (torch.tensor([0, 2]), torch.tensor([0, 1]), torch.rand(2, 3), "keys from 0 to 1"),
        (torch.tensor([0, 1]), torch.tensor([0, 3]), torch.rand(2, 3), "values from 0 to 2"),
    ],
)
def test_a_picture_refuses_what_does_not_fit(
    keys: torch.Tensor, values: torch.Tensor, chances: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plot.overwrite_recall(keys, values, chances)


def test_the_picture_of_overwriting_holds_what_it_says() -> None:
    keys, values = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([2, 0, 1, 1, 0])
    chances = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3]])
    axes = plot.overwrite_recall(keys, values, chances, title="keys").axes[0]
    held = torch.from_numpy(axes.images[0].get_array().filled(-1).copy())
    none = -1.0
    expected = [[0.1, none, 0.3, none, 0.6], [none, 0.5, none, 0.2, none]]
    torch.testing.assert_close(held, torch.tensor(expected))
    frames = [(patch.get_xy(), to_hex(patch.get_edgecolor())) for patch in axes.patches]
    assert frames == [((3.5, -0.5), RIGHT), ((2.5, 0.5), WRONG)]


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("overwrite_recall", "delta"),
        ("distant_recall", "compressive"),
        ("distant_recall", "lstm"),
        ("copy", "compressive"),
    ],
)
def test_the_command_draws_what_was_trained(task: str, model: str, tmp_path: Path) -> None:
    kept, out = f"--checkpoint={tmp_path / 'kept'}", tmp_path / "picture.png"
    tiny = ["--steps=1", "--sequences=1", "--controller-size=8", "--memory-size=6"]
    assert cli.main(["train", task, kept, f"--model={model}", *tiny]) == 0
    assert cli.main(["plot", task, kept, f"--out={out}"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_table_tells_by_distance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    kept = f"--checkpoint={tmp_path}"
    tiny = ["--steps=1", "--sequences=2", "--controller-size=8", "--batch-size=2"]
    assert cli.main(["train", "distant_recall", kept, *tiny]) == 0
    printed = capsys.readouterr().out
    for span in ("1-16", "17-32", "33-48", "49-80"):
        assert f"{span} back" in printed
    assert "128 steps" in printed and "(49-80 back)." in printed
    scores = json.loads((tmp_path / "evaluation.json").read_text())["scores"]
    assert all(len(score["further"]) == 4 for score in scores)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "least", "most"), [("delta", 0.95, 1.0), ("additive", 0.2, 0.8)])
def test_only_what_is_replaced_is_known(model: str, least: float, most: float) -> None:
    """8 keys, written 24 times, in 64 numbers."""
    chosen = standard("overwrite_recall").with_changes(
        sizes={"keys": 8, "values": 8, "writes": 24},
        model=model,
        steps=250,
        memory_size=8,
        memory_dim=8,
        controller_size=24,
    )
    training = Training(chosen)
    while training.step_count < training.last_step:
        training.step()
    score = evaluate(training.model, training.task, None, 200, display.EVALUATION_SEED)
    assert least <= score.further["right"] <= most


study_there = (ROOT / "benchmarks" / "__main__.py").is_file()


@pytest.mark.skipif(not study_there, reason="the benchmarks are not beside these tests")
@pytest.mark.parametrize("task", ["overwrite_recall", "distant_recall"])
def test_the_study_keeps_every_run_and_goes_on(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # last, so that an installed seqmem_fast stays the one tested
    from benchmarks.studies import recall

    tiny = {"controller_size": 8, "steps": 1, "batch_size": 2}
    monkeypatch.setattr(recall, "SEQUENCES", 2)
    monkeypatch.setattr(recall, "standard", lambda name: standard(name).with_changes(**tiny))
    path, picture = tmp_path / "kept.json", tmp_path / "picture.png"
    assert recall.main([task, "--seeds", "3", f"--json={path}", f"--out={picture}"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    kept = json.loads(path.read_text())
    assert {"cpu", "commit", "date"} <= kept["machine"].keys()
    assert [run["memory"] for run in kept["runs"]] == [*recall.MEMORIES[task]]
    assert all(run["seed"] == 3 and run["cpu_s"] > 0 and run["steps"] == 1 for run in kept["runs"])
    monkeypatch.setattr(recall, "train", lambda *_: pytest.fail("it was there"))
    assert recall.main([task, "--seeds", "3", f"--json={path}"]) == 0
    assert json.loads(path.read_text()) == kept
    printed = capsys.readouterr().out
    assert (f"{task}: right answers" in printed and "delta rule" in printed) or "mean" in printed
