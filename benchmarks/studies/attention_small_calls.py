"""Is Attention anywhere slower than nn.MultiheadAttention? 60 self-attentions, with and without
weights, in inference and training.

    python -m benchmarks.studies.attention_small_calls [--threads 2] [--seconds 0.2] [--most 64]

Both modules hold the same parameters (batch_first, no masks, no dropout) and take turns, a few
calls at a time; the smallest time of each counts, which other programs on the machine disturb
least. --most leaves out larger batches. All take 480 times the seconds of a side, and a minute
more for the calls that are longer than that.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

import seqmem_fast as sf
from benchmarks.harness import machine, report

BATCHES, STEPS, WIDTHS = (1, 4, 16, 64), (1, 16, 64, 128, 512), (16, 64, 512)
HEADS = {16: 2, 64: 4, 512: 8}
SAMPLE_S = 0.0005  # calls shorter than this are timed several at once
FEW = 2  # samples of each side, however slow the call
MODES = [f"{mode}, {'' if weights else 'no '}weights" for mode in ("inference", "training")
         for weights in (True, False)]  # fmt: skip

Call = Callable[[], Any]
Shape = tuple[int, int, int]


def calls(batch: int, steps: int, width: int, mode: str) -> tuple[Call, Call]:
    """One call of nn.MultiheadAttention, and the same of Attention."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(width, HEADS[width], batch_first=True)
    training, weights = mode.startswith("training"), "no weights" not in mode
    x = torch.randn(batch, steps, width, requires_grad=training)

    def call(module: nn.Module) -> Any:
        if not training:
            with torch.inference_mode():
                return module(x, x, x, need_weights=weights)
        output, _ = module(x, x, x, need_weights=weights)
        return torch.autograd.grad(output.sum(), [x, *module.parameters()])

    theirs.train(training)
    ours = sf.Attention.from_torch(theirs)
    return (lambda: call(theirs)), (lambda: call(ours))


def smallest(sides: Sequence[Call], seconds: float) -> list[float]:
    """The least time of one call of each side, taken in turns until `seconds` a side are over; the
    first calls are not counted, the two after them always."""
    start = time.perf_counter()
    for side in sides:
        side()
    once = (time.perf_counter() - start) / len(sides)
    many = max(1, round(SAMPLE_S / once))
    times: list[list[float]] = [[] for _ in sides]
    end = time.perf_counter() + seconds * len(sides)
    while len(times[-1]) < FEW or time.perf_counter() < end:
        for side, own in zip(sides, times, strict=True):
            start = time.perf_counter()
            for _ in range(many):
                side()
            own.append((time.perf_counter() - start) / many)
    return [min(own) for own in times]


def measured(shape: Shape, seconds: float) -> dict[str, Any]:
    """Both modules' times in each mode."""
    modes = {}
    for mode in MODES:
        torch_s, ours_s = smallest(calls(*shape, mode), seconds)
        modes[mode] = {"torch_s": torch_s, "ours_s": ours_s, "ratio": torch_s / ours_s}
    return {"shape": shape, "heads": HEADS[shape[2]], "modes": modes}


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Every shape: torch's time, and how many times ours goes into it."""
    table = Table("B, T, E", *MODES, box=SIMPLE_HEAD)
    for row in results:
        cells = []
        for found in row["modes"].values():
            colour = "green" if found["ratio"] >= 1 else "red"
            peer = report.duration(found["torch_s"])
            cells.append(f"{peer} [{colour}]{found['ratio']:.2f}[/{colour}]")
        table.add_row(", ".join(map(str, row["shape"])), *cells)
    console.print(table)
    for mode in MODES:
        ratios = sorted(row["modes"][mode]["ratio"] for row in results)
        below = sum(ratio < 1 for ratio in ratios)
        console.print(f"{mode}: {len(ratios)} shapes, smallest {ratios[0]:.2f}, {below} below 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures all shapes, keeps them after each, shows them."""
    parser = report.parser("benchmarks.studies.attention_small_calls", __doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=0.2, help="for one side of one mode")
    parser.add_argument("--most", type=int, default=BATCHES[-1], help="the largest batch")
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "attention_small_calls.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    content = {
        "schema": report.SCHEMA,
        "job": "attention_small_calls",
        "machine": machine.describe(),
        "threads": args.threads,
        "seconds": args.seconds,
        "results": [],
    }
    shapes = [s for s in itertools.product(BATCHES, STEPS, WIDTHS) if s[0] <= args.most]
    console = report.console()
    with report.progress_bar(console) as bar:
        task = bar.add_task("", total=len(shapes))
        for shape in shapes:
            bar.update(task, description=str(shape))
            content["results"].append(measured(shape, args.seconds))
            report.write_json(args.json, content)
            bar.advance(task)
    show(console, content["results"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
