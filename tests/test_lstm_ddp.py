"""DistributedDataParallel over two gloo processes gives the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import seqmem_fast as sf

WORLD = 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = sf.LSTM(5, 8, 2, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, _ = self.lstm(x)
        return torch.as_tensor(self.head(output))


def make() -> tuple[Model, torch.Tensor]:
    torch.manual_seed(5)
    return Model(), torch.randn(6, 4, 5)


def train(model: nn.Module, x: torch.Tensor, steps: int = 3) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    model, x = make()
    weights = train(DistributedDataParallel(model), x.chunk(WORLD, 1)[rank])
    torch.save(weights, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    alone = train(*make())
    untrained = list(make()[0].parameters())
    for rank in range(WORLD):
        for a, b in zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True):
            torch.testing.assert_close(a, b)
    assert not any(torch.equal(a, b) for a, b in zip(alone, untrained, strict=True))
