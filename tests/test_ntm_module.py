"""NTM and NTMMemory: the suite of machines' modules, options, and a convert's faithfulness."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from machine_module_suite import (
    SIZES,
    MachineModuleSuite,
    check_memory_of_a_training_step,
    data,
)
from torch import Tensor, nn

import seqmem_fast as sf
from seqmem_fast import NTM, NTMMemory, NTMState


class TestNTM(MachineModuleSuite):
    module, state, traced = NTM, NTMState, "return_weightings"
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "plain": {},
        "many_heads": {"heads": "wrrwr", "shift_range": 2},
        "deep": {"num_layers": 2, "memory_init": "learned"},
        "feedforward": {"controller": "feedforward", "num_layers": 2, "shift_range": 0},
        "fixed": {
            "heads": "rw",
            "squash": False,
            "memory_init": "random",
            "weightings_init": "zeros",
            "reads_init": "random",
            "output_activation": "sigmoid",
        },
    }
    starts = ({"memory_init": "learned"}, {"memory_init": "constant"})
    refused: ClassVar[dict[str, dict[str, Any]]] = {
        "input_size": {"input_size": 0},
        "memory_size": {"memory_size": 0},
        "num_layers": {"num_layers": 0},
        "heads as a string": {"heads": "rx"},
        "heads": {"heads": ""},
        "shift_range": {"shift_range": 5},
        "shift_range in": {"shift_range": -1},
        "controller": {"controller": "gru"},
        "memory_init": {"memory_init": "zeros"},
        "weightings_init": {"weightings_init": "random"},
        "reads_init": {"reads_init": "constant"},
        "output_activation": {"output_activation": "softmax"},
    }

    def shapes(self, module: Any) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        heads = len(module.heads)
        return [(8, 5), (heads, 8), (module.heads.count("r"), 5)], [(heads, 8)]

    def test_weightings_sum_to_one(self, options: dict[str, Any]) -> None:
        _, _, weightings = self.make(**options)(data(), return_weightings=True)
        torch.testing.assert_close(weightings.sum(-1), torch.ones(weightings.shape[:3]).double())


def test_the_state_is_a_pytree_and_detaches() -> None:
    """As truncated backpropagation uses it."""
    ntm = TestNTM.make()
    _, state = ntm(data())
    state = NTMState(*(t.detach() for t in state))
    ntm(data(), state)[0].sum().backward()
    assert ntm.initial_memory.grad is None
    assert ntm.initial_hidden.grad is None


def test_a_new_layer_breaks_the_symmetry_of_its_slots() -> None:
    ntm = NTM(**SIZES)
    _, state, weightings = ntm(torch.randn(10, 2, 4), return_weightings=True)
    assert (weightings[0, 0].max(-1).values > 0.2).all()
    assert state.memory[0].std(0).min() > 1e-4


# ---- a stand-in with the attributes of pytorch-ntm's EncapsulatedNTM, after its documentation


class Head(nn.Module):
    def __init__(self, reads: bool, control: int, width: int) -> None:
        super().__init__()
        self.reads = reads
        layer = nn.Linear(control, width + 6 + (0 if reads else 2 * width))
        setattr(self, "fc_read" if reads else "fc_write", layer)

    def is_read_head(self) -> bool:
        return self.reads

    def values(self, hidden: Tensor, width: int) -> tuple[Tensor, ...]:
        row = (self.fc_read if self.reads else self.fc_write)(hidden)
        sizes = [width, 1, 1, 3, 1]
        return row.split(sizes if self.reads else [*sizes, width, width], 1)


class Encapsulated(nn.Module):
    """One read then one write head, several times; a step per call."""

    def __init__(
        self, inputs: int, outputs: int, control: int, layers: int, pairs: int, N: int, M: int
    ) -> None:
        super().__init__()
        self.ntm, self.N, self.M = nn.Module(), N, M
        self.ntm.controller = nn.Module()
        self.ntm.controller.lstm = nn.LSTM(inputs + pairs * M, control, layers)
        self.ntm.controller.lstm_h_bias = nn.Parameter(torch.randn(layers, 1, control) * 0.05)
        self.ntm.controller.lstm_c_bias = nn.Parameter(torch.randn(layers, 1, control) * 0.05)
        self.ntm.heads = nn.ModuleList(Head(k % 2 == 0, control, M) for k in range(2 * pairs))
        self.ntm.memory = nn.Module()
        self.ntm.memory.register_buffer("mem_bias", (torch.rand(N, M) * 2 - 1) / (N + M) ** 0.5)
        self.ntm.init_r = [torch.randn(1, M) * 0.01 for _ in range(pairs)]
        self.ntm.fc = nn.Linear(control + pairs * M, outputs)

    def init_sequence(self, batch: int) -> None:
        controller = self.ntm.controller
        self.cells = (
            controller.lstm_h_bias.repeat(1, batch, 1),
            controller.lstm_c_bias.repeat(1, batch, 1),
        )
        self.content = self.ntm.memory.mem_bias.repeat(batch, 1, 1)
        self.read_before = [r.repeat(batch, 1) for r in self.ntm.init_r]
        self.weights = [torch.zeros(batch, self.N) for _ in self.ntm.heads]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        joined = torch.cat([x, *self.read_before], 1)
        hidden, self.cells = self.ntm.controller.lstm(joined[None], self.cells)
        hidden, reads = hidden[0], []
        for k, head in enumerate(self.ntm.heads):
            key, beta, gate, shift, gamma, *vectors = head.values(hidden, self.M)
            similar = F.cosine_similarity(self.content + 1e-16, key[:, None] + 1e-16, dim=-1)
            content = torch.softmax(F.softplus(beta) * similar, 1)
            gate = torch.sigmoid(gate)
            mixed = gate * content + (1 - gate) * self.weights[k]
            taps = torch.softmax(shift, 1)
            around = torch.cat((mixed[:, -1:], mixed, mixed[:, :1]), 1)  # slots i - 1, i, i + 1
            moved = sum(taps[:, j : j + 1] * around[:, j : j + self.N] for j in range(3))
            sharp = moved ** (1 + F.softplus(gamma))
            w = self.weights[k] = sharp / (sharp.sum(1, keepdim=True) + 1e-16)
            if head.is_read_head():
                reads.append((w[:, None] @ self.content)[:, 0])
            else:
                erase, add = torch.sigmoid(vectors[0]), vectors[1]
                kept = self.content * (1 - w[:, :, None] * erase[:, None])
                self.content = kept + w[:, :, None] * add[:, None]
        self.read_before = reads
        return torch.sigmoid(self.ntm.fc(torch.cat([hidden, *reads], 1))), None


@pytest.mark.parametrize(("layers", "pairs"), [(1, 1), (2, 2)])
def test_from_pytorch_ntm(layers: int, pairs: int) -> None:
    original = Encapsulated(9, 8, 30, layers, pairs, 24, 10)
    ntm = NTM.from_pytorch_ntm(original)
    x = torch.rand(20, 4, 9).round()
    original.init_sequence(4)
    expected = torch.stack([original(step)[0] for step in x])
    output, state = ntm(x)
    assert ntm.heads == "rw" * pairs
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(state.memory, original.content, rtol=0, atol=1e-5)
    twin = NTM(
        9,
        8,
        30,
        24,
        10,
        heads="rw" * pairs,
        num_layers=layers,
        squash=False,
        memory_init="random",
        weightings_init="zeros",
        reads_init="random",
        output_activation="sigmoid",
    )
    twin.load_state_dict(ntm.state_dict())
    assert torch.equal(twin(x)[0], output)


# ---- the memory alone


def test_the_usual_example() -> None:
    """Numbers and arrays as its text has them."""
    memory = NTMMemory(memory_size=10, memory_dim=5)
    write_weights = np.array([0, 0, 0, 0, 1, 0, 0, 0, 0, 0])
    memory.write(write_weights, erase_vector=np.ones(5), add_vector=np.array([1, 2, 3, 4, 5]))
    query_key = np.array([1, 2, 3, 4, 5])
    read_weights = memory.content_addressing(query_key, beta=10)
    retrieved = memory.read(read_weights)
    similar = np.eye(10)[4]
    expected = np.exp(10 * similar) / np.exp(10 * similar).sum()
    np.testing.assert_allclose(read_weights.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(retrieved.numpy(), expected[4] * query_key, rtol=1e-5)


def test_memory_is_batched_and_differentiable() -> None:
    memory = NTMMemory(6, 4, batch_size=3, dtype=torch.float64)
    add = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 6).double().softmax(-1)
    memory.write(weights, torch.zeros(3, 4), add)
    torch.testing.assert_close(memory.memory, weights[..., None] * add[:, None])
    again = memory.addressing(add, 2.0, 0.5, torch.tensor([0, 1, 0]).expand(3, 3), 1.5, weights)
    memory.read(again).sum().backward()
    assert add.grad is not None and add.grad.any()
    memory.detach()
    assert not memory.memory.requires_grad and memory.memory.any()
    memory.reset()
    assert not memory.memory.any()
    assert repr(memory) == "NTMMemory(3, 6, 4)"


def test_memory_serves_several_heads() -> None:
    memory = NTMMemory(6, 4, batch_size=3)
    memory.write(torch.rand(3, 2, 6).softmax(-1), torch.rand(3, 2, 4), torch.rand(3, 2, 4))
    weights = memory.content_addressing(torch.rand(3, 5, 4), 3)
    assert weights.shape == (3, 5, 6) and memory.read(weights).shape == (3, 5, 4)


def test_memory_goes_with_its_module() -> None:
    memory = NTMMemory(6, 4)
    memory.write(torch.rand(6), torch.rand(4), torch.rand(4))
    twin = NTMMemory(6, 4)
    twin.load_state_dict(memory.state_dict())
    assert torch.equal(twin.memory, memory.memory)
    assert memory.double().memory.dtype == torch.float64
    assert sf.NTMMemory is NTMMemory


@pytest.mark.slow
def test_memory_of_a_long_training_step() -> None:
    """Every step's memory would be 156 MiB of slots alone if all were kept."""
    check_memory_of_a_training_step("sf.NTM(9, 8, 100, 128, 20)", 4000, 4, 160)
