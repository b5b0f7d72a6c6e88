"""Attention rows: eager PyTorch, torch's fused op without weights, and this package.

python -m benchmarks.bench_attention [--threads 2] [--malloc D|M] [--rows TEXT] [--json PATH]
pytest benchmarks/bench_attention.py          the same contenders under pytest-benchmark
"""

from __future__ import annotations

import math
import random
import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import measure, rows
from benchmarks.peers import entmax
from seqmem_fast import ops

LETTERS = "B, Tq, Tk, d"
EAGER, SDPA, SOFTMAX = "eager", "F.sdpa, no weights", "softmax, ours"
# Random shapes: each size's bound, and billions of multiply-adds of a forward pass at most.
RANDOM = {"b": 64, "queries": 2048, "keys": 2048, "width": 256}
CAP = 2.0


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scores, mask, softmax and weighted sum, as tutorials write it."""
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
    scores = scores.masked_fill(mask == 0, -1e9)
    weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights, value), weights


def without_weights(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor]:
    """torch's fused op, which returns the output alone; it wants a dimension of heads."""
    q, k, v, allowed = (t[:, None] for t in (query, key, value, mask))
    return (F.scaled_dot_product_attention(q, k, v, allowed)[:, 0],)


def output_alone(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor]:
    """Ours beside it: the weights are made as well, and dropped."""
    return (ops.attention(query, key, value, mask)[0],)


def work(
    b: int,
    queries: int,
    keys: int,
    width: int,
    dtype: torch.dtype,
    peer: str,
    on_gpu: bool = False,
) -> rows.Work:
    """Three operands, and a mask that leaves out three entries in ten."""

    def sample(rng: torch.Generator) -> tuple[Tensor, ...]:
        sizes = ((b, queries, width), (b, keys, width), (b, keys, width))
        operands = (torch.randn(*size, generator=rng).to(dtype) for size in sizes)
        return *operands, torch.rand(b, queries, keys, generator=rng) < 0.7

    if peer == SDPA:
        return rows.Work(sample, ours=output_alone, peers={SDPA: without_weights})
    compile_with: dict[str, Any] | None = {} if on_gpu else None
    return rows.Work(sample, ops.attention, {EAGER: eager}, compile_with=compile_with)


def sparse_work(normalizer: str, b: int, queries: int, keys: int, width: int) -> rows.Work:
    """Three operands without a mask."""

    def sample(rng: torch.Generator) -> tuple[Tensor, ...]:
        sizes = ((b, queries, width), (b, keys, width), (b, keys, width))
        return tuple(torch.randn(*size, generator=rng) for size in sizes)

    def by_products(weigh: Any) -> Any:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            weights = weigh(query @ key.mT / math.sqrt(query.size(-1)), dim=-1)
            return weights @ value, weights

        return attend

    op = getattr(ops, normalizer)
    peers = {f"products, ops.{normalizer}": by_products(op), SOFTMAX: ops.attention}
    peers |= {peer: by_products(call) for peer, call in entmax.functions(normalizer).items()}
    return rows.Work(sample, partial(ops.attention, normalizer=normalizer), peers)


def sparse_row(normalizer: str, *sizes: int, goals: Any = None) -> list[rows.Row]:
    """A normaliser other than softmax, in both modes."""
    return rows.pair(
        "attention",
        ", ".join(map(str, sizes)),
        partial(sparse_work, normalizer, *sizes),
        goals=goals or {},
        name=f"attention with {normalizer}",
    )


def row(
    b: int,
    queries: int,
    keys: int,
    width: int,
    goals: tuple[float | None, float | None] = (None, None),
    *,
    dtype: torch.dtype = torch.float32,
    peer: str = EAGER,
    on_gpu: bool = False,
) -> list[rows.Row]:
    """A shape in both modes; beside torch's fused op in inference alone."""
    return rows.pair(
        "attention",
        f"{b}, {queries}, {keys}, {width}",
        partial(work, b, queries, keys, width, dtype, peer, on_gpu),
        goals={peer: goals},
        modes=rows.MODES if peer == EAGER else (rows.INFERENCE,),
        dtype=str(dtype).removeprefix("torch."),
        name="attention with mask" if peer == EAGER else "attention's output with mask",
    )


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """A random fp32 shape in both modes; None where it is over the cap."""
    b, queries, keys, width = rows.draw(rng, RANDOM.values())
    if 2 * b * queries * keys * width > CAP * 1e9:
        return None
    return row(b, queries, keys, width)


# At most 1.3 times softmax's time.
SPARSEMAX = {entmax.PACKAGE: (20, 12), entmax.PARTLY: (8, 6.5), SOFTMAX: (1 / 1.3, 1 / 1.3)}
ROWS = [
    *row(4, 2048, 2048, 64, (6, 4)),
    *row(4, 2048, 2048, 64, (2.2, None), peer=SDPA),
    *row(8, 512, 512, 64, (6, 3)),
    *row(32, 64, 64, 64, (3, 2)),
    *row(8, 512, 512, 64, dtype=torch.bfloat16),
    *row(4, 2048, 2048, 64, dtype=torch.bfloat16),
    *row(4, 2048, 2048, 64, (6, None), dtype=torch.bfloat16, peer=SDPA),
    *sparse_row("sparsemax", 8, 1024, 1024, 64, goals=SPARSEMAX),
    *sparse_row("entmax15", 8, 1024, 1024, 64),
]
GPU_ROWS = [
    made
    for sizes, dtype in (
        ((4, 2048, 2048, 64), torch.float32),
        ((8, 512, 512, 64), torch.float32),
        ((32, 64, 64, 64), torch.float32),
        ((4, 2048, 2048, 64), torch.bfloat16),
    )
    for peer in (EAGER, SDPA)
    for made in row(*sizes, dtype=dtype, peer=peer, on_gpu=True)
]
test_row = measure.test_row

if __name__ == "__main__":
    sys.exit(measure.main("attention", ROWS, LETTERS))
