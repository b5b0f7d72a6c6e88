"""Is the LSTM anywhere slower than nn.LSTM? Random shapes, one verdict.

    python -m benchmarks.random_shapes [--count 60] [--seed 0] [--json PATH] [--fresh]

T 1..512, B 1..128, I and H 1..1024, each log-uniform; fp32 and bf16 by turns, one and two layers
by turns. A shape whose forward pass takes more multiply-adds than a cap is drawn again, so that
one call of the baseline stays within seconds; the caps and how many draws they cost are
printed and kept. Rows below the bar are measured a second time for longer, and the second figure
counts; both are kept. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

import seqmem_fast
from benchmarks import machine, report
from benchmarks.lstm_sides import MODES, Sample, layer
from benchmarks.timing import Budget, Side, compare

RANGES = {"t": 512, "b": 128, "i": 1024, "h": 1024}
BAR = 0.95
# billions of multiply-adds; without bf16 in hardware nn.LSTM trains bf16 some 50 times slower
CAPS_HARDWARE = {"float32": 15.0, "bfloat16": 15.0}
CAPS_EMULATED = {"float32": 15.0, "bfloat16": 1.0}


@dataclass(frozen=True)
class Shape:
    """One configuration."""

    t: int
    b: int
    i: int
    h: int
    layers: int
    dtype: str

    @property
    def gmacs(self) -> float:
        """Billions of multiply-adds of one forward pass."""
        widths = [self.i] + [self.h] * (self.layers - 1)
        return self.t * self.b * 4 * self.h * sum(width + self.h for width in widths) / 1e9

    def __str__(self) -> str:
        return f"{self.t}, {self.b}, {self.i}, {self.h}"


def draw(count: int, seed: int, caps: Mapping[str, float]) -> tuple[list[Shape], int]:
    """The shapes, and how many draws were over the cap."""
    rng = random.Random(seed)
    shapes: list[Shape] = []
    over = 0
    while len(shapes) < count:
        place = len(shapes)
        sizes = {
            name: round(math.exp(rng.uniform(0, math.log(most)))) for name, most in RANGES.items()
        }
        shape = Shape(**sizes, layers=1 + place // 2 % 2, dtype=("float32", "bfloat16")[place % 2])
        if shape.gmacs <= caps[shape.dtype]:
            shapes.append(shape)
        else:
            over += 1
    return shapes, over


def ratios(shape: Shape, budget: Budget) -> dict[str, dict[str, Any]]:
    """nn.LSTM against ours in both modes."""
    dtype = getattr(torch, shape.dtype)
    torch.manual_seed(0)
    theirs = nn.LSTM(shape.i, shape.h, shape.layers, dtype=dtype)
    ours = seqmem_fast.LSTM(shape.i, shape.h, shape.layers, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    out = {}
    for mode, make in MODES.items():
        pool = [
            Sample(
                torch.randn(shape.t, shape.b, shape.i, dtype=dtype).requires_grad_(
                    mode != "inference"
                )
            )
            for _ in range(4)
        ]
        sides = [
            make(name, module, layer) for name, module in (("nn.LSTM", theirs), ("ours", ours))
        ]
        found = compare([Side(s.name, s.call, pool, s.values) for s in sides], budget)
        peer_s, ours_s = found["nn.LSTM"].median_s, found["ours"].median_s
        out[mode] = {
            "peer_s": peer_s,
            "ours_s": ours_s,
            "ratio": peer_s / ours_s,
            "samples": len(found["ours"].samples),
        }
    return out


def measure(shape: Shape, seconds: float) -> dict[str, Any]:
    """One row; where a ratio is below the bar, measured again three times as long."""
    row: dict[str, Any] = {**asdict(shape), "gmacs": shape.gmacs}
    row["modes"] = ratios(shape, Budget(seconds, 12 * seconds))
    if min(mode["ratio"] for mode in row["modes"].values()) < BAR:
        row["first_attempt"] = row["modes"]
        row["modes"] = ratios(shape, Budget(3 * seconds, 36 * seconds))
    return row


def show(console: Console, content: Mapping[str, Any]) -> None:
    """Every row, then the slowest of each mode and all below the bar."""
    out = Table(title=machine.one_line(content["machine"]), title_justify="left", box=SIMPLE_HEAD)
    for name in (
        "T, B, I, H",
        "layers",
        "dtype",
        "nn.LSTM inference",
        "ratio",
        "nn.LSTM training",
        "ratio",
        "measured again",
    ):
        out.add_column(name, justify="right", no_wrap=True)
    for row in content["results"]:
        cells = []
        for mode in MODES:
            ratio = row["modes"][mode]["ratio"]
            colour = "green" if ratio >= BAR else "red"
            cells += [
                report.duration(row["modes"][mode]["peer_s"]),
                f"[{colour}]{ratio:.2f}[/{colour}]",
            ]
        shape = ", ".join(str(row[name]) for name in "tbih")
        out.add_row(
            shape,
            str(row["layers"]),
            report.SHORT_DTYPE[row["dtype"]],
            *cells,
            "yes" if "first_attempt" in row else "",
        )
    console.print(out)
    for mode in MODES:
        found = sorted(row["modes"][mode]["ratio"] for row in content["results"])
        below = sum(ratio < BAR for ratio in found)
        console.print(
            f"{mode}: {len(found)} rows, smallest ratio {found[0]:.2f}, median "
            f"{found[len(found) // 2]:.2f}, {below} below {BAR}",
            highlight=False,
        )
    console.print(
        f"{content['over_cap']} draws were over the cap of {content['caps']} billion "
        "multiply-adds and drawn again",
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
    parser = argparse.ArgumentParser(
        prog="benchmarks.random_shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--malloc", choices=("D", "M"), default="D")
    parser.add_argument("--seconds", type=float, default=1.5, help="for one side of one row")
    parser.add_argument("--cap-fp32", type=float, help="billions of multiply-adds")
    parser.add_argument("--cap-bf16", type=float, help="billions of multiply-adds")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted run")
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "random_shapes.json")
    args = parser.parse_args(argv)
    machine.ensure_process("benchmarks.random_shapes", args.malloc, args.threads)

    torch.set_num_threads(args.threads)
    here = machine.describe()
    caps = dict(CAPS_HARDWARE if here["bf16_in_hardware"] else CAPS_EMULATED)
    caps |= {
        name: cap for name, cap in (("float32", args.cap_fp32), ("bfloat16", args.cap_bf16)) if cap
    }
    shapes, over = draw(args.count, args.seed, caps)
    asked = {
        "seed": args.seed,
        "caps": caps,
        "threads": args.threads,
        "malloc": args.malloc,
        "commit": here["commit"],
    }
    content = {
        "schema": report.SCHEMA,
        "job": "random_shapes",
        "machine": here,
        **asked,
        "over_cap": over,
        "results": [] if args.fresh else kept_rows(args.json, asked),
    }
    console = report.console()
    with report.progress_bar(console) as bar:
        task = bar.add_task("", total=len(shapes), completed=len(content["results"]))
        for shape in shapes[len(content["results"]) :]:
            bar.update(task, description=f"{shape} {shape.dtype}, {shape.layers} layer(s)")
            content["results"].append(measure(shape, args.seconds))
            report.write_json(args.json, content)
            bar.advance(task)
    show(console, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
