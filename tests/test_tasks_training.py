"""Training on the tasks: the same steps however interrupted, checkpoints, and the command line."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("rich")

from seqmem_fast import cli
from seqmem_fast.tasks import TASKS, checkpoint, command, display, loop
from seqmem_fast.tasks.interrupt import StopRequest
from seqmem_fast.tasks.model import BUILDERS, MemoryModel
from seqmem_fast.tasks.settings import Settings, standard
from seqmem_fast.tasks.training import Diverged, Training

TINY = {
    "controller_size": 8,
    "memory_size": 6,
    "memory_dim": 4,
    "batch_size": 3,
    "read_heads": 2,
    "ratio": 2,
    "segment": 2,
}
SIZES = {
    "associative_recall": {"bits": 2, "item_length": 1, "max_items": 3},
    "copy": {"bits": 2, "max_length": 3},
    "copy_in_turn": {"bits": 2, "max_length": 2, "max_sequences": 3},
    "distant_recall": {"keys": 4, "values": 2, "words": 2, "history": 4, "apart": 2},
    "dynamic_ngrams": {"order": 2, "length": 8},
    "graph_traversal": {
        "node_labels": 3,
        "edge_labels": 2,
        "max_nodes": 3,
        "max_edges": 4,
        "max_path": 2,
        "questions": 1,
    },
    "long_copy": {"symbols": 2, "delays": 2, "length": 5},
    "one_shot": {"classes": 2, "images": 3, "side": 8, "letters": 40},
    "overwrite_recall": {"keys": 2, "values": 2, "writes": 4},
    "priority_sort": {"bits": 2, "items": 4, "highest": 2},
    "repeat_copy": {"bits": 2, "max_length": 2, "max_repeats": 3},
}


@pytest.fixture(autouse=True)
def one_thread(restored_threads: None) -> None:
    """Tiny networks on two threads do little but wait for each other."""
    torch.set_num_threads(1)


def settings(task: str = "copy", **changes: Any) -> Settings:
    return Settings(task, **{"sizes": SIZES[task], "steps": 8, **TINY, **changes})


def arguments(folder: Path, *more: str, task: str = "copy") -> list[str]:
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES[task].items()]
    tiny = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    return [
        "train",
        task,
        *sizes,
        *tiny,
        "--steps=8",
        "--sequences=4",
        f"--checkpoint={folder}",
        *more,
    ]


def weights(training: Training) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in training.model.parameters()]


def steps(training: Training, count: int) -> list[float]:
    return [training.step()[0] for _ in range(count)]


@pytest.mark.parametrize("model", BUILDERS)
@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_with_every_model(task: str, model: str) -> None:
    training = Training(settings(task, model=model))
    before = weights(training)
    loss, wrong = training.step()
    assert 0.4 < loss < 1.5 and wrong >= 0
    assert training.step_count == 1
    # The first weighting of a feed-forward start may get no gradient; most parameters must.
    moved = [not torch.equal(a, b) for a, b in zip(before, weights(training), strict=True)]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("model", BUILDERS)
def test_a_resumed_training_takes_the_same_steps(model: str, tmp_path: Path) -> None:
    whole = Training(settings(model=model))
    losses = steps(whole, 8)
    first = Training(settings(model=model))
    assert steps(first, 3) == losses[:3]
    checkpoint.save(tmp_path, first.tensors(), first.counters())
    again = loop.resume(tmp_path)
    assert steps(again, 5) == losses[3:]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_more_steps_before_the_rate_falls_are_those_of_a_longer_training(tmp_path: Path) -> None:
    losses = steps(Training(settings(steps=14)), 14)
    first = Training(settings(steps=8))
    assert steps(first, 4) == losses[:4]
    checkpoint.save(tmp_path, first.tensors(), first.counters())
    again = loop.resume(tmp_path)
    again.end_at(14)
    assert again.last_step == 14 and steps(again, 10) == losses[4:]


def test_more_steps_after_the_end_have_the_rate_of_a_longer_training() -> None:
    """Also after an early end."""
    given = settings(steps=8, learnt=1.0)
    whole, ended = Training(given.with_changes(steps=20, learnt=0.0)), Training(given)
    steps(ended, ended.last_step)
    while ended.step_count < ended.last_step:
        ended.step()
    assert ended.last_step == 5 and ended.schedule.learnt
    ended.end_at(20)
    rates = [ended.schedule.learning_rate(done) for done in range(5, 20)]
    assert rates == [whole.schedule.learning_rate(done) for done in range(5, 20)]
    assert ended.last_step == ended.settings.steps == 20


def test_options_of_a_dnc_are_names() -> None:
    model = Training(settings(model="dnc", dnc_options="masks,no_links")).model
    assert isinstance(model, MemoryModel)
    dnc: Any = model.get_submodule("dnc")
    assert (dnc.links, dnc.masks, dnc.sharpen, dnc.deallocate) == (False, True, False, False)
    with pytest.raises(
        ValueError, match=r"some of no_links, feedforward, masks, .*, got \['links'\]"
    ):
        settings(dnc_options="masks,links")


def test_a_checkpoint_from_before_other_networks_resumes(tmp_path: Path) -> None:
    """Settings that were not there yet take what was done without them; names stay as they were."""
    usual = Training(settings(read_heads=4))
    tensors, counters = usual.tensors(), usual.counters()
    assert {name.split(".")[1] for name in tensors if name.startswith("model.")} == {"ntm"}
    del counters["settings"]["read_heads"], counters["settings"]["dnc_options"]
    checkpoint.save(tmp_path, tensors, counters)
    assert steps(loop.resume(tmp_path), 3) == steps(usual, 3)


def test_the_seed_alone_decides_and_others_randomness_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = steps(Training(settings()), 2)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert steps(Training(settings()), 2) == one
    assert steps(Training(settings(seed=1)), 2) != one


def test_a_loss_that_is_not_finite_ends_the_training_before_the_weights_suffer(
    tmp_path: Path,
) -> None:
    training = Training(settings())
    training.step()
    checkpoint.save(tmp_path, training.tensors(), training.counters())
    with torch.no_grad():
        next(iter(training.model.parameters())).fill_(float("nan"))
    with pytest.raises(Diverged, match="step 2 is nan"):
        loop.run(training, tmp_path, loop.Limits(), lambda *_: None)
    assert loop.resume(tmp_path).step_count == 1


@pytest.mark.parametrize("where", ["gradient", "weights"])
def test_what_could_not_go_on_is_not_kept(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(tmp_path, "--minutes=1e-9")) == 0
    if where == "gradient":
        wrong = torch.tensor(float("inf"))
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **__: wrong)
    else:
        take = torch.optim.AdamW.step

        def ruin(self: Any) -> None:
            take(self)
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("nan"))

        monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    assert (
        cli.main(["train", "copy", f"--checkpoint={tmp_path}", "--resume", "--minutes=1e-9"]) == 1
    )
    said = {"gradient": "the gradient at step 2 is inf", "weights": "after step 2 not all of"}
    error = capsys.readouterr().err
    assert said[where] in error and f"{tmp_path} holds a checkpoint of step 1" in error
    assert loop.resume(tmp_path).step_count == 1


def test_a_folder_is_tried_before_the_training_and_is_one_training_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(arguments(tmp_path / "file" / "below")) == 2
    assert "Not a directory" in capsys.readouterr().err
    with checkpoint.writing(tmp_path / "kept"):
        assert cli.main(arguments(tmp_path / "kept")) == 2
    assert "another training writes to" in capsys.readouterr().err
    assert not [*(tmp_path / "kept").iterdir()]


def test_a_standard_size_may_be_named_to_resume(tmp_path: Path) -> None:
    tiny = [option for option in arguments(tmp_path) if "length" not in option]
    assert cli.main([*tiny, "--minutes=1e-9"]) == 0
    longest = TASKS["copy"]().max_length  # type: ignore[attr-defined]
    assert cli.main([*tiny, "--resume", f"--max-length={longest}", "--minutes=1e-9"]) == 0
    assert cli.main([*tiny, "--resume", f"--max-length={longest + 1}"]) == 2


def test_an_old_verdict_goes_with_its_weights(tmp_path: Path) -> None:
    assert cli.main(arguments(tmp_path)) == 0
    assert (tmp_path / "evaluation.json").is_file()
    kept = cli.main(arguments(tmp_path, "--restart", "--learning-rate=1e30"))
    assert kept == 1 and not (tmp_path / "evaluation.json").exists()


def test_the_learning_rate_is_constant_then_falls() -> None:
    training = Training(settings(steps=100))
    rates = []
    for count in (0, 50, 75, 100):
        training.step_count = count
        rates.append(training.learning_rate() / training.settings.learning_rate)
    assert rates == pytest.approx([1, 1, 0.51, 0.02])


def test_a_learnt_task_ends_early() -> None:
    schedule = Training(settings(steps=1000, fall=0.1, learnt=0.3)).schedule
    assert (schedule.turn, schedule.last_step) == (900, 1000)
    for step in range(1, 101):
        schedule.observe(0.29 if step > 40 else 0.7, step)
        assert not schedule.learnt and schedule.learning_rate(step) == 3e-3
    while not schedule.learnt:
        step += 1
        schedule.observe(0.0, step)
    assert (schedule.turn, schedule.last_step) == (step, step + 100)
    schedule.observe(0.7, step + 1)  # what was learnt stays so
    assert schedule.last_step == step + 100
    rates = [schedule.learning_rate(step + past) / 3e-3 for past in (0, 50, 100)]
    assert rates == pytest.approx([1, 0.51, 0.02])


def test_a_curriculum_lets_sizes_grow_when_the_present_ones_are_learnt() -> None:
    sizes = {"bits": 2, "max_length": 4}
    training = Training(settings(steps=900, curriculum=0.1, sizes=sizes, model="lstm"))
    lengths: list[int] = []
    training.model.register_forward_hook(
        lambda module, given, result: lengths.append((given[0].shape[0] - 1) // 2)
    )
    schedule = training.schedule
    for stage in range(3):
        lengths.clear()
        steps(training, 20)
        assert (schedule.stage, min(lengths), max(lengths)) == (stage, 1, stage + 2)
        if stage < 2:
            while schedule.stage == stage:
                schedule.observe(0.09, training.step_count)
            assert schedule.loss == pytest.approx(math.log(2))  # anew at every stage
    for _ in range(500):
        schedule.observe(0.0, training.step_count)
    assert schedule.stage == training.task.stages == 2
    assert Training(settings(sizes=sizes)).schedule.stage == 2  # no curriculum: all at once


def test_a_schedule_under_way_resumes_to_the_same_steps(tmp_path: Path) -> None:
    """The sizes and the end follow from the losses, so what is known of those must be kept."""
    chosen = settings(
        sizes={"bits": 1, "max_length": 4},
        steps=400,
        batch_size=8,
        curriculum=0.65,
        learnt=0.65,
        fall=0.1,
        learning_rate=0.02,
    )

    def record(training: Training) -> list[tuple[float, float, int]]:
        seen = []
        while training.step_count < training.last_step:
            rate = training.learning_rate()
            loss, _ = training.step()
            seen.append((loss, rate, training.schedule.stage))
        return seen

    whole = record(Training(chosen))
    stages = [stage for _, _, stage in whole]
    assert stages[0] == 0 and stages[-1] == 2 and len(whole) < 300  # both did take part
    for stop in (stages.index(1), stages.index(2) - 1, len(whole) - 5):
        first = Training(chosen)
        losses = steps(first, stop)
        checkpoint.save(tmp_path, first.tensors(), first.counters())
        again = loop.resume(tmp_path)
        assert losses == [loss for loss, _, _ in whole[:stop]]
        assert record(again) == whole[stop:]


def test_the_loop_saves_on_the_way_and_at_its_end(tmp_path: Path) -> None:
    seen = []

    def watch(training: Training, loss: float, wrong: float) -> None:
        kept = loop.resume(tmp_path).step_count if checkpoint.exists(tmp_path) else 0
        seen.append((training.step_count, kept))

    training = Training(settings())
    assert loop.run(training, tmp_path, loop.Limits(checkpoint_every=3), watch) == 0
    assert seen == [(1, 0), (2, 0), (3, 0), (4, 3), (5, 3), (6, 3), (7, 6), (8, 6)]
    assert loop.resume(tmp_path).step_count == 8
    assert len(list(tmp_path.iterdir())) == 2  # no older tensors, nothing half-written


def test_the_loop_ends_when_time_is_up(tmp_path: Path) -> None:
    training = Training(settings())
    loop.run(training, tmp_path, loop.Limits(seconds=1e-9), lambda *_: None)
    assert loop.resume(tmp_path).step_count == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_that_goes_on_alike(number: int, tmp_path: Path) -> None:
    losses = steps(Training(settings()), 8)
    before = signal.getsignal(number)

    def interrupt(training: Training, loss: float, wrong: float) -> None:
        if training.step_count == 4:
            os.kill(os.getpid(), number)

    assert loop.run(Training(settings()), tmp_path, loop.Limits(), interrupt) == number
    assert signal.getsignal(number) is before
    again = loop.resume(tmp_path)
    assert again.step_count == 4
    assert steps(again, 4) == losses[4:]


def test_a_second_ctrl_c_is_not_held_back(request: pytest.FixtureRequest) -> None:
    # A process started in the background ignores Ctrl-C from its birth.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 2).t(),
        "b": torch.tensor(3),
        "c": torch.ones(2, dtype=torch.uint8),
    }
    checkpoint.save(tmp_path / "new", tensors, {"n": 1.5, "list": [1, "x"]})
    back, facts = checkpoint.load(tmp_path / "new")
    assert facts == {"n": 1.5, "list": [1, "x"]}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("stage", ["tensors", "index"])
def test_a_save_that_breaks_off_leaves_the_old_checkpoint(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, {"a": torch.zeros(2)}, {"n": 0})
    real, calls = os.replace, []

    def broken(source: Any, target: Any) -> None:
        calls.append(target)
        if stage == "tensors" or len(calls) == 2:
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, {"a": torch.ones(2)}, {"n": 1})
    monkeypatch.undo()
    back, facts = checkpoint.load(tmp_path)
    assert facts == {"n": 0} and not back["a"].any()
    assert not list(tmp_path.glob("*.part"))


def damage_index(folder: Path) -> None:
    (folder / checkpoint.INDEX).write_text('{"format": 1, "tens')


def damage_fields(folder: Path) -> None:
    (folder / checkpoint.INDEX).write_text('{"format": 1}')


def damage_tensors(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def shorten_tensors(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def lose_tensors(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def foreign(folder: Path) -> None:
    checkpoint.save(folder, {"a": torch.zeros(1)}, {"n": 0})


def newer(folder: Path) -> None:
    index = json.loads((folder / checkpoint.INDEX).read_text())
    (folder / checkpoint.INDEX).write_text(json.dumps(index | {"format": 99}))


def other_network(folder: Path) -> None:
    training = Training(settings(controller_size=9))
    checkpoint.save(folder, training.tensors(), Training(settings()).counters())


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_index, "damaged checkpoint: .*checkpoint.json"),
        (damage_fields, "damaged checkpoint: .*'tensors'"),
        (damage_tensors, "is not what was written"),
        (shorten_tensors, "is not what was written"),
        (lose_tensors, "damaged checkpoint: .*No such file"),
        (foreign, "not a checkpoint of this training: 'settings'"),
        (newer, "expected format 1, got 99"),
        (other_network, "size mismatch"),
    ],
)
def test_damage_is_noticed(
    harm: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(settings())
    checkpoint.save(tmp_path, training.tensors(), training.counters())
    harm(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        loop.resume(tmp_path)
    assert cli.main(["train", "copy", f"--checkpoint={tmp_path}", "--resume"]) == 2
    assert capsys.readouterr().err.startswith("seqmem_fast train: ")


@pytest.mark.parametrize("task", TASKS)
def test_the_command_trains_and_judges(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(tmp_path / "kept", task=task)) == 0
    printed = capsys.readouterr().out
    assert "8/8" in printed and "│ yes " in printed and "│ no " in printed
    assert f"wrong {TASKS[task].unit}" in printed
    judged = json.loads((tmp_path / "kept" / "evaluation.json").read_text())
    assert judged["step"] == 8 and judged["sequences"] == 4
    assert [score["trained"] for score in judged["scores"]][:2] == [True, True]
    assert not judged["scores"][-1]["trained"]


def test_the_command_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(tmp_path / "whole")) == 0
    step, interrupted = Training.step, tmp_path / "interrupted"

    def interrupt(training: Training) -> tuple[float, float]:
        if training.step_count == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(training)

    monkeypatch.setattr(Training, "step", interrupt)
    assert cli.main(arguments(interrupted)) == 128 + signal.SIGINT
    monkeypatch.undo()
    assert "SIGINT: --resume goes on from there" in capsys.readouterr().out
    assert cli.main(["train", "copy", f"--checkpoint={interrupted}", "--resume"]) == 0
    (one, _), (two, _) = (checkpoint.load(tmp_path / name) for name in ("whole", "interrupted"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_command_goes_on_after_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(tmp_path)) == 0
    more = ["train", "copy", f"--checkpoint={tmp_path}", "--sequences=4", "--resume"]
    assert cli.main([*more, "--steps=10"]) == 0
    assert "step 10 of 10, kept" in capsys.readouterr().out
    assert cli.main([*more, "--steps=10"]) == cli.main(more) == 0  # nothing is left to do
    assert loop.resume(tmp_path).step_count == 10
    assert cli.main([*more, "--steps=9"]) == 2
    assert "steps: expected more than the 10 that were taken, got 9" in capsys.readouterr().err


def test_a_checkpoint_is_not_overwritten_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(tmp_path, "--minutes=1e-9")) == 0
    assert loop.resume(tmp_path).step_count == 1
    assert cli.main(arguments(tmp_path)) == 2
    assert "holds a checkpoint: --resume" in capsys.readouterr().err
    assert cli.main(arguments(tmp_path, "--resume", "--seed=4")) == 2
    assert "goes on as before: seed is 0 there, got 4" in capsys.readouterr().err
    assert cli.main(["train", "repeat_copy", f"--checkpoint={tmp_path}", "--resume"]) == 2
    assert "task is copy there, got repeat_copy" in capsys.readouterr().err
    assert cli.main(arguments(tmp_path, "--restart", "--seed=4", "--minutes=1e-9")) == 0
    assert loop.resume(tmp_path).settings.seed == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--steps=0"], "steps: expected at least 1, got 0"),
        (["--learning-rate=-1"], "learning_rate: expected more than 0, got -1.0"),
        (["--seed=-1"], "seed: expected 0 to"),
        (["--weight-decay=-1"], "weight_decay: expected at least 0, got -1.0"),
        (["--curriculum=2"], "curriculum: expected 0 to 1, got 2.0"),
        (["--segment=0"], "segment: expected at least 1, got 0"),
        (["--memory-dim=0"], "memory_dim: expected at least 1, got 0"),
        (["--learning-rate=inf"], "learning_rate: expected a finite number, got inf"),
        (["--compression=zip"], "compression: expected one of none, mean, max, conv, "),
        (["--model=window", "--memory-size=1"], "memory_size: expected at least 2 of a window"),
        (["--model=compressive", "--memory-size=1"], "memory_size: expected at least 2 of a com"),
        (["--fall=-0.1"], "fall: expected 0 to 1, got -0.1"),
        (["--learnt=nan"], "learnt: expected 0 to 1, got nan"),
        (["--bits=0"], "copy: expected bits of at least 1, got 0"),
        (["--minutes=0"], "--minutes: expected more than 0, got 0.0"),
        (["--checkpoint-every=0"], "--checkpoint-every: expected more than 0, got 0"),
        (["--resume"], "no checkpoint in"),
    ],
)
def test_mistakes_come_as_one_sentence(
    wrong: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "copy", f"--checkpoint={tmp_path / 'none'}", *wrong]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_settings_survive_json_and_refuse_the_unknown() -> None:
    one = settings()
    assert Settings.from_json(json.loads(json.dumps(one.to_json()))) == one
    for wrong in ({"task": "juggling"}, {"model": "abacus"}, {"sizes": {"colour": 1}}):
        with pytest.raises(ValueError, match=r"juggling|abacus|colour"):
            Settings(**{"task": "copy", **wrong})
    assert [standard(name).task for name in TASKS] == list(TASKS)


@pytest.mark.parametrize(
    ("missing", "options"),
    [
        ("safetensors", []),
        ("rich", []),
        ("tensorboard", ["--tensorboard=board"]),
    ],
)
def test_what_is_not_installed_is_named(
    missing: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = {"tensorboard": "torch.utils.tensorboard", "rich": "rich.console"}.get(
        missing, "safetensors.torch"
    )
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(arguments(tmp_path / "kept", *options)) == 2
    assert f"pip install {missing}" in capsys.readouterr().err


def test_curves_go_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (folder, purge_step) == (str(tmp_path / "board"), 0)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step))

        def close(self) -> None:
            written.append(("closed", 0))

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    assert cli.main(arguments(tmp_path / "kept", f"--tensorboard={tmp_path / 'board'}")) == 0
    assert [step for name, step in written if name == "loss"] == list(range(1, 9))
    assert written[-1] == ("closed", 0)


def test_the_verdict_says_how_far_it_reaches() -> None:
    def scored(*wrong: float) -> list[Any]:
        probes = [display.Probe(f"length {n}", {}, n < 3) for n in range(1, len(wrong) + 1)]
        scores = [display.Score(bits, 0.0, 1.0, None, {}) for bits in wrong]
        return list(zip(probes, scores, strict=True))

    assert display.verdict(scored(0.0, 0.0, 0.5, 7.0)) == (
        "It has learnt what it was trained on. Beyond it, less than one wrong bit a sequence: "
        "length 3. It does not carry over to: length 4."
    )
    assert "still gets 2.500 bits wrong" in display.verdict(scored(2.5, 0.0, 0.0))
    own = display.Score(4.0, 0.0, 0.0, None, {"1st": 0.2, "2nd": 0.95})
    found = display.verdict([(display.Probe("", {}, True), own)])
    assert found == "Right: 20.0% (1st), 95.0% (2nd)."


@pytest.mark.parametrize("task", TASKS)
def test_help_explains_every_setting_and_size(
    task: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        command.main([task, "--help"])
    printed = capsys.readouterr().out
    for name in [*vars(settings(task)), *SIZES[task]]:
        if name not in ("task", "sizes"):
            assert re.search(rf"--{name.replace('_', '-')} [A-Z]+\s+\w.*; standard: ", printed), (
                name
            )
