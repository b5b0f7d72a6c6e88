"""The copy task of the NTM paper, learnt from nothing by the clock.

    python -m benchmarks.ntm_copy [--seeds 0 1 2 3 4] [--seconds 60] [--json PATH]

Standard settings of `python -m seqmem_fast train copy`: 8 bits, lengths 1 to 20, 128 slots of 20,
an LSTM controller of 100, one write and one read head. The time is all of it: building, training,
judging. Keeps a checkpoint and its picture in benchmarks/results.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import machine, report
from seqmem_fast.plot.trained import save_picture
from seqmem_fast.tasks import evaluate, loop
from seqmem_fast.tasks.display import EVALUATION_SEED, Bar
from seqmem_fast.tasks.settings import standard
from seqmem_fast.tasks.training import Training

JUDGING_S = 4.0  # kept free at the end
SEQUENCES = 1000  # at training's lengths; a tenth of it at twice the longest
BAR = {"wrong_bits": 0.01, "wrong_bits_at_40": 1.0}  # to stay under
FOLDER = machine.RESULTS / "copy"


def train_copy(console: Console, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Trains for at most that long and judges on fresh sequences; the result is fit for JSON."""
    start = time.perf_counter()
    training = Training(standard("copy").with_changes(seed=seed))
    limits = loop.Limits(seconds=max(0.0, seconds - JUDGING_S), checkpoint_every=10**9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps of milliseconds: on a busy machine threads wait for each other
    try:
        with Bar(console, training) as bar:
            signalled = loop.run(training, FOLDER, limits, bar)
    finally:
        torch.set_num_threads(threads)
    if signalled:
        raise KeyboardInterrupt
    trained = time.perf_counter() - start
    model, task = training.model, training.task
    here = evaluate(model, task, None, SEQUENCES, EVALUATION_SEED, batch_size=20)
    longer = evaluate(model, task, {"length": 40}, SEQUENCES // 10, EVALUATION_SEED)
    whole = time.perf_counter() - start
    measured = {
        "seed": seed,
        "steps": training.step_count,
        "of_steps": training.settings.steps,
        "batch": training.settings.batch_size,
        "training_s": trained,
        "seconds": whole,
        "wrong_bits": here.wrong_bits,
        "wrong_bits_at_40": longer.wrong_bits,
    }
    reached = all(measured[name] < most for name, most in BAR.items()) and whole <= seconds
    console.print(
        f"seed {seed}: {training.step_count:,} steps in {trained:.1f} s; wrong bits a sequence: "
        f"[bold]{here.wrong_bits:.3f}[/bold] at lengths 1 to 20, "
        f"[bold]{longer.wrong_bits:.3f}[/bold] at length 40, never trained on",
        highlight=False,
    )
    return {**measured, "bar": BAR, "reached": reached}


def picture(console: Console) -> None:
    """Draws the model that was trained last."""
    path = machine.RESULTS / "ntm_copy.png"
    save_picture(loop.resume(FOLDER), {}, EVALUATION_SEED, path)
    console.print(f"picture: {path}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """One training a seed."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.ntm_copy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each seed")
    parser.add_argument("--json", type=Path, help="keep the results there")
    args = parser.parse_args(argv)
    console = report.console()
    runs = [train_copy(console, args.seconds, seed) for seed in args.seeds]
    reached = sum(run["reached"] for run in runs)
    console.print(f"{reached} of {len(runs)} seeds within {args.seconds:g} s", highlight=False)
    picture(console)
    if args.json:
        content = {"job": "ntm_copy", "machine": machine.describe(), "runs": runs}
        report.write_json(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
