"""Attention to given keys, and to those of the highest scores, beside eager PyTorch.

python -m benchmarks.bench_indexed_attention [--threads 2] [--malloc D|M] [--rows TEXT]
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import measure, rows
from benchmarks.harness.memory import Memory
from seqmem_fast import ops

LETTERS = "B, H, T, d, keys of a query"
GATHER, DENSE = "eager, gathered keys", "eager, masked"
TOP = "eager, topk and masked"
MOST = (4, 8, 2048, 128)  # of a random shape
Output = tuple[Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Output:
    """The weights are made as well, and dropped; so by the eager peers."""
    return (ops.indexed_attention(q, k, v, index)[0],)


def gathered(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Output:
    place = index.flatten(2)[..., None].expand(*q.shape[:2], -1, q.shape[3])
    near_k, near_v = (x.gather(2, place).unflatten(2, index.shape[2:]) for x in (k, v))
    scores = near_k @ (q * q.shape[-1] ** -0.5)[..., None]
    return ((scores.softmax(-2).transpose(-1, -2) @ near_v).squeeze(-2),)


def masked(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Output:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v,)


def ours_top(q: Tensor, k: Tensor, v: Tensor, *, count: int) -> Output:
    return (ops.top_k_attention(q, k, v, count)[0],)


def eager_top(q: Tensor, k: Tensor, v: Tensor, *, count: int) -> Output:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    best, index = scores.topk(count)
    return (torch.zeros_like(scores).scatter(-1, index, best.softmax(-1)) @ v,)


def work(batch: int, heads: int, steps: int, width: int, count: int) -> rows.Work:
    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        """Each key at most once in a list, as the masked peer knows no number of times."""
        operands = (torch.randn(batch, heads, steps, width, generator=rng) for _ in range(3))
        chances = torch.rand(batch, heads, steps, steps, generator=rng)
        return *operands, chances.topk(count).indices

    return rows.Work(sample, ours, {GATHER: gathered, DENSE: masked})


def top(batch: int, heads: int, steps: int, width: int, count: int) -> rows.Work:
    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        return tuple(torch.randn(batch, heads, steps, width, generator=rng) for _ in range(3))

    return rows.Work(sample, partial(ours_top, count=count), {TOP: partial(eager_top, count=count)})


def pair(
    *sizes: int, goals: Mapping[str, tuple[float, float]] | None = None, highest: bool = False
) -> Any:
    text = ", ".join(map(str, sizes))
    name = "top_k_attention" if highest else ""
    make = top if highest else work
    return rows.pair("indexed_attention", text, partial(make, *sizes), goals=goals, name=name)


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """Lists of at most an eighth of the keys."""
    batch, heads, steps, width = rows.draw(rng, MOST)
    if batch * heads * steps * steps * width > 2**31 or steps < 16:
        return None
    (count,) = rows.draw(rng, (steps // 8,))
    return list(pair(batch, heads, steps, width, count, highest=place % 2 == 1))


ROWS = [
    *pair(*(1, 8, 2048, 64, 32), goals={GATHER: (12, 150)}),
    *pair(*(1, 8, 2048, 64, 32), goals={TOP: (10, 12)}, highest=True),
]
GPU_ROWS = [
    *pair(4, 8, 2048, 64, 32),
    *pair(4, 8, 2048, 64, 32, highest=True),
]
MEMORY = Memory(
    "indexed_attention 1, 8, 2048, 64, 32",
    partial(work, 1, 8, 2048, 64, 32),
    partial(work, 1, 1, 64, 8, 4),
)
test_row = measure.test_row

if __name__ == "__main__":
    sys.exit(measure.main("indexed_attention", ROWS, LETTERS))
