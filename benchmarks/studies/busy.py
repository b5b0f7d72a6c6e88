"""How much does a busy machine slow us down? The LSTM's and NTM's rows beside other programs.

    python -m benchmarks.studies.busy [--seconds 1.0] [--rows TEXT] [--json PATH]

Three times of each row: ours on all threads, ours on one thread, and torch's (the faster of its
ways, or eager). The loss of a training step computes nothing: a sum of torch's would wait for
threads of its own. They are measured alone; beside a program that keeps one core busy; and with two
and four processes that do the same at once. The mean over all calls counts, since a median would
hide the calls that wait for a time slice.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import bench_lstm, bench_ntm
from benchmarks.harness import machine, measure, report
from benchmarks.harness.rows import OURS, Row, bench
from benchmarks.harness.timing import TORCH_POOL

ONE = "ours, one thread"
BESIDE = "beside a busy core"
SHARING = {"alone": 1, "two at once": 2, "four at once": 4}
CONDITIONS = ["alone", BESIDE, "two at once", "four at once"]


def rows(text: str) -> list[Row]:
    """Sequences in float32: single steps open no team."""
    chosen = [*bench_lstm.ROWS, *bench_ntm.ROWS]
    return [
        row for row in chosen
        if row.op in ("lstm", "ntm") and row.dtype == "float32" and text in str(row)
    ]  # fmt: skip


class _Total(torch.autograd.Function):
    """0, with the gradient that a sum has."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        ctx.shape = output.shape
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.expand(ctx.shape)


def total(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = _Total.apply(outputs[0])
    return loss


class Prepared:
    """One row's sides, each ready to be called."""

    def __init__(self, row: Row) -> None:
        built = bench(replace(row.work(), loss=total), row.mode)
        samples = measure.pool(built.sample, most=4)
        made = {name: built.contenders[name]() for name in (*built.peers, OURS)}
        self.calls = {
            name: (side.call, [side.prepare(sample) for sample in samples])
            for name, side in made.items()
            if side.pool == TORCH_POOL
        }
        self.calls[ONE] = self.calls[OURS]

    def time(self, name: str, seconds: float) -> list[float]:
        """Calls for `seconds`; how long each took."""
        torch.set_num_threads(1 if name == ONE else os.cpu_count() or 1)
        call, given = self.calls[name]
        call(given[0])
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end or len(taken) < 3:
            call(given[len(taken) % len(given)])
            taken.append(time.perf_counter() - start)
        return taken


def work(pipe: Connection, text: str) -> None:
    """A process that times what it is told to: (row, side, seconds), until told None."""
    prepared: dict[int, Prepared] = {}
    chosen = rows(text)
    while (told := pipe.recv()) is not None:
        place, name, seconds = told
        if place not in prepared:
            prepared = {place: Prepared(chosen[place])}
        pipe.send(list(prepared[place].calls) if name is None else
                  prepared[place].time(name, seconds))  # fmt: skip


def spin(core: int) -> None:
    """A program that wants the whole of one core."""
    os.sched_setaffinity(0, {core})
    while True:
        pass


@contextmanager
def busy_core() -> Iterator[None]:
    """Keeps the last core busy."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=spin, args=(max(os.sched_getaffinity(0)),), daemon=True)
    process.start()
    time.sleep(0.5)
    try:
        yield
    finally:
        process.kill()
        process.join()


class Workers:
    """Processes that measure the same thing at the same time."""

    def __init__(self, count: int, text: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            context.Process(target=work, args=(theirs, text), daemon=True).start()
            self.pipes.append(ours)

    def ask(self, count: int, place: int, name: str | None, seconds: float) -> list[Any]:
        """What the first `count` of them answer."""
        for pipe in self.pipes[:count]:
            pipe.send((place, name, seconds))
        return [pipe.recv() for pipe in self.pipes[:count]]

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)


def measured(workers: Workers, place: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Mean and median of a call, by condition and side."""
    sides = workers.ask(len(workers.pipes), place, None, seconds)[0]

    def times(count: int) -> dict[str, Any]:
        found = {}
        for name in sides:
            taken = [t for answer in workers.ask(count, place, name, seconds) for t in answer]
            found[name] = {"mean_s": statistics.fmean(taken), "median_s": statistics.median(taken),
                           "calls": len(taken)}  # fmt: skip
        return found

    out = {condition: times(count) for condition, count in SHARING.items()}
    with busy_core():
        out[BESIDE] = times(1)
    return out


def ratios(found: dict[str, Any]) -> tuple[float, float]:
    """How many times ours goes into its own one-thread time, and into torch's fastest."""
    ours = found[OURS]["mean_s"]
    theirs = min(side["mean_s"] for name, side in found.items() if name not in (OURS, ONE))
    return found[ONE]["mean_s"] / ours, theirs / ours


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Every row: ours, then its one-thread time and torch's time over it."""
    table = Table("row", *CONDITIONS, box=SIMPLE_HEAD)
    for result in results:
        cells = []
        for condition in CONDITIONS:
            found = result["conditions"][condition]
            one, torch_ = ratios(found)
            colour = "green" if one >= 1 / 1.5 and torch_ >= 1 else "red"
            ours = report.duration(found[OURS]["mean_s"])
            cells.append(f"{ours} [{colour}]{one:.2f} {torch_:.2f}[/{colour}]")
        table.add_row(f"{result['row']}, {result['mode']}", *cells)
    console.print(table)
    console.print("ours (mean of all calls); its one-thread time over it; torch's time over it")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures all rows, keeps them after each, shows them."""
    parser = report.parser("benchmarks.studies.busy", __doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for one side of one row")
    parser.add_argument("--rows", default="", help="only rows with this text")
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "busy.json")
    args = parser.parse_args(argv)
    content: dict[str, Any] = {
        "schema": report.SCHEMA,
        "job": "busy",
        "machine": machine.describe(),
        "seconds": args.seconds,
        "results": [],
    }
    workers = Workers(max(SHARING.values()), args.rows)
    console = report.console()
    with report.progress_bar(console) as bar:
        for place, row in enumerate(bar.track(rows(args.rows), description="rows")):
            conditions = measured(workers, place, args.seconds)
            content["results"].append(
                {"row": row.label, "mode": row.mode, "conditions": conditions}
            )
            report.write_json(args.json, content)
    workers.end()
    show(console, content["results"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
