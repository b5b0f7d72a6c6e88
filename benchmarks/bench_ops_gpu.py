"""All ops but the LSTM on a GPU: eager PyTorch, the same compiled, F.sdpa, and this package.

python -m benchmarks.bench_ops_gpu [--rows TEXT] [--samples 50] [--tf32] [--json PATH]

The work of a row is that of bench_<op>.py, moved to the GPU; errors are against float64 on the
CPU. How times are taken: benchmarks/gpu.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks import (
    bench_additive_attention,
    bench_attention,
    bench_dynamic_memory,
    bench_hard_attention,
    bench_ntm,
    gpu,
    rows,
)

COMPILED = "torch.compile"
FUNCTIONALS = ("ntm_content_addressing", "ntm_addressing", "ntm_read", "ntm_write")


@dataclass(frozen=True)
class Row:
    """An op at one shape; `compiled`: the first peer is measured under torch.compile as well."""

    name: str
    shape: Sequence[Any]
    make: Callable[[], rows.Work]
    dtype: str = "float32"
    modes: Collection[str] = rows.MODES
    compiled: bool = True

    @property
    def label(self) -> str:
        return f"{self.name} {', '.join(map(str, self.shape))}"


def attention(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Row]:
    """Beside eager in both modes, and beside torch's fused op, which returns no weights."""
    b, queries, keys, width = sizes
    name = str(dtype).removeprefix("torch.")
    eager, fused = (
        partial(bench_attention.work, b, queries, keys, width, dtype, peer)
        for peer in (bench_attention.EAGER, bench_attention.SDPA)
    )
    plain = Row("attention", sizes, eager, name)
    alone = replace(plain, make=fused, modes=(rows.INFERENCE,), compiled=False)
    return [plain, replace(alone, name="attention's output")]


def additive_attention(*sizes: int, masked: bool = False) -> Row:
    name = "additive_attention masked" if masked else "additive_attention"
    b, queries, keys, width = sizes
    make = partial(bench_additive_attention.work, b, queries, keys, width, masked)
    return Row(name, sizes, make)


def reinforce_step(*sizes: int) -> Row:
    """A whole step, which takes its own gradients: timed as a plain call."""
    make = partial(bench_hard_attention.step_work, *sizes)
    return Row("hard_attention training step", sizes, make, modes=(rows.INFERENCE,), compiled=False)


def reinforce_loss(*sizes: int) -> Row:
    return Row("hard_attention loss", sizes, partial(bench_hard_attention.loss_work, *sizes))


def dynamic_memory(*sizes: int, return_memory: bool = True) -> Row:
    """Three hops; without the memory, inference alone."""
    b, slots, width = sizes
    make = partial(bench_dynamic_memory.work, b, slots, width, 3, return_memory)
    if return_memory:
        return Row("dynamic_memory", sizes, make)
    return Row("dynamic_memory attention only", sizes, make, modes=(rows.INFERENCE,))


def ntm(*sizes: int) -> Row:
    """A sequence: its loop over steps would take torch.compile minutes."""
    return Row("ntm", sizes, partial(bench_ntm.sequence_work, *sizes), compiled=False)


def functional(name: str, *sizes: int) -> Row:
    return Row(name, sizes, partial(bench_ntm.step_work, name, *sizes))


ROWS = [
    *attention(4, 2048, 2048, 64),
    *attention(8, 512, 512, 64),
    *attention(32, 64, 64, 64),
    *attention(4, 2048, 2048, 64, dtype=torch.bfloat16),
    additive_attention(8, 256, 256, 64),
    additive_attention(8, 256, 256, 64, masked=True),
    additive_attention(32, 1, 50, 256),  # one step of a decoder
    additive_attention(32, 256, 256, 128),
    reinforce_step(256, 64, 32, 10),
    reinforce_loss(256, 10),
    reinforce_loss(4096, 100),
    reinforce_loss(65536, 1000),
    dynamic_memory(1, 128, 64),
    dynamic_memory(32, 128, 64),
    dynamic_memory(64, 1024, 64),
    dynamic_memory(64, 1024, 64, return_memory=False),
    ntm(41, 1, 128, 20, 100),
    ntm(41, 16, 128, 20, 100),
    ntm(41, 256, 128, 20, 100),
    ntm(41, 64, 128, 64, 256),
    *(functional(name, 16, 128, 20) for name in FUNCTIONALS),
    *(functional(name, 256, 128, 64) for name in FUNCTIONALS),
]


def moved(value: Any, device: str) -> Any:
    """A tensor there, as a leaf of its own."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(device).requires_grad_(value.requires_grad)


def measure(row: Row, mode: str, samples: int, device: str = "cuda") -> list[gpu.Record]:
    """One record for each side."""
    made = row.make()
    built = rows.bench(lambda: made, mode)
    given = built.sample(0)
    exact = built.exact(given) if built.exact else None  # before the modules leave the CPU
    sides = {**made.peers, rows.OURS: made.ours}
    for side in sides.values():
        if isinstance(side, nn.Module):
            side.to(device)
    if row.compiled:
        torch.compiler.reset()  # a graph of the row before would make this one's shapes dynamic
        sides[COMPILED] = torch.compile(next(iter(made.peers.values())))
    contenders = {name: rows.contender(name, side, mode, made.loss) for name, side in sides.items()}
    labels = {"row": row.label, "shape": list(row.shape), "dtype": row.dtype, "mode": mode}
    there = tree_map(partial(moved, device=device), given)
    return [{**labels, **found} for found in gpu.turns(contenders, there, exact, samples)]


def job(row: Row, mode: str) -> gpu.Job:
    """A row in one mode, to be measured when its turn comes."""
    return gpu.Job(f"{row.label} {row.dtype}", mode, partial(measure, row, mode))


if __name__ == "__main__":
    sys.exit(gpu.main("ops_gpu", __doc__, [job(row, mode) for row in ROWS for mode in row.modes]))
