"""Time per step of a memory network as its memory and its sequences grow.

python -m benchmarks.studies.scaling [--op ntm|dnc] [--threads 2] [--seconds 1] [--out PICTURE]

The NTM's must stay linear in its slots, the DNC's in their square (its links), both level in T.
On a machine that has other work: --clock processor --threads 1.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks import bench_dnc, bench_ntm
from benchmarks.harness import machine, report, rows
from benchmarks.harness.timing import CLOCKS, Clock

BATCH, WIDTH, CONTROL, FEW, STANDARD = 4, 20, 100, 41, 128
TIMES = (10, 100, 1000, 10000)


@dataclass(frozen=True)
class Sweep:
    """What grows for an op: its slots, and its work for T steps of N slots."""

    slots: tuple[int, ...]
    power: int  # of the slots, that a step's time may grow by
    work: Callable[[int, int], rows.Work]


SWEEPS = {
    "ntm": Sweep(
        (32, 128, 512, 2048, 8192),
        1,
        lambda steps, slots: bench_ntm.sequence_work(steps, BATCH, slots, WIDTH, CONTROL),
    ),
    "dnc": Sweep(
        (16, 32, 64, 128, 256, 512),
        2,
        lambda steps, slots: bench_dnc.sequence_work(steps, BATCH, slots, WIDTH, CONTROL, 4),
    ),
}


def seconds_per_step(
    sweep: Sweep, mode: str, time_steps: int, slots: int, budget_s: float, clock: Clock
) -> float:
    """The median over calls of at most `budget_s` in all (three at least), per step."""
    built = rows.bench(sweep.work(time_steps, slots), mode)
    ours = built.contenders[rows.OURS]()
    inputs = itertools.cycle([ours.prepare(built.sample(seed)) for seed in range(2)])
    ours.call(next(inputs))
    samples: list[float] = []
    while len(samples) < 3 or (sum(samples) < budget_s and len(samples) < 200):
        given = next(inputs)
        start = clock()
        ours.call(given)
        samples.append(clock() - start)
    return statistics.median(samples) / time_steps


def measure(
    sweep: Sweep, budget_s: float, clock: Clock, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One record for each mode and size of the two sweeps."""
    sizes = [("N", FEW, n) for n in sweep.slots] + [("T", t, STANDARD) for t in TIMES]
    found = []
    for mode, (grows, time_steps, slots) in itertools.product(rows.MODES, sizes):
        tell(f"{mode}, T {time_steps}, N {slots}")
        step_s = seconds_per_step(sweep, mode, time_steps, slots, budget_s, clock)
        found.append({"mode": mode, "grows": grows, "T": time_steps, "N": slots, "step_s": step_s})
    return found


def draw(sweep: Sweep, found: Sequence[dict[str, Any]], here: dict[str, Any]) -> Any:
    """Two panels on logarithmic scales: growth with the slots, and with the steps.

    Dashed: a + b N^power through the least and the largest memory.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"N": f"slots N (T {FEW})", "T": f"steps T (N {STANDARD})"}
    for axes, (letter, title) in zip(panels, titles.items(), strict=True):
        for mode in rows.MODES:
            line = [r for r in found if r["grows"] == letter and r["mode"] == mode]
            sizes, times = [r[letter] for r in line], [r["step_s"] * 1e6 for r in line]
            (drawn,) = axes.plot(sizes, times, "o-", label=mode)
            if letter == "N":
                grown = [size**sweep.power for size in sizes]
                slope = (times[-1] - times[0]) / (grown[-1] - grown[0])
                straight = [times[0] + slope * (size - grown[0]) for size in grown]
                axes.plot(sizes, straight, "--", color=drawn.get_color(), linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel=title)
        axes.set_xticks(sizes, [str(size) for size in sizes])
    finish(figure, panels, here)
    return figure


def finish(figure: Any, panels: Any, here: dict[str, Any]) -> None:
    """What all pictures of times a step have: grids, a legend, and the machine."""
    for axes in panels:
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("us a step")
    panels[0].legend(frameon=False)
    figure.suptitle(machine.one_line(here), fontsize=8, color="#555555", x=0.01, ha="left")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures both sweeps, prints a table, keeps JSON and the picture."""
    parser = report.parser("benchmarks.studies.scaling", __doc__)
    parser.add_argument("--op", choices=SWEEPS, default="ntm")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=1.0, help="for one size in one mode")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path, help="standard: results/<op>_scaling.json")
    parser.add_argument("--out", type=Path, help="standard: results/<op>_scaling.png")
    args = parser.parse_args(argv)
    job = f"{args.op}_scaling"
    torch.set_num_threads(args.threads)
    console = report.console()
    with console.status("") as status:
        found = measure(SWEEPS[args.op], args.seconds, CLOCKS[args.clock], status.update)
    here = machine.describe()
    kept = {"job": job, "machine": here, "clock": args.clock, "results": found}
    report.write_json(args.json or machine.RESULTS / f"{job}.json", kept)
    draw(SWEEPS[args.op], found, here).savefig(args.out or machine.RESULTS / f"{job}.png", dpi=130)
    table = Table(title=f"{args.op}, B {BATCH}, M {WIDTH}, C {CONTROL}", title_justify="left")
    for name in ("mode", "T", "N", "a step"):
        table.add_column(name, justify="right")
    for r in found:
        table.add_row(r["mode"], str(r["T"]), str(r["N"]), report.duration(r["step_s"]))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
