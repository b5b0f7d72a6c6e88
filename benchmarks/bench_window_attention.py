"""Window attention beside eager PyTorch, whole and in blocks, and torch's fused op.

python -m benchmarks.bench_window_attention [--threads 2] [--malloc D|M] [--rows TEXT]
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import measure, rows
from benchmarks.harness.memory import Memory
from benchmarks.peers import flex
from seqmem_fast import ops

LETTERS = "B, H, T, d, left, right, global keys"
EAGER, BLOCKS = "eager, masked", "eager, blocks of 128"
SDPA, LOOP = "F.sdpa + mask, no weights", "F.sdpa on slices, no weights"
BLOCK = 128
DENSE, FUSED = 4096, 8192  # steps up to which the peers of T x T scores are measured
MOST = (4, 8, 4096, 128)  # of a random shape
Output = tuple[Tensor]


def pattern(steps: int, left: int, right: int, count: int) -> Tensor:
    """bool [T, T]: which keys a query sees."""
    place = torch.arange(steps)
    ahead = place - place[:, None]
    return ((ahead >= -left) & (ahead <= right)) | (place < count)


def ours(q: Tensor, k: Tensor, v: Tensor, *, left: int, right: int, count: int) -> Output:
    """The weights are made as well, and dropped; so by the eager peers."""
    return (ops.window_attention(q, k, v, left, right, global_keys=count)[0],)


def eager(q: Tensor, k: Tensor, v: Tensor, *, seen: Callable[[], Tensor]) -> Output:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores.masked_fill(~seen(), -torch.inf).softmax(-1) @ v,)


def fused(q: Tensor, k: Tensor, v: Tensor, *, seen: Callable[[], Tensor]) -> Output:
    return (F.scaled_dot_product_attention(q, k, v, seen()),)


def blocks(q: Tensor, k: Tensor, v: Tensor, *, left: int, right: int, count: int) -> Output:
    """Queries in blocks, each against the keys around it; global keys are columns in front."""
    steps, rest = q.shape[2], -q.shape[2] % BLOCK
    width = BLOCK + left + right
    q = F.pad(q, (0, 0, 0, rest)) * q.shape[-1] ** -0.5
    near_k, near_v = (
        F.pad(x, (0, 0, left, right + rest)).unfold(2, width, BLOCK) for x in (k, v)
    )  # [B, H, blocks, d, width]
    queries = q.unflatten(2, (-1, BLOCK))
    number = torch.arange(queries.shape[2], device=q.device)[:, None] * BLOCK
    row = torch.arange(BLOCK, device=q.device)[:, None]
    column = torch.arange(width, device=q.device)
    key = number + column - left
    seen = (column >= row) & (column <= row + left + right)
    seen = seen & ((key >= count) & (key < steps)).unsqueeze(1)
    scores = (queries @ near_k).masked_fill(~seen, -torch.inf)
    values = near_v.transpose(-1, -2)
    if count:
        far = queries @ k[:, :, None, :count].transpose(-1, -2)
        weights = torch.cat((far, scores), -1).softmax(-1)
        output = weights[..., count:] @ values + weights[..., :count] @ v[:, :, None, :count]
    else:
        output = scores.softmax(-1) @ values
    return (output.flatten(2, 3)[:, :, :steps],)


def slices(q: Tensor, k: Tensor, v: Tensor, *, left: int, right: int) -> Output:
    """torch's fused op for each block of queries in turn."""
    steps, parts = q.shape[2], []
    for begin in range(0, steps, BLOCK):
        end = min(begin + BLOCK, steps)
        first, last = max(0, begin - left), min(steps, end + right)
        ahead = torch.arange(first, last) - torch.arange(begin, end)[:, None]
        seen = (ahead >= -left) & (ahead <= right)
        near_k, near_v = (x[:, :, first:last] for x in (k, v))
        parts.append(F.scaled_dot_product_attention(q[:, :, begin:end], near_k, near_v, seen))
    return (torch.cat(parts, 2),)


def work(
    batch: int, heads: int, steps: int, width: int, left: int, right: int, count: int
) -> rows.Work:
    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        return tuple(torch.randn(batch, heads, steps, width, generator=rng) for _ in range(3))

    options: dict[str, Any] = {"left": left, "right": right}
    peers: dict[str, Callable[..., Output]] = {BLOCKS: partial(blocks, **options, count=count)}
    if steps <= FUSED:
        # Made by the first call that needs it: the peak memory of the other sides is without it.
        seen = cache(partial(pattern, steps, left, right, count))
        peers[SDPA] = partial(fused, seen=seen)
        if steps <= DENSE:
            peers[EAGER] = partial(eager, seen=seen)
    if count == 0:
        peers[LOOP] = partial(slices, **options)

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ahead = key - query
        return ((ahead >= -left) & (ahead <= right)) | (key < count)

    return rows.Work(
        sample,
        partial(ours, **options, count=count),
        peers,
        others=flex.peer(sees, steps),
        infer_only=[flex.FLEX],
    )


def on_gpu(*sizes: int) -> rows.Work:
    """The peers that make no tensor of their own on the CPU."""
    whole = work(*sizes)
    return rows.Work(whole.sample, whole.ours, {BLOCKS: whole.peers[BLOCKS]})


pair = rows.of_sizes("window_attention", work)


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """A pattern under half full."""
    batch, heads, steps, width = rows.draw(rng, MOST)
    if batch * heads * steps * steps * width > 2**31 or steps < 8:
        return None
    left, right = rng.randrange(1 + steps // 4), rng.randrange(1 + steps // 8)
    sizes = batch, heads, steps, width, left, right, rng.choice((0, min(4, steps // 16)))
    return pair(*sizes, make=partial(flex.without, work))


ROWS = [
    *pair(
        *(1, 8, 2048, 64, 255, 0, 0),
        goals={
            EAGER: (30, 24),
            BLOCKS: (3.5, 3.5),
            SDPA: (6.5, 7),
            LOOP: (2.2, 2.8),
            flex.FLEX: (3, None),
        },
    ),
    *pair(*(1, 8, 2048, 64, 128, 128, 16), goals={EAGER: (20, 15), BLOCKS: (3, 3)}),
    *pair(
        *(1, 8, 8192, 64, 255, 0, 0),
        goals={BLOCKS: (3.3, 3.2), SDPA: (25, 30), flex.FLEX: (2.7, None)},
    ),
]
GPU_ROWS = [
    *pair(4, 8, 4096, 64, 255, 0, 0, make=on_gpu),
    *pair(4, 8, 4096, 64, 128, 128, 16, make=on_gpu),
]
MEMORY = Memory(
    "window_attention 1, 8, 8192, 64, 255, 0, 0",
    partial(work, 1, 8, 8192, 64, 255, 0, 0),
    partial(work, 1, 1, 256, 8, 7, 0, 0),
)
test_row = measure.test_row

if __name__ == "__main__":
    sys.exit(measure.main("window_attention", ROWS, LETTERS))
