"""The delta memory beside its eager forms, chunked and step by step, and transformers' fallback.

python -m benchmarks.bench_delta_memory [--threads 2] [--malloc D|M] [--rows TEXT]
"""

from __future__ import annotations

import importlib.util
import random
import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import measure, rows
from benchmarks.peers.delta_memory import FALLBACK, QWEN, Block, fallback, scan
from benchmarks.peers.jax_scan import JAX, jax_scan
from seqmem_fast import ops
from seqmem_fast.reference import delta_memory as reference

LETTERS = "B, T, H, K, V"
CHUNKED, STEPS = "eager chunks of 64", "eager steps"
CHUNK = 64
LONGEST_LOOP = 512  # steps; eager loops over more take minutes
MOST = (8, 1024, 16, 128, 128)  # of a random shape


def chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor
) -> tuple[Tensor, Tensor]:
    """The products of a chunk by a triangular solve, as the fastest eager form has them."""
    steps, values = q.shape[1], v.shape[-1]
    rest = -steps % CHUNK
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, rest)) for x in (q, k, v))
    beta, log_decay = (F.pad(x, (0, 0, 0, rest)) for x in (beta, log_decay))
    count = q.shape[1] // CHUNK
    scaled = q * q.shape[-1] ** -0.5
    q, k, v = (x.transpose(1, 2).unflatten(2, (count, CHUNK)) for x in (scaled, k, v))
    beta, log_decay = (
        x.transpose(1, 2).unflatten(2, (count, CHUNK)).unsqueeze(-1) for x in (beta, log_decay)
    )
    total = log_decay.cumsum(-2)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    between = (total - total.transpose(-1, -2)).masked_fill(later, -torch.inf).exp()
    system = (k @ k.transpose(-1, -2) * between * beta).tril(-1)
    right = torch.cat((v * beta, k * (beta * total.exp())), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new, old = solved.split([values, k.shape[-1]], -1)
    scores = q @ k.transpose(-1, -2) * between
    early, whole = q * total.exp(), total[..., -1:, :]
    late, whole = (k * (whole - total).exp()).transpose(-1, -2), whole.exp()
    state, outputs = q.new_zeros(*q.shape[:2], q.shape[-1], values), []
    for i in range(count):
        written = new[:, :, i] - old[:, :, i] @ state
        outputs.append(early[:, :, i] @ state + scores[:, :, i] @ written)
        state = state * whole[:, :, i] + late[:, :, i] @ written
    return torch.cat(outputs, 2).transpose(1, 2)[:, :steps], state


def work(batch: int, steps: int, heads: int, features: int, values: int) -> rows.Work:
    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        def draw(*more: int) -> Tensor:
            return torch.randn(batch, steps, heads, *more, generator=rng)

        key = F.normalize(draw(features), dim=-1)
        gates = draw().sigmoid(), F.logsigmoid(3 + draw())
        return draw(features), key, draw(values), *gates

    peers: dict[str, Any] = {CHUNKED: chunked}
    no_jax, no_qwen = rows.uninstalled("JAX", "jax"), rows.uninstalled(FALLBACK, QWEN)
    if not no_qwen:
        peers[FALLBACK] = fallback
    if steps <= LONGEST_LOOP:
        peers[STEPS] = reference.delta_memory
    compiled: dict[str, Any] | None = {} if steps > 1 else None
    return rows.Work(
        sample,
        ops.delta_memory,
        peers,
        compile_with=compiled,
        others={} if no_jax else {JAX: partial(jax_scan, scan)},
        missing=[reason for reason in (no_jax, no_qwen) if reason],
    )


def block(batch: int, steps: int, heads: int, head_dim: int) -> rows.Work:
    """A whole layer of Qwen3-Next, patched and as it is."""
    dim = heads * head_dim

    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        return (torch.randn(batch, steps, dim, generator=rng),)

    make = partial(Block, dim, heads, head_dim)
    return rows.Work(sample, make(ours=True), {FALLBACK: make(ours=False)})


def block_rows(*sizes: int, goal: float) -> list[rows.Row]:
    """Where transformers is installed."""
    if importlib.util.find_spec("transformers") is None:  # whose import takes seconds
        return []
    return rows.pair(
        "delta_memory",
        ", ".join(map(str, (*sizes, sizes[-1]))),
        partial(block, *sizes),
        goals={FALLBACK: (None, goal)},
        name="a layer of Qwen3-Next",
    )


def one_step(batch: int, heads: int, features: int, values: int) -> rows.Work:
    """A step of a stream, which carries the memory on."""
    series = work(batch, 1, heads, features, values)

    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        memory = torch.randn(batch, heads, features, values, generator=rng)
        return *series.sample(rng), memory

    return rows.Work(sample, ops.delta_memory, {STEPS: reference.delta_memory})


pair = rows.of_sizes("delta_memory", work)


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    sizes = rows.draw(rng, MOST)
    if sizes[0] * sizes[1] * sizes[2] * sizes[3] * sizes[4] > 2**28:
        return None
    return pair(*sizes)


SMALL = {CHUNKED: (8.0, 8.0), FALLBACK: (15.0, 20.0), rows.COMPILED: (5.0, 4.0)}
LARGE = {CHUNKED: (3.2, 12.0), FALLBACK: (4.5, 18.0), rows.COMPILED: (2.6, 2.4)}
ROWS = [
    *pair(2, 512, 8, 64, 64, goals={**SMALL, STEPS: (30.0, 100.0), JAX: (14.0, 50.0)}),
    *pair(2, 2048, 16, 128, 128, goals=LARGE),
    *rows.pair(
        "delta_memory",
        "1, 1, 32, 128, 128",
        partial(one_step, 1, 32, 128, 128),
        goals={STEPS: (5.0, None)},
        modes=[rows.INFERENCE],
        name="delta_memory, a step of a stream",
    ),
    *block_rows(2, 512, 8, 64, goal=3.0),
]
GPU_ROWS = [*pair(2, 512, 8, 64, 64), *pair(2, 2048, 16, 128, 128)]
test_row = measure.test_row

if __name__ == "__main__":
    sys.exit(measure.main("delta_memory", ROWS, LETTERS))
