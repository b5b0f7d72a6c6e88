"""MANN: the suite of machines' modules, options, and that it remembers at one sight."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from machine_module_suite import (
    SIZES,
    MachineModuleSuite,
    check_memory_of_a_training_step,
    data,
)
from torch import Tensor

import seqmem_fast as sf
from seqmem_fast import MANN, LRUAState, LRUATrace


class TestMANN(MachineModuleSuite):
    module, state = MANN, LRUAState
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "plain": {},
        "keys": {"read_heads": 1, "add": "key", "gamma": 0.5},
        "deep": {"num_layers": 2, "memory_init": "learned", "strength": True, "read_heads": 3},
        "feedforward": {"controller": "feedforward", "num_layers": 2, "erase_all": True},
        "fixed": {"memory_init": "random", "output_activation": "sigmoid", "read_heads": 2},
    }
    starts = ({"memory_init": "learned"}, {"memory_init": "constant"})
    refused: ClassVar[dict[str, dict[str, Any]]] = {
        "input_size": {"input_size": 0},
        "memory_size": {"memory_size": 0},
        "num_layers": {"num_layers": 0},
        "read_heads in 1..8": {"read_heads": 9},
        "read_heads": {"read_heads": 0},
        "controller": {"controller": "gru"},
        "add": {"add": "both"},
        "gamma": {"gamma": 1.5},
        "memory_init": {"memory_init": "zeros"},
        "output_activation": {"output_activation": "softmax"},
    }

    @classmethod
    def make(cls, **options: Any) -> MANN:
        mann = super().make(**options)
        with torch.no_grad():  # slots that are alike
            mann.initial_memory.add_(torch.randn_like(mann.initial_memory), alpha=cls.noise)
        return mann

    def shapes(self, module: Any) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        heads = module.read_heads
        return [(8, 5), (8,), (heads, 8), (heads, 5)], [(8,), (heads, 8), (heads, 8)]

    def test_weightings_sum_to_one(self, options: dict[str, Any]) -> None:
        _, _, trace = self.make(**options)(data(), return_trace=True)
        assert isinstance(trace, LRUATrace)
        weights = trace.read_weights
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]).double())


def test_a_new_layer_starts_as_documented() -> None:
    mann = MANN(**SIZES)
    hidden, cell, memory, *rest = mann.init_state(2)
    assert torch.equal(memory, torch.full((2, 8, 5), 1e-6))
    assert not any(t.any() for t in (hidden, cell, *rest))
    assert sum(p.numel() for p in mann.parameters()) == sum(
        (24 * (4 + 20), 24 * 6, 48, 44 * 6, 44, 3 * 26, 3, 6, 6)
    )
    mann(torch.randn(3, 2, 4))  # writes to the first slots
    _, state, trace = mann(torch.randn(2, 2, 4), return_trace=True)
    assert trace.write_weights[0].argmax(-1).tolist() == [[0, 1, 2, 3]] * 2
    assert state.usage.min() > 0


@pytest.mark.slow
def test_learns_a_label_at_first_sight() -> None:
    """Two classes, labels drawn for each episode: after one sight of each, the label is known."""
    torch.manual_seed(0)
    mann = MANN(8 + 2, 2, 32, 16, 12, read_heads=1, strength=True)
    optimizer = torch.optim.Adam(mann.parameters(), 3e-3)

    def episodes(batch: int, time: int = 8) -> tuple[Tensor, Tensor]:
        patterns = torch.randn(batch, 2, 8).sign()
        label = torch.rand(batch, 1).lt(0.5).long()
        which = torch.rand(time, batch).lt(0.5).long()
        shown = patterns[torch.arange(batch), which]
        right = which ^ label.t()
        before = torch.cat((torch.zeros(1, batch, 2), F.one_hot(right[:-1], 2)))
        return torch.cat((shown, before), -1), right

    for _ in range(600):
        x, right = episodes(32)
        logits, _ = mann(x)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), right.flatten()).backward()
        optimizer.step()
    x, right = episodes(500)
    late = mann(x)[0].argmax(-1)[-1] == right[-1]
    assert late.float().mean() > 0.85


@pytest.mark.slow
def test_memory_of_a_long_training_step() -> None:
    """Every step's memory would be 156 MiB of slots alone if all were kept."""
    check_memory_of_a_training_step("sf.MANN(9, 8, 100, 128, 20, read_heads=1)", 4000, 4, 160)


def test_public_names() -> None:
    assert sf.MANN is MANN and sf.LRUAState is LRUAState and sf.LRUATrace is LRUATrace
