"""Time per step of attention as sequences grow: to a window, and to all earlier steps by torch.

python -m benchmarks.studies.lengths [--threads 2] [--seconds 1] [--json PATH] [--out PICTURE]

The window's must stay level. Float32, 2 heads of 64 features, the last 256 keys, weights made too;
torch's op makes none. On a machine that has other work: --clock processor --threads 1.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from benchmarks.bench_window_attention import ours
from benchmarks.harness import machine, report, rows
from benchmarks.harness.timing import CLOCKS, Clock
from benchmarks.studies.scaling import Sweep, finish, seconds_per_step

JOB = "window_attention_lengths"
HEADS, WIDTH, KEYS = 2, 64, 256
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
DENSE = 8192  # the longest for attention to all earlier steps


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)


SIDES: dict[str, tuple[Callable[..., tuple[Tensor]], int]] = {
    f"window_attention, {KEYS} keys": (
        partial(ours, left=KEYS - 1, right=0, count=0),
        LENGTHS[-1],
    ),
    "F.sdpa, all earlier steps": (dense, DENSE),
}


def work(call: Callable[..., tuple[Tensor]], steps: int, _: int) -> rows.Work:
    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        return tuple(torch.randn(1, HEADS, steps, WIDTH, generator=rng) for _ in range(3))

    return rows.Work(sample, call, {"itself": call})


def measure(budget_s: float, clock: Clock, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    found = []
    for (side, (call, most)), mode in itertools.product(SIDES.items(), rows.MODES):
        for steps in LENGTHS:
            if steps > most:
                continue
            tell(f"{side}, {mode}, T {steps}")
            sweep = Sweep((), 1, partial(work, call))
            step_s = seconds_per_step(sweep, mode, steps, 0, budget_s, clock)
            found.append({"side": side, "mode": mode, "T": steps, "step_s": step_s})
    return found


def draw(found: Sequence[dict[str, Any]], here: dict[str, Any]) -> Any:
    """Microseconds a step by the length, both on logarithmic scales, inference and training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(rows.MODES), sharey=True)
    for axes, mode in zip(panels, rows.MODES, strict=True):
        for side in SIDES:
            line = [r for r in found if r["side"] == side and r["mode"] == mode]
            axes.plot([r["T"] for r in line], [r["step_s"] * 1e6 for r in line], "o-", label=side)
        axes.set(xscale="log", yscale="log", xlabel="steps T", title=mode)
        axes.set_xticks(LENGTHS, [f"{n // 1024}k" for n in LENGTHS])
    finish(figure, panels, here)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, keeps JSON and the picture."""
    parser = report.parser("benchmarks.studies.lengths", __doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=1.0, help="for one length in one mode")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path, help=f"standard: results/{JOB}.json")
    parser.add_argument("--out", type=Path, help=f"standard: results/{JOB}.png")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = report.console()
    with console.status("") as status:
        found = measure(args.seconds, CLOCKS[args.clock], status.update)
    here = machine.describe()
    kept = {"job": JOB, "machine": here, "clock": args.clock, "results": found}
    report.write_json(args.json or machine.RESULTS / f"{JOB}.json", kept)
    draw(found, here).savefig(args.out or machine.RESULTS / f"{JOB}.png", dpi=130)
    table = Table(title=f"1, {HEADS}, T, {WIDTH}", title_justify="left")
    for name in ("side", "mode", "T", "a step"):
        table.add_column(name, justify="right")
    for r in found:
        table.add_row(r["side"], r["mode"], str(r["T"]), report.duration(r["step_s"]))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
