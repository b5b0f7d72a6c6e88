"""Block-sparse attention beside eager PyTorch, whole and by gathered blocks, and torch's fused op.

python -m benchmarks.bench_block_sparse_attention [--threads 2] [--malloc D|M] [--rows TEXT]
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import measure, rows
from benchmarks.harness.memory import Memory
from benchmarks.peers import flex
from seqmem_fast import ops

LETTERS = "B, H, T, d, steps of a block, listed blocks"
EAGER, GATHER = "eager, masked", "eager, gathered blocks"
SDPA = "F.sdpa + mask, no weights"
LEAST = 64  # steps of a block that FlexAttention is measured with
DENSE = 4096  # steps up to which the peers of T x T scores are measured
MOST = (4, 8, 4096, 128)  # of a random shape
Output = tuple[Tensor]


def pattern(grid: int, listed: int) -> Tensor:
    """bool [grid, grid]: neighbours, the first and last block's rows and columns, others by chance.

    As Big Bird has it; fewer or more of the others make up the number of blocks.
    """
    place = torch.arange(grid)
    mask = (place - place[:, None]).abs() <= 1
    if 7 * grid <= listed:  # room for these
        mask[[0, -1]] = mask[:, [0, -1]] = True
    free = (~mask).flatten().nonzero().flatten()
    drawn = torch.randperm(len(free), generator=torch.Generator().manual_seed(0))
    mask.view(-1)[free[drawn[: max(listed - int(mask.sum()), 0)]]] = True
    return mask


def ours(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, size: int) -> Output:
    """The weights are made as well, and dropped; so by the eager peers."""
    return (ops.block_sparse_attention(q, k, v, blocks, (size, size))[0],)


def eager(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, seen: Tensor) -> Output:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v,)


def fused(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, seen: Tensor) -> Output:
    return (F.scaled_dot_product_attention(q, k, v, seen),)


def gathered(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, size: int) -> Output:
    """The listed pairs of blocks side by side; softmax by rows of blocks, added up in the end."""
    steps, rest = q.shape[2], -q.shape[2] % size
    near_q, near_k, near_v = (
        F.pad(x, (0, 0, 0, rest)).unflatten(2, (-1, size)) for x in (q * q.shape[-1] ** -0.5, k, v)
    )
    row, column = blocks[0, 0].unbind(-1)
    scores = near_q[:, :, row] @ near_k[:, :, column].transpose(-1, -2)
    if rest:
        key = column[:, None] * size + torch.arange(size, device=q.device)
        scores = scores.masked_fill((key >= steps)[:, None], -torch.inf)
    top = near_q.new_full(near_q.shape[:4], -torch.inf)
    top = top.index_reduce(2, row, scores.detach().amax(-1), "amax")
    weights = (scores - top[:, :, row, :, None]).exp()
    total = torch.zeros_like(top).index_add(2, row, weights.sum(-1))
    weights = weights / total[:, :, row, :, None]
    output = torch.zeros_like(near_v).index_add(2, row, weights @ near_v[:, :, column])
    return (output.flatten(2, 3)[:, :, :steps],)


def work(batch: int, heads: int, steps: int, width: int, size: int, listed: int) -> rows.Work:
    mask = pattern(-(-steps // size), listed)

    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        operands = (torch.randn(batch, heads, steps, width, generator=rng) for _ in range(3))
        return *operands, ops.block_list(mask)

    peers: dict[str, Callable[..., Output]] = {GATHER: partial(gathered, size=size)}
    if steps <= DENSE:
        seen = mask.repeat_interleave(size, 0).repeat_interleave(size, 1)[:steps, :steps]
        peers |= {EAGER: partial(eager, seen=seen), SDPA: partial(fused, seen=seen)}

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[query // size, key // size]

    others = flex.peer(sees, steps, size) if size >= LEAST else {}
    return rows.Work(sample, partial(ours, size=size), peers, others=others, infer_only=[flex.FLEX])


def on_gpu(*sizes: int) -> rows.Work:
    """The peer that makes no tensor of its own on the CPU."""
    whole = work(*sizes)
    return rows.Work(whole.sample, whole.ours, {GATHER: whole.peers[GATHER]})


pair = rows.of_sizes("block_sparse_attention", work)


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """A pattern under half full."""
    batch, heads, steps, width = rows.draw(rng, MOST)
    size = rng.choice((8, 16, 32, 64, 128))
    grid = -(-steps // size)
    if batch * heads * steps * steps * width > 2**31 or grid < 8:
        return None
    sizes = batch, heads, steps, width, size, rng.randint(3 * grid, grid * grid // 2)
    return pair(*sizes, make=partial(flex.without, work))


ROWS = [
    *pair(*(1, 8, 2048, 64, 64, 291), goals={GATHER: (3, 4), SDPA: (3, 4), flex.FLEX: (2, None)}),
    *pair(*(1, 8, 2048, 64, 16, 2000)),
]
GPU_ROWS = [*pair(4, 8, 4096, 64, 64, 600, make=on_gpu)]
MEMORY = Memory(
    "block_sparse_attention 1, 8, 8192, 64, 64, 1200",
    partial(work, 1, 8, 8192, 64, 64, 1200),
    partial(work, 1, 1, 256, 8, 8, 96),
)
test_row = measure.test_row

if __name__ == "__main__":
    sys.exit(measure.main("block_sparse_attention", ROWS, LETTERS))
