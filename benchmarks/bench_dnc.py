"""DNC rows: whole sequences, beside vectorised eager PyTorch, torch.compile and pytorch-dnc.

python -m benchmarks.bench_dnc [--threads 2] [--malloc D|M] [--rows TEXT]
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.harness import measure, rows
from benchmarks.harness.memory import Memory
from benchmarks.peers import dnc as peers
from seqmem_fast import ops
from seqmem_fast.reference import dnc as reference

LETTERS = "T, B, N, M, C, R of a sequence"
INPUT = 9  # bits of the copy task, and its delimiter
MOST = (64, 32, 128, 64, 256, 6)  # of a random sequence
CAP = 2e7  # values of all links of a random sequence: eager keeps each twice
COMPILING_S = {rows.INFERENCE: 45.0, rows.TRAINING: 90.0}  # torch.compile, for five steps
Goals = tuple[float | None, float | None]


def sequence_work(
    time: int, batch: int, slots: int, width: int, control: int, reads: int
) -> rows.Work:
    """One write head and one LSTM layer, weights drawn anew for each sample."""

    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        sizes = (time, batch, INPUT, control, slots, width)
        seed = int(torch.randint(2**31, (), generator=rng))
        return next(reference.sample_inputs(sizes=sizes, seed=seed, reads=reads)).args

    missing = peers.missing()
    given = [missing] if missing else []
    return rows.Work(sample, ops.dnc, {"eager": reference.dnc}, missing=given)


def sequence_rows(*sizes: int, goals: Goals = (None, None)) -> list[rows.Row]:
    shape, make = ", ".join(map(str, sizes)), partial(sequence_work, *sizes)
    return rows.pair("dnc", shape, make, goals={"eager": goals})


def compiled_work(*sizes: int) -> rows.Work:
    """Few steps, since torch.compile unrolls them."""
    return replace(sequence_work(*sizes), compile_with={})


def compiled_rows(*sizes: int) -> list[rows.Row]:
    shape, make = ", ".join(map(str, sizes)), partial(compiled_work, *sizes)
    return rows.pair("dnc", shape, make, predicted_s=COMPILING_S.__getitem__)


def package_rows(*sizes: int) -> list[rows.Row]:
    """Modules with the same weights, in the way that pytorch-dnc uses them."""
    shape, make = ", ".join(map(str, sizes)), partial(peers.package_work, INPUT, *sizes)
    return [] if peers.missing() else rows.pair("dnc", shape, make, name="dnc.DNC")


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """A random sequence; None if too large."""
    time, batch, slots, width, control, reads = rows.draw(rng, MOST)
    if time * batch * slots * slots > CAP:
        return None
    return sequence_rows(time, batch, max(slots, 2), width, control, reads)


ROWS = [
    *sequence_rows(41, 1, 128, 20, 100, 4, goals=(20, 34)),
    *sequence_rows(41, 16, 128, 20, 100, 4, goals=(13, 13)),
    *sequence_rows(41, 16, 256, 64, 256, 4, goals=(4.5, 7)),
    *sequence_rows(200, 4, 64, 16, 100, 2, goals=(33, 60)),
    *compiled_rows(5, 16, 128, 20, 100, 4),
    *package_rows(41, 1, 128, 20, 100, 4),
    *package_rows(41, 16, 128, 20, 100, 4),
    *package_rows(41, 16, 256, 64, 256, 4),
    *package_rows(200, 4, 64, 16, 100, 2),
]
MEMORY = Memory(
    "10,000 steps of one row, N 128",
    partial(sequence_work, 10_000, 1, 128, 20, 100, 4),
    partial(sequence_work, 10, 1, 128, 20, 100, 4),
)
GPU_ROWS = [  # torch.compile would take minutes for a sequence's loop over steps
    *sequence_rows(41, 1, 128, 20, 100, 4),
    *sequence_rows(41, 16, 128, 20, 100, 4),
    *sequence_rows(41, 256, 128, 20, 100, 4),
    *sequence_rows(41, 16, 256, 64, 256, 4),
    *sequence_rows(200, 4, 64, 16, 100, 2),
]
test_row = measure.test_row

if __name__ == "__main__":
    sys.exit(measure.main("dnc", ROWS, LETTERS))
