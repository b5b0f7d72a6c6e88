"""LRUA rows: whole sequences beside vectorised eager PyTorch.

python -m benchmarks.bench_lrua [--threads 2] [--malloc D|M] [--rows TEXT]
"""

from __future__ import annotations

import random
import sys
from functools import partial
from typing import Any

import torch

from benchmarks.harness import measure, rows
from seqmem_fast import ops
from seqmem_fast.reference import lrua as reference

LETTERS = "T, B, N, M, C, R"
INPUT = 9  # as the NTM's rows
MOST = (64, 64, 256, 64, 256, 8)  # of a random sequence
CAP = 3e7  # values of all memories of a random sequence: eager keeps each several times
Goals = tuple[float | None, float | None]


def work(time: int, batch: int, slots: int, width: int, control: int, heads: int) -> rows.Work:
    """One LSTM layer, weights drawn anew for each sample."""

    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        seed = int(torch.randint(2**31, (), generator=rng))
        sizes = (time, batch, INPUT, control, slots, width)
        return next(reference.sample_inputs(sizes=sizes, heads=heads, seed=seed)).args

    return rows.Work(sample, ops.lrua, {"eager": reference.lrua})


def sequence_rows(*sizes: int, goals: Goals = (None, None)) -> list[rows.Row]:
    shape = ", ".join(map(str, sizes))
    return rows.pair("lrua", shape, partial(work, *sizes), goals={"eager": goals})


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """A random sequence; None if too large."""
    time, batch, slots, width, control, heads = rows.draw(rng, MOST)
    if time * batch * slots * width > CAP or heads > slots:
        return None
    return sequence_rows(time, batch, slots, width, control, heads)


ROWS = [
    *sequence_rows(50, 16, 128, 40, 200, 4, goals=(15, 15)),
    *sequence_rows(50, 1, 128, 40, 200, 4),
    *sequence_rows(41, 16, 128, 20, 100, 1),
    *sequence_rows(200, 4, 64, 16, 100, 2),
    *sequence_rows(50, 16, 256, 64, 256, 4),
]
GPU_ROWS = [
    *sequence_rows(50, 1, 128, 40, 200, 4),
    *sequence_rows(50, 16, 128, 40, 200, 4),
    *sequence_rows(50, 256, 128, 40, 200, 4),
]
test_row = measure.test_row

if __name__ == "__main__":
    sys.exit(measure.main("lrua", ROWS, LETTERS))
