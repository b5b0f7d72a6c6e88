"""Peak memory of one call: each side of an op's MEMORY work, each in a process of its own.

    python -m benchmarks.harness.memory [--op lstm] [--threads 2] [--json PATH]

Counts how far the process's peak resident size rises above its size just before the call, after a
call of the same kind on a small shape has warmed the library up. Linux alone (VmHWM of
/proc/self/status; getrusage's ru_maxrss would start from the parent's peak).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness import machine, report
from benchmarks.harness.rows import MODES, OURS, Work, bench


@dataclass(frozen=True)
class Memory:
    """What a bench_<op>.py declares as MEMORY: the work to look at, and a small one before it."""

    label: str
    work: Callable[[], Work]
    warm_up: Callable[[], Work]


def status_kib(field: str) -> int:
    """A size of this process, in KiB: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def growth_kib(memory: Memory, side: str, mode: str) -> int:
    """How many KiB the peak of this very process grows by one call of that side."""
    for work in (memory.warm_up, memory.work):
        built = bench(work(), mode)
        contender = built.contenders[side]()
        given = contender.prepare(built.sample(0))
        before = status_kib("VmRSS")
        contender.call(given)
    return status_kib("VmHWM") - before


def measure(op: str, mode: str, threads: int) -> dict[str, Any]:
    """The main peer beside ours."""
    memory: Memory = import_module(f"benchmarks.bench_{op}").MEMORY
    kib = {}
    for side in (bench(memory.work(), mode).peers[0], OURS):
        command = [sys.executable, "-m", "benchmarks.harness.memory", "--op", op]
        command += ["--threads", str(threads), "--child", mode, side]
        done = subprocess.run(
            command,
            cwd=machine.ROOT,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=machine.child_environment("D", threads),
        )
        kib[side] = int(done.stdout)
    return {"row": memory.label, "mode": mode, "threads": threads, "growth_kib": kib}


def show(console: Console, row: Mapping[str, Any]) -> None:
    """One line, red where this package takes more than its peer."""
    peer = next(side for side in row["growth_kib"] if side != OURS)
    theirs, ours = (row["growth_kib"][side] / 1024 for side in (peer, OURS))
    style = "green" if ours <= theirs else "red"
    console.print(
        f"peak memory, {row['row']} {row['mode']}: {peer} {theirs:.0f} MiB, "
        f"ours [{style}]{ours:.1f} MiB[/{style}]",
        highlight=False,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Both modes of one op, printed and kept."""
    parser = report.parser("benchmarks.harness.memory", __doc__)
    parser.add_argument("--op", default="lstm", choices=machine.ops())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "memory.json")
    parser.add_argument("--child", nargs=2, metavar=("MODE", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    memory = getattr(import_module(f"benchmarks.bench_{args.op}"), "MEMORY", None)
    if memory is None:
        parser.error(f"bench_{args.op}.py declares no MEMORY")
    if args.child:
        mode, side = args.child
        print(growth_kib(memory, side, mode))
        return 0
    console = report.console()
    found = [measure(args.op, mode, args.threads) for mode in MODES]
    for row in found:
        show(console, row)
    here = machine.describe()
    content = {"schema": report.SCHEMA, "job": "memory", "machine": here, "results": found}
    report.write_json(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
