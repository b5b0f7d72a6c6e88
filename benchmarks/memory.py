"""Peak memory of one LSTM training step: nn.LSTM and this package, each in its own process.

    python -m benchmarks.memory [--shape T B I H] [--dtype float32] [--json PATH]

Counts how far the process's peak resident size rises above its size just before the step, the
library having been warmed up on one short sequence. Linux alone (VmHWM of /proc/self/status;
getrusage's ru_maxrss would start from the parent's peak).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks import machine, report

SHAPE = (1000, 32, 256, 256)  # T, B, I, H
SIDES = ("nn.LSTM", "ours")


def status_kib(field: str) -> int:
    """A size of this process, in KiB: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def step(module: nn.Module, x: torch.Tensor) -> None:
    """Forward, sum, backward to weights and input."""
    module(x)[0].sum().backward()
    module.zero_grad(set_to_none=True)
    x.grad = None


def growth_kib(side: str, shape: Sequence[int], dtype: torch.dtype) -> int:
    """How many KiB the peak of this very process grows by one training step."""
    import seqmem_fast

    t, b, i, h = shape
    torch.manual_seed(0)
    lstm = nn.LSTM if side == "nn.LSTM" else seqmem_fast.LSTM
    module = lstm(i, h, dtype=dtype)
    step(module, torch.randn(2, b, i, dtype=dtype, requires_grad=True))
    x = torch.randn(t, b, i, dtype=dtype, requires_grad=True)
    before = status_kib("VmRSS")
    step(module, x)
    return status_kib("VmHWM") - before


def measure(shape: Sequence[int], dtype: str, threads: int) -> dict[str, Any]:
    """Both sides, each in a fresh process."""
    kib = {}
    for side in SIDES:
        command = [
            sys.executable,
            "-m",
            "benchmarks.memory",
            "--child",
            side,
            "--dtype",
            dtype,
            "--threads",
            str(threads),
            "--shape",
            *map(str, shape),
        ]
        done = subprocess.run(
            command,
            cwd=machine.ROOT,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=machine.child_environment("D", threads),
        )
        kib[side] = int(done.stdout)
    return {
        "shape": list(shape),
        "dtype": dtype,
        "threads": threads,
        "growth_kib": kib,
    }


def show(console: Console, row: Mapping[str, Any]) -> None:
    """One line, red where this package takes more than nn.LSTM."""
    theirs, ours = (row["growth_kib"][side] / 1024 for side in SIDES)
    style = "green" if ours <= theirs else "red"
    console.print(
        f"peak memory of a training step, LSTM {', '.join(map(str, row['shape']))} "
        f"{report.SHORT_DTYPE.get(row['dtype'], row['dtype'])}: nn.LSTM {theirs:.0f} MiB, "
        f"ours [{style}]{ours:.0f} MiB[/{style}]",
        highlight=False,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The row, printed and kept."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE, metavar=("T", "B", "I", "H"))
    parser.add_argument("--dtype", choices=tuple(report.SHORT_DTYPE), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "memory.json")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.child:
        print(growth_kib(args.child, args.shape, getattr(torch, args.dtype)))
        return 0
    row = measure(args.shape, args.dtype, args.threads)
    content = {
        "schema": report.SCHEMA,
        "job": "memory",
        "machine": machine.describe(),
        "results": [row],
    }
    report.write_json(args.json, content)
    show(report.console(), row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
