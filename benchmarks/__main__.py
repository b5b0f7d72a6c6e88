"""The main job of `make bench`: real training, then the tables, then the chart.

    python -m benchmarks [--full]

Trains a character model on English text with torch.nn.LSTM and with seqmem_fast.LSTM, checks that
both come to the same losses, then measures every row. Ends within five minutes; --full measures
longer, at one and two threads, under both malloc regimes.
"""

from __future__ import annotations

import argparse
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

from benchmarks import charlm, chart, gates, machine, memory, report

LIMIT_S = 285.0  # of the short run, the closing table and chart included
TRAINING_S = 30.0  # for torch.nn.LSTM's share of the training
CLOSING_S = 20.0  # the memory row and the chart


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
            f"{b:.5f}   apart by {abs(a - b) / a:.1e}, at most "
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


def rows(threads: int, regime: str, options: Sequence[str]) -> dict[str, Any]:
    """One pass over all rows, in a process that starts under the malloc regime asked for."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.bench_lstm",
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
    """The memory row; nothing where the system does not tell peaks."""
    if not Path("/proc/self/status").is_file():
        console.print("left out: peak memory, which only Linux tells", style="yellow")
        return []
    row = memory.measure(memory.SHAPE, "float32", threads)
    memory.show(console, row)
    return [row]


def keep(console: Console, name: str, content: Mapping[str, Any]) -> None:
    """The JSON, and the chart of its first table."""
    path = machine.RESULTS / f"{name}.json"
    report.write_json(path, content)
    chart.save(chart.first_table(content), path.with_suffix(".png"))
    console.print(f"kept: {path}\nchart: {path.with_suffix('.png')}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, measures, keeps."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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

    console.rule("LSTM rows, side by side")
    if args.full:
        options = ["--seconds", "3"]
        tables = [
            rows(n, regime, options) for n in sorted({threads, 1}, reverse=True) for regime in "DM"
        ]
    else:
        left = LIMIT_S - CLOSING_S - (time.perf_counter() - start)
        tables = [rows(threads, "D", ["--seconds", "0.7", "--limit", f"{left:.0f}"])]
    content = {
        "schema": report.SCHEMA,
        "job": "bench",
        "machine": machine.describe(),
        "charlm": training,
        "tables": tables,
        "memory": peak_memory(console, threads),
    }
    keep(console, "bench_full" if args.full else "bench", content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
