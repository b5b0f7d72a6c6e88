"""The command `train`: `python -m seqmem_fast train copy`."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch

from . import TASKS, checkpoint, loop
from .display import Bar, Board, judge, new_console, show_scores
from .model import BUILDERS
from .optional import MissingPackage
from .settings import Settings, standard
from .training import Diverged, Training

if TYPE_CHECKING:
    from rich.console import Console

SEQUENCES = 200  # of each size in the table at the end
EXAMPLES = """examples:
  python -m seqmem_fast train copy --help         the settings and sizes of one task
  python -m seqmem_fast train copy                as that task is trained usually
  python -m seqmem_fast train copy --minutes 5    what fits into five minutes
  python -m seqmem_fast train copy --resume       goes on from there
  python -m seqmem_fast train copy --resume --steps 20000
                                                  goes on further than was asked at first
"""


def parser() -> argparse.ArgumentParser:
    """One sub-command a task, with the task's own sizes among its options."""
    whole = argparse.ArgumentParser(
        prog="python -m seqmem_fast train",
        description="Trains a network with a memory, or an LSTM, on one of the tasks, then judges "
        "the result on fresh sequences, larger ones too.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = whole.add_subparsers(dest="task", required=True, metavar="task")
    for name, kind in TASKS.items():
        summary = (sys.modules[kind.__module__].__doc__ or "").splitlines()[0]
        one = tasks.add_parser(
            name,
            help=summary,
            usage=f"{whole.prog} {name} [options]",
            description=(inspect.getdoc(kind) or "").partition("\n\nRaises")[0],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        usual = standard(name)
        settings = one.add_argument_group("what determines the training")
        for each in fields(Settings):
            if each.name in ("task", "sizes"):
                continue
            value = getattr(usual, each.name)
            settings.add_argument(
                _option(each.name),
                type=type(value),
                choices=tuple(BUILDERS) if each.name == "model" else None,
                metavar=type(value).__name__.upper(),
                help=_help(Settings, each.name, value),
            )
        sizes = one.add_argument_group("sizes of the task")
        for each in fields(kind):  # type: ignore[arg-type]
            sizes.add_argument(
                _option(each.name),
                type=int,
                metavar="INT",
                help=_help(kind, each.name, each.default),
            )
        _add_run_options(one.add_argument_group("this run"), name)
    return whole


def _add_run_options(group: Any, name: str) -> None:
    default = Path("checkpoints") / name
    group.add_argument(
        "--checkpoint",
        type=Path,
        default=default,
        metavar="DIR",
        help=f"where the training is kept; standard: {default}",
    )
    how = group.add_mutually_exclusive_group()
    how.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint, with --steps to another last step",
    )
    how.add_argument("--restart", action="store_true", help="begin anew, replace the checkpoint")
    group.add_argument(
        "--minutes", type=float, metavar="FLOAT", help="stop then, resumable; standard: no limit"
    )
    group.add_argument(
        "--checkpoint-every",
        type=int,
        default=500,
        metavar="STEPS",
        help="keep it so often, and at the end; standard: %(default)s",
    )
    group.add_argument("--tensorboard", type=Path, metavar="DIR", help="write curves there")
    group.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="INT",
        help="of torch, whose own layers may round otherwise with others; standard: %(default)s",
    )
    group.add_argument(
        "--sequences",
        type=int,
        default=SEQUENCES,
        metavar="INT",
        help="fresh ones of each size to judge it by; standard: %(default)s",
    )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))


def _help(kind: type, name: str, standard: object) -> str:
    """What the field's annotation says, fit for argparse."""
    (text,) = _hints(kind)[name].__metadata__
    known = f": {', '.join(BUILDERS)}" if name == "model" else ""
    return f"{text}{known}; standard: {standard or repr(standard)}".replace("%", "%%")


def chosen(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, int]]:
    """The settings and the task's sizes that were given on the command line."""
    settings = {
        each.name: getattr(options, each.name)
        for each in fields(Settings)
        if each.name not in ("task", "sizes") and getattr(options, each.name) is not None
    }
    sizes = {
        each.name: getattr(options, each.name)
        for each in fields(TASKS[options.task])  # type: ignore[arg-type]
        if getattr(options, each.name) is not None
    }
    return settings, sizes


