"""The NTM paper's tasks, learnt from nothing by the clock, seed by seed.

    python -m benchmarks.studies.ntm_tasks [copy|repeat_copy|...] [--seeds 0 1 2 3 4] [--json PATH]

Standard settings of `python -m seqmem_fast train`: the paper's sizes, 128 slots of 20, an LSTM
controller of 100, one write and one read head, one thread. The time is all of it: building,
training, judging. Keeps a checkpoint and its picture in benchmarks/results.

On a machine that has other work, --cpu-clock counts the seconds that the processor spent on it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import machine, report
from seqmem_fast.plot.trained import save_picture
from seqmem_fast.tasks import TASKS, Score, evaluate, loop
from seqmem_fast.tasks.display import EVALUATION_SEED, Bar
from seqmem_fast.tasks.settings import standard
from seqmem_fast.tasks.training import Training

JUDGING_S = 4.0  # kept free at the end
SEQUENCES = 2000  # of training's sizes, four of each size drawn
LARGER = 100  # of each size beyond
TRAINED = "as in training"
SECONDS = {"copy": 60.0, "copy_in_turn": 300.0, "graph_traversal": 900.0}
USUAL_S = 600.0

# What to stay under: size, figure, most. The paper's learning curves show the cost in bits a
# sequence: figure 7 (repeat copy) on an axis of 200, figure 10 (associative recall) on one of 20.
# An NTM's curves end on the axis itself; a two-hundredth of its length is what one could see.
# The DNC paper shows a picture of copying in turn and no figure: less than a bit of up to 320.
BARS: dict[str, list[tuple[str, str, float]]] = {
    "copy": [(TRAINED, "wrong_bits", 0.01), ("length 40", "wrong_bits", 1.0)],
    "repeat_copy": [(TRAINED, "cost", 1.0), (TRAINED, "wrong_bits", 0.1)],
    "associative_recall": [(TRAINED, "cost", 0.1), (TRAINED, "wrong_bits", 0.01)],
    "copy_in_turn": [(TRAINED, "wrong_bits", 1.0)],
    "graph_traversal": [  # nine of ten answers right: of 10 a sequence in the mean, and of 16
        (TRAINED, "wrong_bits", 1.0),
        ("random: 8 nodes, 20 edges, paths of 4", "wrong_bits", 1.6),
    ],
}


def folder(task: str) -> Path:
    """Where the checkpoint of the last training is kept."""
    return machine.RESULTS / task


def scores_of(training: Training) -> dict[str, Score]:
    """Fresh sequences of training's sizes and of each larger one, by name."""
    model, task = training.model, training.task
    found = {TRAINED: evaluate(model, task, None, SEQUENCES, EVALUATION_SEED, batch_size=4)}
    for probe in task.probes():
        found[probe.label] = evaluate(model, task, probe.size, LARGER, EVALUATION_SEED)
    return found


def passes(task: str, scores: Mapping[str, Score]) -> bool | None:
    """Whether the scores are under the task's bar; None where it has none."""
    if task not in BARS:
        return None
    return all(getattr(scores[size], figure) < most for size, figure, most in BARS[task])


def train(
    console: Console, task: str, seconds: float, seed: int = 0, cpu_clock: bool = False
) -> dict[str, Any]:
    """Trains for at most that long and judges on fresh sequences; the result is fit for JSON."""
    clock = time.process_time if cpu_clock else time.perf_counter
    start, cpu = clock(), time.process_time()
    training = Training(standard(task).with_changes(seed=seed))
    limit = float("inf") if cpu_clock else max(0.0, seconds - JUDGING_S)
    limits = loop.Limits(seconds=limit, checkpoint_every=10**9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps of milliseconds: on a busy machine threads wait for each other
    try:
        with Bar(console, training) as bar:
            signalled = loop.run(training, folder(task), limits, bar)
        if signalled:
            raise KeyboardInterrupt
        trained = clock() - start
        scores = scores_of(training)
    finally:
        torch.set_num_threads(threads)
    whole = clock() - start
    good = passes(task, scores)
    console.print(
        f"seed {seed}: {training.step_count:,} steps in {trained:.1f} s; wrong bits a sequence: "
        + ", ".join(f"{score.wrong_bits:.3f} ({size})" for size, score in scores.items()),
        highlight=False,
    )
    return {
        "seed": seed,
        "clock": "processor" if cpu_clock else "wall",
        "steps": training.step_count,
        "of_steps": training.settings.steps,
        "learnt_at": training.schedule.turn if training.schedule.learnt else None,
        "batch": training.settings.batch_size,
        "training_s": trained,
        "seconds": whole,
        "cpu_s": time.process_time() - cpu,
        "scores": {size: score._asdict() for size, score in scores.items()},
        "bar": BARS.get(task),
        "reached": None if good is None else good and whole <= seconds,
    }


def picture(console: Console, task: str) -> None:
    """Draws the model that was trained last."""
    path = machine.RESULTS / f"ntm_{task}.png"
    save_picture(loop.resume(folder(task)), {}, EVALUATION_SEED, path)
    console.print(f"picture: {path}", highlight=False)


def table(task: str, runs: Sequence[Mapping[str, Any]]) -> Table:
    """A row a seed: seconds, then wrong bits (and cost) at each size."""
    sizes = list(runs[0]["scores"])
    shown = Table("seed", "steps", "s", *sizes, title=f"{task}: wrong bits (cost in bits)")
    for run in runs:
        found = [f"{s['wrong_bits']:.3f} ({s['cost']:.2f})" for s in run["scores"].values()]
        shown.add_row(str(run["seed"]), f"{run['steps']:,}", f"{run['seconds']:.0f}", *found)
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """One training a seed."""
    parser = report.parser("benchmarks.studies.ntm_tasks", __doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--seconds", type=float, help="for each seed; standard: its bar's")
    parser.add_argument("--cpu-clock", action="store_true", help="count the processor's time")
    parser.add_argument("--json", type=Path, help="keep the results there, after every seed")
    args = parser.parse_args(argv)
    seconds = SECONDS.get(args.task, USUAL_S) if args.seconds is None else args.seconds
    console = report.console()
    here, runs = machine.describe(), []
    for seed in args.seeds:
        runs.append(train(console, args.task, seconds, seed, args.cpu_clock))
        if args.json:
            content = {"job": "ntm_tasks", "task": args.task, "machine": here, "runs": runs}
            report.write_json(args.json, content)
    console.print(table(args.task, runs))
    if args.task in BARS:
        reached = sum(run["reached"] for run in runs)
        console.print(f"{reached} of {len(runs)} seeds within {seconds:g} s", highlight=False)
    picture(console, args.task)
    return 0


if __name__ == "__main__":
    sys.exit(main())
