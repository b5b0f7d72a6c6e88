"""Additive attention rows: eager PyTorch and this package side by side, and their peak memory.

python -m benchmarks.bench_additive_attention [--threads 2] [--malloc D|M] [--rows TEXT]
python -m benchmarks.bench_additive_attention --memory
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console

from benchmarks import machine, memory, report, rows
from seqmem_fast import ops
from seqmem_fast.reference import additive_attention as reference

MODULE = "benchmarks.bench_additive_attention"
LETTERS = "B, T, T, A"
MEMORY_SHAPE = (8, 256, 256, 64)
SIDES: dict[str, Callable[..., Any]] = {
    "eager": reference.additive_attention,
    rows.OURS: ops.additive_attention,
}
MOST = (32, 512, 512, 256)  # of a random shape
CAP = 3e7  # tanh evaluations of a random shape: eager needs up to 20 bytes of memory for each


def work(b: int, queries: int, keys: int, width: int, masked: bool = False) -> rows.Work:
    """A batch with values as wide as the hidden layer; `masked`: rows of keys of any length."""

    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        shapes = (b, queries, width), (b, keys, width), (b, keys, width), (width,)
        mask = None
        if masked:
            lengths = torch.randint(1, keys + 1, (b, 1, 1), generator=rng)
            mask = torch.arange(keys) < lengths
        return (*(torch.randn(shape, generator=rng) for shape in shapes), mask)

    return rows.Work(sample, ops.additive_attention, {"eager": reference.additive_attention})


def shape_rows(
    b: int,
    queries: int,
    keys: int,
    width: int,
    masked: bool = False,
    goals: tuple[float | None, float | None] = (None, None),
) -> list[rows.Row]:
    """Both modes of one shape."""
    shape = f"{b}, {queries}, {keys}, {width}{' masked' if masked else ''}"
    make = partial(work, b, queries, keys, width, masked)
    return rows.pair("additive_attention", shape, make, goals={"eager": goals})


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """A random shape in both modes, every second one masked; None where eager would need GiB."""
    b, queries, keys, width = (round(math.exp(rng.uniform(0, math.log(most)))) for most in MOST)
    if b * queries * keys * width > CAP:
        return None
    return shape_rows(b, queries, keys, width, masked=place % 2 == 1)


ROWS = [
    *shape_rows(8, 256, 256, 64, goals=(5, 4)),
    *shape_rows(8, 256, 256, 64, masked=True),
    *shape_rows(32, 1, 50, 256),  # one step of a decoder
    *shape_rows(32, 20, 30, 128),
]
pytest_generate_tests = rows.generator(ROWS)
test_row = rows.test_row


def growth_kib(side: str, mode: str) -> int:
    """How many KiB the peak of this very process grows by one call."""
    torch.manual_seed(0)

    def call(b: int, queries: int, keys: int, width: int) -> None:
        made = work(b, queries, keys, width).sample(torch.Generator())
        leaves = [t if t is None else t.requires_grad_(mode == rows.TRAINING) for t in made]
        before.append(memory.status_kib("VmRSS"))
        output, _ = SIDES[side](*leaves)
        if mode == rows.TRAINING:
            output.sum().backward()

    before: list[int] = []
    call(1, 8, 8, 8)
    call(*MEMORY_SHAPE)
    return memory.status_kib("VmHWM") - before[-1]


def peak_memory(console: Console) -> None:
    """Both sides in both modes, each in a fresh process."""
    for mode in rows.MODES:
        kib = {}
        for side in SIDES:
            command = [sys.executable, "-m", MODULE, "--growth", side, mode]
            environment = machine.child_environment("D", 2)
            done = subprocess.run(
                command, check=True, text=True, stdout=subprocess.PIPE, env=environment
            )
            kib[side] = int(done.stdout)
        theirs, ours = kib["eager"], kib[rows.OURS]
        console.print(
            f"additive_attention {', '.join(map(str, MEMORY_SHAPE))} {mode}: peak memory grows by "
            f"{theirs / 1024:.0f} MiB in eager, {ours / 1024:.1f} MiB in ours, "
            f"{theirs / ours:.0f} times less",
            highlight=False,
        )


def main(argv: Sequence[str]) -> int:
    """The table, or with --memory the peaks."""
    if argv[:1] == ["--growth"]:
        print(growth_kib(*argv[1:]))
        return 0
    if list(argv) == ["--memory"]:
        peak_memory(report.console())
        return 0
    return rows.main("additive_attention", ROWS, LETTERS, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
