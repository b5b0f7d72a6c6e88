"""The picture of a trained checkpoint at work: `plot copy --checkpoint DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..tasks import (
    TASKS,
    Batch,
    GraphTraversalTask,
    LongCopyTask,
    OneShotTask,
    OverwriteRecallTask,
)
from ..tasks.checkpoint import CheckpointError
from ..tasks.loop import resume
from ..tasks.model import AttentionModel, CompressiveModel, MemoryModel
from ..tasks.task import AnswersTask
from ..tasks.training import Training
from .attention import attention
from .compressive import compressive
from .dnc import dnc
from .graph_traversal import graph_traversal, looked_at
from .ntm import ntm
from .one_shot import one_shot
from .overwrite_recall import overwrite_recall

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEED = 2**31 + 1  # sequences that no training with a smaller seed has seen


@torch.no_grad()
def save_picture(training: Training, sizes: dict[str, int], seed: int, path: Path) -> float:
    """Draws one fresh sequence of those sizes; how many bits of it came out wrong."""
    size = {**training.task.probes()[0].size, **sizes}
    task, generator = training.task, torch.Generator().manual_seed(seed)
    words = None
    if isinstance(task, GraphTraversalTask):
        batch, words = task.batch_in_words(generator, **size)
    else:
        batch = task.batch(1, generator, **size)
    trace = None
    if isinstance(training.model, (MemoryModel, CompressiveModel, AttentionModel)):
        logits, trace = training.model.trace(batch.input)
    else:
        logits = training.model(batch.input)
    wrong = float(task.wrong(logits, batch)[0])
    described = ", ".join(f"{name} {number}" for name, number in size.items())
    if words is not None and size["map"]:
        described = f"map {size['map']}, path {size['path']}"
    title = f"{training.settings.task}: {described}, {wrong:.0f} wrong {task.unit}"
    if words is not None:
        said = [words.nodes[label] for label in logits[batch.mask[:, 0] > 0, 0].argmax(1).tolist()]
        looked = None
        if training.settings.model in ("dnc", "mann"):
            row, told = first_row(trace), len(words.edges)
            looked = looked_at(row.write_weights, row.read_weights, told)
        figure = graph_traversal(words.edges, words.walks, said, looked, title=title)
    else:
        figure = picture(training, batch, logits, trace, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return wrong


def picture(training: Training, batch: Batch, logits: Tensor, trace: Any, title: str) -> Figure:
    """The figure that fits the task and the network, of a batch of one row."""
    task, settings = training.task, training.settings
    shown, target, mask = batch.input[:, 0], batch.target[:, 0], batch.mask[:, 0]
    if isinstance(task, OneShotTask):
        pictures = shown[:, : task.side**2].unflatten(1, (task.side, task.side))
        reads = first_row(trace) if settings.model == "mann" else None
        chances = logits[:, 0].softmax(1)
        return one_shot(pictures, chances, target.argmax(1), reads, title=title)
    if isinstance(task, OverwriteRecallTask):
        keys, values, asked = (part[0] for part in task.in_numbers(batch))
        chances = logits[-task.keys :, 0].softmax(1)[asked.argsort()]
        return overwrite_recall(keys, values, chances, title=title)
    if isinstance(training.model, CompressiveModel):
        memory = training.model.memory
        weights = trace[0]
        steps = len(shown) - len(weights)
        sizes = memory.memory_size, memory.compressed_size, memory.ratio
        return compressive(weights, steps, *sizes, title=title)
    if isinstance(task, LongCopyTask) and isinstance(training.model, AttentionModel) and trace:
        band, header = (torch.cat([w[part][0] for w in trace]) for part in (0, 1))
        names = task.in_words(batch)
        left = training.settings.memory_size - 1
        return attention(band, names, names, title=title, left=left, global_weights=header)
    answers = isinstance(task, AnswersTask)
    chances = logits[:, 0].softmax(1) if answers else logits[:, 0].sigmoid()
    if settings.model == "dnc":
        row = first_row(trace)
        return dnc(row, input=shown, output=chances, target=target, mask=mask, title=title)
    weightings, heads = None, settings.heads
    if settings.model == "ntm":
        weightings = trace[:, 0]
    elif settings.model == "mann":
        weightings = torch.cat((trace.write_weights, trace.read_weights), 2)[:, 0]
        heads = "w" * settings.read_heads + "r" * settings.read_heads
    return ntm(shown, chances, target, mask, weightings, heads=heads, title=title)


def first_row(trace: Any) -> Any:
    """The trace of one sequence out of a batch's."""
    return type(trace)(*(part[:, 0] for part in trace))


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
    out = options.out if options.out.suffix else options.out.with_suffix(".png")
    try:
        if options.out.is_dir():
            raise ValueError(f"--out: expected a file, got the folder {options.out}")
        training = resume(options.checkpoint)
        if training.settings.task != task:
            raise ValueError(f"{options.checkpoint} was trained on {training.settings.task}")
        wrong = save_picture(training, given, options.seed, out)
    except (ValueError, CheckpointError, ImportError, OSError) as error:
        print(f"seqmem_fast plot: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {wrong:.0f} wrong {training.task.unit}")
    return 0
