"""What memories of a fixed size still know: overwriting recall and distant recall, seed by seed.

    python -m benchmarks.studies.recall overwrite_recall|distant_recall --json PATH
    python -m benchmarks.studies.recall overwrite_recall --json PATH --seeds --out PICTURE

The standard settings of `python -m seqmem_fast train`, one thread. Every training is kept in the
file as it ends; those that it holds already are not done again, so that an interrupted run goes on
and the second line draws alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import machine, report
from seqmem_fast.tasks import DistantRecallTask, Task, evaluate, loop
from seqmem_fast.tasks.display import EVALUATION_SEED, Bar
from seqmem_fast.tasks.settings import Settings, standard
from seqmem_fast.tasks.training import Training

SEQUENCES = 500  # of each size
WRITES = (16, 24, 32, 48, 96, 192)
LONGER = 128  # steps of a stream never trained on

# name: what differs from the standard settings
MEMORIES: dict[str, dict[str, dict[str, Any]]] = {
    "overwrite_recall": {
        "additive": {"model": "additive"},
        "softmax window": {"model": "window"},
        "delta rule": {"model": "delta"},
        "gated delta rule": {"model": "gated_delta"},
    },
    "distant_recall": {
        "plain slots": {"compression": "none"},
        "most used": {"compression": "most_used"},
        "mean": {"compression": "mean"},
        "convolution, by reconstruction": {"compression": "conv_reconstruction"},
        "max": {"compression": "max"},
        "convolution, through the task": {"compression": "conv"},
    },
}
# heading: a size, and a figure of its score
COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "overwrite_recall": {f"{n} writes": (str(n), "right") for n in (48, 96, 192)},
    "distant_recall": {
        f"{span} back": ("80", f"{span} back") for span in ("1-16", "17-32", "33-48", "49-80")
    },
}
COLOURS = ("#7f7f7f", "#e07a3f", "#2a9d4a", "#2a6f97", "#8e4585", "#d0342c")
LINES = (".-", ".-", ".-", ".--", ".:", ".-.")  # several lines lie upon each other


def sizes_of(task: str) -> dict[str, dict[str, int]]:
    """What is judged, by name."""
    if task == "overwrite_recall":
        return {str(n): {"writes": n} for n in WRITES}
    history = DistantRecallTask().history
    return {str(history): {"history": history}}


@torch.no_grad()
def right_by_steps(training: Training, history: int) -> dict[str, float]:
    """The share of right answers by how far back the run of the note began."""
    task = training.task
    assert isinstance(task, DistantRecallTask)
    batch = task.batch(SEQUENCES, torch.Generator().manual_seed(EVALUATION_SEED), history=history)
    shares = task.right_by_run(training.model(batch.input), batch).float().mean(0).tolist()
    return {str(task.apart * run): share for run, share in enumerate(shares, 1)}


def train(console: Console, settings: Settings, memory: str) -> dict[str, Any]:
    """Trains to the last step and judges on fresh sequences; the result is fit for JSON."""
    start, cpu = time.perf_counter(), time.process_time()
    training = Training(settings)
    with Bar(console, training) as bar:
        if loop.run(training, None, loop.Limits(), bar):
            raise KeyboardInterrupt
    trained, trained_cpu = time.perf_counter() - start, time.process_time() - cpu
    training.model.eval()
    scores = {
        name: evaluate(training.model, training.task, size, SEQUENCES, EVALUATION_SEED)
        for name, size in sizes_of(settings.task).items()
    }
    run: dict[str, Any] = {
        "memory": memory,
        "seed": settings.seed,
        "settings": settings.to_json(),
        "steps": training.step_count,
        "sequences": SEQUENCES,
        "loss": bar.loss,
        "seconds": trained,
        "cpu_s": trained_cpu,
        "date": machine.describe()["date"],
        "scores": {name: score._asdict() for name, score in scores.items()},
    }
    if isinstance(training.task, DistantRecallTask):
        run["by_steps"] = right_by_steps(training, LONGER)
    shares = {name: score.further for name, score in scores.items()}
    console.print(f"{memory}, seed {settings.seed}: {trained_cpu:.0f} s {shares}", highlight=False)
    return run


def figure_of(run: Mapping[str, Any], size: str, figure: str) -> float:
    """Of a run's score at that size."""
    return float(run["scores"][size]["further"][figure])


