"""Additive attention rows: eager PyTorch and this package side by side.

python -m benchmarks.bench_additive_attention [--threads 2] [--malloc D|M] [--rows TEXT]
"""

from __future__ import annotations

import random
import sys
from functools import partial
from typing import Any

import torch

from benchmarks.harness import measure, rows
from benchmarks.harness.memory import Memory
from seqmem_fast import ops
from seqmem_fast.reference import additive_attention as reference

LETTERS = "B, T, T, A"
MOST = (32, 512, 512, 256)  # of a random shape
CAP = 3e7  # tanh evaluations of a random shape: eager needs up to 20 bytes of memory for each


def work(
    b: int, queries: int, keys: int, width: int, masked: bool = False, on_gpu: bool = False
) -> rows.Work:
    """A batch with values as wide as the hidden layer; `masked`: rows of keys of any length."""

    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        shapes = (b, queries, width), (b, keys, width), (b, keys, width), (width,)
        mask = None
        if masked:
            lengths = torch.randint(1, keys + 1, (b, 1, 1), generator=rng)
            mask = torch.arange(keys) < lengths
        return (*(torch.randn(shape, generator=rng) for shape in shapes), mask)

    return rows.Work(
        sample,
        ops.additive_attention,
        {"eager": reference.additive_attention},
        compile_with={} if on_gpu else None,
    )


def shape_rows(
    b: int,
    queries: int,
    keys: int,
    width: int,
    masked: bool = False,
    goals: tuple[float | None, float | None] = (None, None),
    on_gpu: bool = False,
) -> list[rows.Row]:
    """Both modes of one shape."""
    shape = f"{b}, {queries}, {keys}, {width}{' masked' if masked else ''}"
    make = partial(work, b, queries, keys, width, masked, on_gpu)
    return rows.pair("additive_attention", shape, make, goals={"eager": goals})


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """A random shape in both modes, every second one masked; None where eager would need GiB."""
    b, queries, keys, width = rows.draw(rng, MOST)
    if b * queries * keys * width > CAP:
        return None
    return shape_rows(b, queries, keys, width, masked=place % 2 == 1)


ROWS = [
    *shape_rows(8, 256, 256, 64, goals=(5, 4)),
    *shape_rows(8, 256, 256, 64, masked=True),
    *shape_rows(32, 1, 50, 256),  # one step of a decoder
    *shape_rows(32, 20, 30, 128),
]
GPU_ROWS = [
    *shape_rows(8, 256, 256, 64, on_gpu=True),
    *shape_rows(8, 256, 256, 64, masked=True, on_gpu=True),
    *shape_rows(32, 1, 50, 256, on_gpu=True),  # one step of a decoder
    *shape_rows(32, 256, 256, 128, on_gpu=True),
]
MEMORY = Memory(
    "additive_attention 8, 256, 256, 64", partial(work, 8, 256, 256, 64), partial(work, 1, 8, 8, 8)
)
test_row = measure.test_row


if __name__ == "__main__":
    sys.exit(measure.main("additive_attention", ROWS, LETTERS))
