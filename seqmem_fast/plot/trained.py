"""The picture of a trained checkpoint at work: `plot copy --checkpoint DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..tasks import TASKS
from ..tasks.checkpoint import CheckpointError
from ..tasks.loop import resume
from ..tasks.model import MemoryModel
from ..tasks.training import Training
from .ntm import ntm

SEED = 2**31 + 1  # sequences that no training with a smaller seed has seen


@torch.no_grad()
def save_picture(training: Training, sizes: dict[str, int], seed: int, path: Path) -> float:
    """Draws one fresh sequence of those sizes; how many bits of it came out wrong."""
    size = {**training.task.probes()[0].size, **sizes}
    batch = training.task.batch(1, torch.Generator().manual_seed(seed), **size)
    weightings = None
    if isinstance(training.model, MemoryModel):
        logits, all_weightings = training.model.trace(batch.input)
        weightings = all_weightings[:, 0]
    else:
        logits = training.model(batch.input)
    wrong = float(training.task.wrong(logits, batch)[0])
    settings = training.settings
    described = ", ".join(f"{name} {number}" for name, number in size.items())
    figure = ntm(
        batch.input[:, 0],
        logits[:, 0].sigmoid(),
        batch.target[:, 0],
        batch.mask[:, 0],
        weightings,
        heads=settings.heads,
        title=f"{settings.task}: {described}, {wrong:.0f} wrong {training.task.unit}",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return wrong


def main(task: str, arguments: Sequence[str]) -> int:
    """The command line of one task's picture; every mistake comes as one sentence."""
    parser = argparse.ArgumentParser(prog=f"python -m seqmem_fast plot {task}")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints") / task)
    parser.add_argument("--out", type=Path, default=Path(f"{task}.png"))
    parser.add_argument("--seed", type=int, default=SEED, help="of the sequence shown")
    sizes = list(TASKS[task]().probes()[0].size)
    for name in sizes:
        parser.add_argument(f"--{name}", type=int, help="training's largest if none")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in sizes if getattr(options, name) is not None}
    try:
        training = resume(options.checkpoint)
        if training.settings.task != task:
            raise ValueError(f"{options.checkpoint} was trained on {training.settings.task}")
        wrong = save_picture(training, given, options.seed, options.out)
    except (ValueError, CheckpointError, ImportError, OSError) as error:
        print(f"seqmem_fast plot: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {wrong:.0f} wrong {training.task.unit}")
    return 0