def table(task: str, runs: Sequence[Mapping[str, Any]]) -> Table:
    """A row a memory: the mean over seeds, and the least and the most."""
    columns = COLUMNS[task]
    shown = Table("memory", "seeds", "processor s", *columns, title=f"{task}: right answers")
    for memory in MEMORIES[task]:
        mine = [run for run in runs if run["memory"] == memory]
        if not mine:
            continue
        cells = []
        for size, figure in columns.values():
            found = [figure_of(run, size, figure) for run in mine]
            cells.append(f"{sum(found) / len(found):.3f} ({min(found):.3f}-{max(found):.3f})")
        seconds = sum(run["cpu_s"] for run in mine) / len(mine)
        shown.add_row(memory, str(len(mine)), f"{seconds:.0f}", *cells)
    return shown


def curve(task: Task, run: Mapping[str, Any]) -> dict[int, float]:
    """The share of right answers by the number of writes, or of steps back."""
    if isinstance(task, DistantRecallTask):
        return {int(steps): share for steps, share in run["by_steps"].items()}
    return {int(size): figure_of(run, size, "right") for size in run["scores"]}


def draw(name: str, runs: Sequence[Mapping[str, Any]]) -> Any:
    """A matplotlib Figure: a line a memory, the mean over seeds, and a band from least to most."""
    from matplotlib.figure import Figure

    task = standard(name).build_task()
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for memory, colour, line in zip(MEMORIES[name], COLOURS, LINES, strict=False):
        curves = [curve(task, run) for run in runs if run["memory"] == memory]
        if not curves:
            continue
        places = [*curves[0]]
        each = torch.tensor([[one[place] for place in places] for one in curves])
        axes.plot(places, each.mean(0).tolist(), line, color=colour, label=memory)
        low, high = (part.values.tolist() for part in (each.min(0), each.max(0)))
        axes.fill_between(places, low, high, color=colour, alpha=0.2, lw=0)
    axes.axhline(1 / task.output_size, color="#333333", lw=0.8, ls=":")
    axes.annotate("chance", (1, 1 / task.output_size), xycoords=("axes fraction", "data"),
                  xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    if isinstance(task, DistantRecallTask):
        ends, trained = [0, 16, 32, 80, 128], task.history
        axes.set_xticks(ends)
        axes.set_xlabel("steps from the note to the questions")
        said = "longest stream trained on"
    else:
        trained = task.probes()[0].size["writes"]
        axes.set_xscale("log", base=2)
        axes.set_xticks(WRITES, [str(n) for n in WRITES])
        axes.set_xlabel("writes to 16 keys before the questions")
        said = "trained on"
    axes.axvline(trained, color="#333333", lw=0.8, ls="--")
    axes.annotate(said, (trained, 0.72), rotation=90, ha="right", va="center", fontsize=8)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("right answers")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """One training a memory and seed."""
    parser = report.parser("benchmarks.studies.recall", __doc__)
    parser.add_argument("task", choices=MEMORIES)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path, required=True, help="what was found; it grows")
    parser.add_argument("--out", type=Path, help="draw the picture")
    args = parser.parse_args(argv)
    console = report.console()
    content = {"job": "recall", "task": args.task, "machine": machine.describe(), "runs": []}
    if args.json.exists():
        content = json.loads(args.json.read_text())
    runs: list[dict[str, Any]] = content["runs"]
    done = {(run["memory"], run["seed"]) for run in runs}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for seed in args.seeds:
            for memory, changes in MEMORIES[args.task].items():
                if (memory, seed) not in done:
                    settings = standard(args.task).with_changes(seed=seed, **changes)
                    runs.append(train(console, settings, memory))
                    report.write_json(args.json, content)
    finally:
        torch.set_num_threads(threads)
    console.print(table(args.task, runs))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw(args.task, runs).savefig(args.out, dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
