"""The loop around the steps: limits, checkpoints, and whoever watches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import checkpoint
from .interrupt import StopRequest
from .training import Training

Watcher = Callable[[Training, float, float], None]  # after each step: its loss and wrong bits


@dataclass(frozen=True)
class Limits:
    """When this run of the loop ends, beside at the training's last step."""

    seconds: float = float("inf")
    checkpoint_every: int = 500  # steps


def run(training: Training, folder: Path | None, limits: Limits, watch: Watcher) -> int:
    """Trains until all steps are done, the time is up or a signal asks to stop.

    The folder, if any, then holds a checkpoint of the last step, and in between one of every
    `checkpoint_every`. A signal lets the step under way finish, so that a resumed training takes
    the same steps as one that was never interrupted.

    Returns:
        The signal's number, or 0.

    Raises:
        Diverged: the loss, its gradient or a weight is not finite; the folder keeps the
            checkpoint it has.
    """
    start, before = time.perf_counter(), training.seconds
    saved = -1

    def save() -> None:
        nonlocal saved
        if folder is not None and saved != training.step_count:
            training.require_finite()
            checkpoint.save(folder, training.tensors(), training.counters())
            saved = training.step_count

    with StopRequest() as request:
        while training.step_count < training.last_step and not request.received:
            loss, wrong = training.step()
            elapsed = time.perf_counter() - start
            training.seconds = before + elapsed
            watch(training, loss, wrong)
            if elapsed >= limits.seconds:
                break
            if training.step_count % limits.checkpoint_every == 0:
                save()
        save()
    return request.received


def resume(folder: Path) -> Training:
    """The training whose checkpoint the folder holds.

    Raises:
        CheckpointError: there is none, or it is damaged, or not of a training.
    """
    tensors, counters = checkpoint.load(folder)
    try:
        return Training.restore(tensors, counters)
    except ValueError as error:
        raise checkpoint.CheckpointError(f"damaged checkpoint: {folder}: {error}") from error
