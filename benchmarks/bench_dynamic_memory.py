"""Dynamic memory rows: the eager module and this package's, side by side.

python -m benchmarks.bench_dynamic_memory [--threads 2] [--malloc D|M] [--rows TEXT]
"""

from __future__ import annotations

import random
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import measure, rows
from seqmem_fast import DynamicMemory

LETTERS = "B, N, m"
MOST = (256, 2048, 256)  # of a random shape
CAP = 3e7  # elements of a random shape's memories: eager holds a dozen of each in training


class EagerMemory(nn.Module):
    """Every hop forms the memory of every row."""

    def __init__(self, ours: DynamicMemory, return_memory: bool) -> None:
        super().__init__()
        self.memory = nn.Parameter(ours.memory.detach().clone())
        self.update_gate = nn.Sequential(*map(_copied, ours.update_gate))
        self.write_net = nn.Sequential(*map(_copied, ours.write_net))
        self.return_memory = return_memory

    def forward(self, query: Tensor, num_hops: int) -> tuple[Any, ...]:
        memory, history = self.memory.expand(query.size(0), -1, -1), []
        for _ in range(num_hops):
            scores = torch.bmm(memory, query.unsqueeze(2)).squeeze(2)
            weights = torch.softmax(scores, -1)
            history.append(weights)
            read = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
            update = torch.cat((read, query), -1)
            gate = self.update_gate(update).unsqueeze(1)
            write = self.write_net(update).unsqueeze(1)
            memory = gate * write + (1 - gate) * memory
        return (memory, history) if self.return_memory else (history,)


class OurMemory(nn.Module):
    """Its replacement, with the same weights."""

    def __init__(self, memory: DynamicMemory, return_memory: bool) -> None:
        super().__init__()
        self.inner = memory
        self.return_memory = return_memory

    def forward(self, query: Tensor, num_hops: int) -> tuple[Any, ...]:
        memory, history = self.inner(query, num_hops, return_memory=self.return_memory)
        return (memory, history) if self.return_memory else (history,)


def _copied(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Linear):
        return module
    copy = nn.Linear(module.in_features, module.out_features, dtype=module.weight.dtype)
    copy.load_state_dict(module.state_dict())
    return copy


def work(
    b: int, slots: int, width: int, hops: int, return_memory: bool, on_gpu: bool = False
) -> rows.Work:
    """Queries as wide as the slots."""
    torch.manual_seed(0)
    ours = DynamicMemory(slots, width, width)

    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        return torch.randn(b, width, generator=rng), hops

    return rows.Work(
        sample,
        OurMemory(ours, return_memory),
        {"eager": EagerMemory(ours, return_memory)},
        loss=rows.first_sum if return_memory else rows.sum_all,
        compile_with={} if on_gpu else None,
    )


def shape_rows(
    b: int,
    slots: int,
    width: int,
    hops: int = 3,
    return_memory: bool = True,
    goals: tuple[float | None, float | None] = (None, None),
    on_gpu: bool = False,
) -> list[rows.Row]:
    """Both modes of one shape; without the memory, inference alone."""
    shape = f"{b}, {slots}, {width}{'' if return_memory else ' attention only'}"
    make = partial(work, b, slots, width, hops, return_memory, on_gpu)
    modes = rows.MODES if return_memory else (rows.INFERENCE,)
    return rows.pair("dynamic_memory", shape, make, goals={"eager": goals}, modes=modes)


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """A random shape in both modes, with 1 to 4 hops; None where eager would need GiB."""
    b, slots, width = rows.draw(rng, MOST)
    if b * slots * width > CAP:
        return None
    return shape_rows(b, slots, width, 1 + place % 4)


ROWS = [
    *shape_rows(64, 1024, 64, goals=(20, 12)),
    *shape_rows(32, 128, 64, goals=(8, 3)),
    *shape_rows(64, 1024, 64, return_memory=False),
    *shape_rows(1, 128, 64),
]
GPU_ROWS = [
    *shape_rows(1, 128, 64, on_gpu=True),
    *shape_rows(32, 128, 64, on_gpu=True),
    *shape_rows(64, 1024, 64, on_gpu=True),
    *shape_rows(64, 1024, 64, return_memory=False, on_gpu=True),
]
test_row = measure.test_row

if __name__ == "__main__":
    sys.exit(measure.main("dynamic_memory", ROWS, LETTERS))
