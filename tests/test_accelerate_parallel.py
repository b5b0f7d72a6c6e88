"""accelerate() beside what wraps or shares modules: DDP, FSDP, one module in two models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import seqmem_fast as sf

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed here")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(5, 6, 2)
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lstm(x)[0]
        output: Tensor = self.attention(hidden, hidden, hidden)[0]
        return output.clone()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model(x).square().sum().backward()
    found = [p.grad for p in model.parameters()]
    return [getattr(g, "full_tensor", lambda g=g: g)() for g in found]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 3, 5)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """This process as the only one of a group."""
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.usefixtures("group")
def test_wrapped_models_train_as_before(wrapper: str, first: bool, x: Tensor) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = Model()
    if first:
        assert len(sf.accelerate(model).swapped) == 2
    wrapped: nn.Module = model
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (1,))
        for part in (model.lstm, model.attention, model):
            fully_shard(part, mesh=mesh)
    if not first:
        assert len(sf.accelerate(wrapped).swapped) == 2
    with warnings.catch_warnings():  # of FSDP: the attention's output is a view, as torch's is
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        found = gradients(wrapped, x)
    for ours, theirs in zip(found, gradients(Model(), x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_module_in_two_models(x: Tensor) -> None:
    first, second = Model(), Model()
    second.lstm = first.lstm
    assert [name for name, _ in sf.accelerate(first).swapped] == ["lstm", "attention"]
    assert [name for name, _ in sf.accelerate(second).swapped] == ["attention"]
    for ours, theirs in zip(gradients(second, x), gradients(Model(), x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert sf.restore(first) == 2
    assert "forward" not in vars(second.lstm)
    assert sf.restore(second) == 1