def start(options: argparse.Namespace) -> Training:
    """A new training, or the one that the checkpoint holds.

    Raises:
        ValueError: settings out of range, or others than those of the training to resume.
        CheckpointError: nothing to resume, or a checkpoint in the way.
    """
    settings, sizes = chosen(options)
    if options.resume:
        training = loop.resume(options.checkpoint)
        kept = training.settings.to_json()
        if (steps := settings.pop("steps", kept["steps"])) != kept["steps"]:
            training.end_at(steps)
        wanted = {"task": options.task, **settings}
        here = {name: getattr(training.task, name) for name in sizes} | {n: kept[n] for n in wanted}
        for name, value in (wanted | sizes).items():
            if here[name] != value:
                raise ValueError(
                    f"--resume goes on as before: {name} is {here[name]} there, got {value}"
                )
        return training
    if checkpoint.exists(options.checkpoint) and not options.restart:
        raise checkpoint.CheckpointError(
            f"{options.checkpoint} holds a checkpoint: --resume goes on from it, --restart "
            "replaces it, --checkpoint names another folder"
        )
    return Training(standard(options.task).with_changes(sizes=sizes, **settings))


def train(options: argparse.Namespace, console: Console) -> int:
    """Trains, keeps, judges; the exit status."""
    checkpoint.require_safetensors()  # before hours of training, not after
    training = start(options)
    with checkpoint.writing(options.checkpoint):
        return _train(options, console, training)


def _train(options: argparse.Namespace, console: Console, training: Training) -> int:
    judged = options.checkpoint / "evaluation.json"
    judged.unlink(missing_ok=True)  # of other weights
    torch.set_num_threads(options.threads)
    limits = loop.Limits(
        seconds=float("inf") if options.minutes is None else 60 * options.minutes,
        checkpoint_every=options.checkpoint_every,
    )
    with ExitStack() as stack:
        board = None
        if options.tensorboard is not None:
            board = Board(options.tensorboard, training)
            stack.callback(board.close)
        bar = stack.enter_context(Bar(console, training))

        def watch(now: Training, loss: float, wrong: float) -> None:
            bar(now, loss, wrong)
            if board is not None:
                board(now, loss, wrong)

        signalled = loop.run(training, options.checkpoint, limits, watch)
    taken = f"step {training.step_count} of {training.last_step}"
    console.print(f"{taken}, kept in {options.checkpoint}", highlight=False)
    if signalled:
        console.print(f"{signal.Signals(signalled).name}: --resume goes on from there")
        return 128 + signalled
    scores = judge(training, options.sequences)
    show_scores(console, training.settings, training.task.unit, scores)
    content = {
        "step": training.step_count,
        "seconds": training.seconds,
        "sequences": options.sequences,
        "scores": [
            {"size": probe.label, "trained": probe.trained, **score._asdict()}
            for probe, score in scores
        ],
    }
    text = json.dumps(content, indent=2) + "\n"
    checkpoint.replace(judged, text.encode())
    return 0


def main(arguments: Sequence[str]) -> int:
    """The command line; every mistake comes as one sentence."""
    options = parser().parse_args(arguments)
    for name in ("minutes", "checkpoint_every", "threads", "sequences"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            print(f"{_option(name)}: expected more than 0, got {value}", file=sys.stderr)
            return 2
    try:
        return train(options, new_console())
    except KeyboardInterrupt:  # while judging: the training itself is kept
        return 128 + signal.SIGINT
    except Diverged as error:
        step = checkpoint.step_of(options.checkpoint)
        kept = "no checkpoint" if step is None else f"a checkpoint of step {step}"
        print(f"stopped: {error}; {options.checkpoint} holds {kept}", file=sys.stderr)
        return 1
    except (ValueError, MissingPackage, checkpoint.CheckpointError, OSError) as error:
        print(f"seqmem_fast train: {error}", file=sys.stderr)
        return 2
