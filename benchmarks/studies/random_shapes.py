"""Is an op anywhere slower than what it replaces? Random shapes, one verdict.

    python -m benchmarks.studies.random_shapes [--op lstm] [--count 40] [--seed 0] [--fresh]

benchmarks/bench_<op>.py gives the shapes (random_rows) and the main peer: eager PyTorch, or the
module of torch.nn that the op replaces. A draw that would take too long is drawn again; how many
were is printed and kept. Rows below the bar alone are measured a second time, three times as
long, and the second figure counts; both are kept. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.harness import machine, report
from benchmarks.harness.measure import measure
from benchmarks.harness.rows import MODES, Row
from benchmarks.harness.timing import CLOCKS, Budget

BAR = 0.95
COUNT = {"lstm": 60, "lstm_cell": 60}  # 40 for every other op
CELL = "lstm_cell"  # loops over a cell, of the LSTM's benchmark
DRAWS = 100  # for each shape; a generator that refuses more often asks for too little

Draw = Callable[[random.Random, int], "list[Row] | None"]


def draw(random_rows: Draw, count: int, seed: int) -> tuple[list[list[Row]], int]:
    """`count` shapes, each as the rows of its modes, and how many draws were refused."""
    rng = random.Random(seed)
    shapes: list[list[Row]] = []
    over = 0
    while len(shapes) < count:
        found = random_rows(rng, len(shapes))
        if found:
            shapes.append(found)
        else:
            over += 1
        if over > DRAWS * count:
            raise RuntimeError(f"{over} draws were refused: random_rows asks for too large shapes")
    return shapes, over


def ratios(shape: Sequence[Row], budget: Budget) -> dict[str, dict[str, Any]]:
    """The main peer against ours, in each mode."""
    out = {}
    for row in shape:
        [found] = measure(row, budget, only=row.build().peers[:1])
        out[row.mode] = {
            "peer": found.peer,
            "peer_s": found.peer_s,
            "ours_s": found.ours_s,
            "ratio": found.ratio,
            "error": found.ours_error,
            "samples": found.ours_samples,
        }
    return out


def measure_shape(shape: Sequence[Row], seconds: float, clock: str) -> dict[str, Any]:
    """One shape; where a ratio is below the bar, measured again three times as long."""
    row: dict[str, Any] = {"row": shape[0].label, "dtype": shape[0].dtype}
    row["modes"] = ratios(shape, Budget(seconds, 12 * seconds, clock=clock))
    if min(mode["ratio"] for mode in row["modes"].values()) < BAR:
        row["first_attempt"] = row["modes"]
        row["modes"] = ratios(shape, Budget(3 * seconds, 36 * seconds, clock=clock))
    return row


def show(console: Console, content: Mapping[str, Any]) -> None:
    """Every shape, then the slowest of each mode and all below the bar."""
    results = content["results"]
    modes = [mode for mode in MODES if any(mode in row["modes"] for row in results)]
    out = Table(title=machine.one_line(content["machine"]), title_justify="left", box=SIMPLE_HEAD)
    heads = [f"{content['op']}, shape ({content['letters']}), dtype"]
    for mode in modes:
        heads += [f"peer's {mode}", "ratio"]
    for name in (*heads, "error", "measured again"):
        out.add_column(name, justify="right", no_wrap=True)
    for row in results:
        cells = [f"{row['row']}  {report.SHORT_DTYPE.get(row['dtype'], row['dtype'])}"]
        for mode in modes:
            found = row["modes"].get(mode)
            if found is None:
                cells += ["", ""]
                continue
            colour = "green" if found["ratio"] >= BAR else "red"
            cells += [
                report.duration(found["peer_s"]),
                f"[{colour}]{found['ratio']:.2f}[/{colour}]",
            ]
        errors = [found["error"] for found in row["modes"].values() if found["error"] is not None]
        out.add_row(
            *cells,
            report.scale_of(max(errors, default=None)),
            "yes" if "first_attempt" in row else "",
        )
    console.print(out)
    for mode in modes:
        found = sorted(row["modes"][mode]["ratio"] for row in results if mode in row["modes"])
        below = sum(ratio < BAR for ratio in found)
        console.print(
            f"{mode}: {len(found)} rows, smallest ratio {found[0]:.2f}, median "
            f"{found[len(found) // 2]:.2f}, {below} below {BAR}",
            highlight=False,
        )
    if content["over_cap"]:
        console.print(
            f"{content['over_cap']} draws were too large to measure and drawn again",
            style="dim",
            highlight=False,
        )


def kept_rows(path: Path, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an interrupted run that was asked for the same thing."""
    if not path.is_file():
        return []
    content = json.loads(path.read_text())
    same = all(content.get(name) == value for name, value in asked.items())
    return content["results"] if same else []


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is not yet measured, then shows all."""
    parser = report.parser("benchmarks.studies.random_shapes", __doc__)
    parser.add_argument("--op", default="lstm", choices=[*machine.ops(), CELL])
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--malloc", choices=("D", "M"), default="D")
    parser.add_argument("--seconds", type=float, default=1.5, help="for one side of one row")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    machine.ensure_process("benchmarks.studies.random_shapes", args.malloc, args.threads)

    torch.set_num_threads(args.threads)
    bench = import_module(f"benchmarks.bench_{'lstm' if args.op == CELL else args.op}")
    random_rows = bench.random_cell_rows if args.op == CELL else bench.random_rows
    shapes, over = draw(random_rows, args.count or COUNT.get(args.op, 40), args.seed)
    path: Path = args.json or machine.RESULTS / f"random_shapes_{args.op}.json"
    here = machine.describe()
    asked = {
        "schema": report.SCHEMA,
        "op": args.op,
        "seed": args.seed,
        "threads": args.threads,
        "malloc": args.malloc,
        "seconds": args.seconds,
        "clock": args.clock,
        "commit": here["commit"],
    }
    content = {
        "job": "random_shapes",
        "machine": here,
        **asked,
        "letters": bench.LETTERS,
        "over_cap": over,
        "results": [] if args.fresh else kept_rows(path, asked)[: len(shapes)],
    }
    console = report.console()
    with report.progress_bar(console) as bar:
        task = bar.add_task("", total=len(shapes), completed=len(content["results"]))
        for shape in shapes[len(content["results"]) :]:
            bar.update(task, description=f"{shape[0].label} {shape[0].dtype}")
            content["results"].append(measure_shape(shape, args.seconds, args.clock))
            report.write_json(path, content)
            bar.advance(task)
    show(console, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
