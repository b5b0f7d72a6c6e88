"""The main job of `make bench`: real training, then the tables of all ops, then the chart.

    python -m benchmarks [--full]

Trains a character model on English text with torch.nn.LSTM and with seqmem_fast.LSTM and checks
that both come to the same losses; trains the NTM on the copy task for its minute; then measures
the rows of every bench_<op>.py. Ends within eight minutes; --full measures all rows for longer, at
one and two threads, under both malloc regimes.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness import chart, machine, memory, report
from benchmarks.harness.rows import TRAINING
from benchmarks.studies import charlm, gates, ntm_tasks

LIMIT_S = 470.0  # of the short run, the closing table and chart included
TRAINING_S = 20.0  # for torch.nn.LSTM's share of the character model's training
COPY_S = 60.0
CLOSING_S = 20.0  # the memory row and the chart
LEAST_S = 10.0  # for a table, whatever the trainings took
LSTM_WEIGHT = 3  # its table is three times as long as another op's


def train(console: Console, seconds: float) -> dict[str, Any]:
    """The character model by both; keeps ours for `plot gates`; raises if the losses differ."""
    console.rule("A character model on the Python language reference, trained twice")
    corpus = charlm.Corpus.of(charlm.english())
    steps = charlm.steps_within(seconds, corpus)
    theirs, ours = charlm.train_both(corpus, steps, console)
    measured = charlm.summary(theirs, ours, corpus)
    for name, (a, b) in ((key, measured[key]) for key in charlm.TOLERANCES):
        console.print(
            f"{name.replace('_', ' '):<14} torch.nn.LSTM {a:.5f}   seqmem_fast.LSTM "
            f"{b:.5f}   difference {abs(a - b) / a:.1e}, at most "
            f"{charlm.TOLERANCES[name]:g} allowed",
            highlight=False,
        )
    charlm.check_losses(measured)
    speeds = measured["characters_per_second"]
    console.print(
        f"characters per second: torch.nn.LSTM {speeds[0]:,.0f}, seqmem_fast.LSTM "
        f"{speeds[1]:,.0f}, ratio [bold]{measured['ratio']:.2f}[/bold]",
        highlight=False,
    )
    text = charlm.write(ours.model, corpus.alphabet, "The ", 240)
    console.print(text, style="dim", highlight=False, markup=False)
    charlm.save(gates.CHECKPOINT, ours.model, corpus.alphabet)
    return measured


def copy_task(console: Console, seconds: float) -> dict[str, Any]:
    """The NTM learns to copy, and what it does with its memory is drawn."""
    console.rule("The copy task, learnt by a Neural Turing Machine")
    measured = ntm_tasks.train(console, "copy", seconds)
    ntm_tasks.picture(console, "copy")
    return measured


def share(ops: Sequence[str], left_s: float) -> float:
    """The seconds that the first of these ops may take, so that the others have theirs."""
    weights = [LSTM_WEIGHT if op == "lstm" else 1 for op in ops]
    return max(LEAST_S, left_s * weights[0] / sum(weights))


def rows(op: str, threads: int, regime: str, options: Sequence[str]) -> dict[str, Any]:
    """One pass over an op's rows, in a process that starts under the malloc regime asked for."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [
            sys.executable,
            "-m",
            f"benchmarks.bench_{op}",
            "--threads",
            str(threads),
            "--malloc",
            regime,
            "--json",
            str(path),
            *options,
        ]
        subprocess.run(
            command, cwd=machine.ROOT, check=True, env=machine.child_environment(regime, threads)
        )
        return json.loads(path.read_text())


def peak_memory(console: Console, threads: int) -> list[dict[str, Any]]:
    """The LSTM's training step; nothing where the system does not tell peaks."""
    if not Path("/proc/self/status").is_file():
        console.print("left out: peak memory, which only Linux tells", style="yellow")
        return []
    row = memory.measure("lstm", TRAINING, threads)
    memory.show(console, row)
    return [row]


def keep(console: Console, path: Path, content: Mapping[str, Any]) -> None:
    """The JSON, and the chart of its first tables."""
    report.write_json(path, content)
    console.print(f"kept: {path}", highlight=False)
    tables = chart.first_tables(content)
    if tables:
        chart.save(tables, path.with_suffix(".png"))
        console.print(f"chart: {path.with_suffix('.png')}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, measures, keeps."""
    start = time.perf_counter()
    parser = report.parser("benchmarks", __doc__)
    parser.add_argument(
        "--full", action="store_true", help="all rows at 1 and 2 threads under both malloc regimes"
    )
    args = parser.parse_args(argv)
    console = report.console()
    threads = min(2, os.cpu_count() or 1)
    torch.set_num_threads(threads)
    console.print(machine.one_line(machine.describe()), highlight=False)
    try:
        training = train(console, TRAINING_S)
    except charlm.LossesDisagree as error:
        console.print(f"the two trainings disagree: {error}", style="bold red")
        return 1

    copying = copy_task(console, COPY_S)

    tables: list[dict[str, Any]] = []
    content: dict[str, Any] = {
        "schema": report.SCHEMA,
        "job": "bench",
        "machine": machine.describe(),
        "charlm": training,
        "copy": copying,
        "tables": tables,
        "memory": [],
    }
    path = machine.RESULTS / ("bench_full.json" if args.full else "bench.json")
    ops = machine.ops()
    failed: list[str] = []

    def add(op: str, threads: int, regime: str, *options: str) -> None:
        console.rule(f"{op}, side by side")
        try:
            tables.append(rows(op, threads, regime, options))
        except subprocess.CalledProcessError as error:
            failed.append(op)
            console.print(f"failed: {op}, exit status {error.returncode}", style="bold red")
        report.write_json(path, content)  # what is measured is not lost to what comes after it

    if args.full:
        for n, regime, op in itertools.product(sorted({threads, 1}, reverse=True), "DM", ops):
            add(op, n, regime, "--seconds", "1")
    else:
        for place, op in enumerate(ops):
            left = LIMIT_S - CLOSING_S - (time.perf_counter() - start)
            limit = share(ops[place:], left)
            add(op, threads, "D", "--seconds", "0.5", "--limit", f"{limit:.0f}")
    content["memory"] = peak_memory(console, threads)
    keep(console, path, content)
    if failed:
        console.print(f"failed: {', '.join(failed)}", style="bold red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
