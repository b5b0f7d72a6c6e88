"""Sparsemax and entmax15 beside sorts, those of the entmax package among them, and torch.softmax.

python -m benchmarks.bench_entmax [--threads 2] [--malloc D|M] [--rows TEXT]
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import measure, rows
from benchmarks.peers import entmax
from seqmem_fast import ops

LETTERS = "rows, K"
SORT, SOFTMAX = "eager, by sort", "torch.softmax"
MOST = (4096, 4096)  # of a random shape
OURS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparsemax": ops.sparsemax,
    "entmax15": ops.entmax15,
}


def sorted_sparsemax(z: Tensor) -> Tensor:
    """The paper's algorithm 1."""
    ordered, _ = z.sort(-1, descending=True)
    sums, rank = ordered.cumsum(-1), torch.arange(1, z.size(-1) + 1, device=z.device)
    support = (1 + rank * ordered > sums).sum(-1, keepdim=True)
    return (z - (sums.gather(-1, support - 1) - 1) / support).clamp(min=0)


def sorted_entmax15(z: Tensor) -> Tensor:
    """The exact threshold over all prefixes of the sorted row."""
    x = (z - z.amax(-1, keepdim=True)) / 2
    ordered, _ = x.sort(-1, descending=True)
    rank = torch.arange(1, z.size(-1) + 1, device=z.device)
    mean, squares = ordered.cumsum(-1) / rank, (ordered**2).cumsum(-1) / rank
    inside = ((1 - rank * (squares - mean**2)) / rank).clamp(min=0)
    taus = mean - inside.sqrt()
    support = (taus <= ordered).sum(-1, keepdim=True)
    return (x - taus.gather(-1, support - 1)).clamp(min=0) ** 2


@lru_cache(maxsize=2)  # of a shape, in its own dtype and in float64
def random_gradient(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same for all sides: N(0, 1)."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return values.to(device, dtype)


class _GivenGradient(torch.autograd.Function):
    """0, whose gradient is random: a loss that takes as long as the op would hide the op."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.of = output.shape, output.dtype, output.device
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return random_gradient(*ctx.of)


def given_gradient(outputs: Sequence[Tensor]) -> Tensor:
    """The output's sum is 1 a row, and the gradient of that 0."""
    loss: Tensor = _GivenGradient.apply(outputs[0])
    return loss


def work(name: str, count: int, width: int) -> rows.Work:
    """Rows of N(0, 1)."""

    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        return (torch.randn(count, width, generator=rng),)

    eager = sorted_sparsemax if name == "sparsemax" else sorted_entmax15
    peers: dict[str, Any] = {SORT: eager, SOFTMAX: partial(torch.softmax, dim=-1)}
    peers |= {peer: partial(call, dim=-1) for peer, call in entmax.functions(name).items()}
    return rows.Work(sample, OURS[name], peers, loss=given_gradient)


def pair(name: str, *shape: int, goals: dict[str, tuple[float, float]] | None = None) -> Any:
    """Both modes of one function."""
    text, make = ", ".join(map(str, shape)), partial(work, name, *shape)
    return rows.pair("entmax", text, make, goals=goals or {}, name=name)


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """One function on a random shape."""
    count, width = rows.draw(rng, MOST)
    return list(pair(sorted(OURS)[place % 2], count, max(2, width)))


# At most 1.4 and 1.6 times softmax's time.
SPARSEMAX = {entmax.PACKAGE: (50.0, 30.0), entmax.PARTLY: (14.0, 10.0), SOFTMAX: (1 / 1.4, 1 / 1.6)}
ENTMAX15 = {entmax.PACKAGE: (45.0, 38.0), entmax.PARTLY: (12.0, 10.0)}
ROWS = [
    *pair("sparsemax", 4096, 1000, goals=SPARSEMAX),
    *pair("entmax15", 4096, 1000, goals=ENTMAX15),
    *pair("sparsemax", 512, 10_000, goals=SPARSEMAX),
    *pair("entmax15", 512, 10_000),
    *pair("sparsemax", 16_384, 256),
    *pair("entmax15", 16_384, 256),
]
GPU_ROWS = [row for name in OURS for row in pair(name, 16_384, 1000)]
test_row = measure.test_row

if __name__ == "__main__":
    sys.exit(measure.main("entmax", ROWS, LETTERS))
