"""NTM and NTMMemory: the suite of machines' modules, options, and a convert's faithfulness."""

from __future__ import annotations

import copy
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
    same,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import seqmem_fast as sf
from seqmem_fast import NTM, NTMMemory, NTMState
from seqmem_fast.reference import ntm as reference


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


# ---- a call at once, by the compiled module, beside the long way


def at_once(output: Tensor) -> bool:
    return output.grad_fn is not None and "NetworkFunction" in output.grad_fn.name()


def long_way(module: nn.Module) -> nn.Module:
    """A hook on the output layer must be called, which the compiled module does not know of."""
    twin = copy.deepcopy(module)
    twin.output.register_forward_hook(lambda *_: None)
    return twin


def learning(tensors: Any) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def weighed(tensors: Any) -> Tensor:
    """A loss through every value, each with a weight of its own."""
    return sum(
        (t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in tree_leaves(tensors)
    )


ACTIVATIONS = (None, "sigmoid", "tanh", "relu")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("given", [False, True], ids=["initial", "given"])
@pytest.mark.parametrize("variant", TestNTM.variants)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_call_at_once_equals_the_long_way(
    variant: str, given: bool, batch: int, activation: str | None
) -> None:
    options = {**TestNTM.variants[variant], "output_activation": activation}
    module = TestNTM.make(**options)
    twin, x = long_way(module), data(batch=batch)
    _, state = module(data(batch=batch))
    results: list[Any] = []
    for side in (module, twin):
        input, *parts = learning([x, *state])
        found = side(input, NTMState(*parts) if given else None, return_weightings=True)
        assert at_once(found[0]) == (side is module)
        weighed(found).backward()
        leaves = [input, *(parts if given else []), *side.parameters()]
        with torch.no_grad():
            silent = side(x, state if given else None)
        results.append((found, silent, [leaf.grad for leaf in leaves]))
    assert [g is None for g in results[0][2]] == [g is None for g in results[1][2]]
    same(*results)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("variant", TestNTM.variants)
def test_what_a_sequence_starts_with_learns_as_in_the_reference(variant: str, batch: int) -> None:
    """Above all the initial state, of which the compiled module makes a batch itself."""
    module = TestNTM.make(**TestNTM.variants[variant])
    x = data(batch=batch)
    output, state = module(x)
    assert at_once(output)
    weighed((output, state)).backward()
    found = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    features, last = reference.ntm(
        x,
        module.init_state(batch),
        module._controller(),
        module.head_weight,
        module.head_bias,
        heads=module.heads,
        shift_range=module.shift_range,
        squash=module.squash,
        controller_type=module.controller,
    )
    answer = module._answer(features, None)
    same((output, state), (answer, last))
    weighed((answer, last)).backward()
    same(found, {name: p.grad for name, p in module.named_parameters()})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives_equal_those_of_the_long_way(activation: str | None) -> None:
    module = TestNTM.make(output_activation=activation, memory_init="learned")
    twin, x = long_way(module), data(3, 2)
    seconds = []
    for side in (module, twin):
        (input,) = learning([x])
        leaves = [input, *side.parameters()]
        found = side(input, return_weightings=True)
        assert at_once(found[0]) == (side is module)
        grads = torch.autograd.grad(weighed(found), leaves, create_graph=True)
        asked = torch.autograd.grad(
            weighed([g.square() for g in grads]), leaves, materialize_grads=True
        )
        seconds.append((grads, asked))
    same(*seconds)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("outputs", [1, 3, 9, 900], ids="outputs={}".format)
@pytest.mark.parametrize("control", [11, 16, 39])
def test_output_layers(control: int, outputs: int, dtype: torch.dtype) -> None:
    """A narrow one and one of many outputs are torch's, the others a kernel's."""
    sizes = {"controller_size": control, "output_size": outputs}
    module = TestNTM.make(**sizes, output_activation="tanh", dtype=dtype)
    twin, x = long_way(module), data(7, 2).to(dtype)
    found = []
    for side in (module, twin):
        output, _ = side(x)
        loss = output.square().sum()  # a gradient as it comes from a layer above
        loss = loss + output[..., :1].sum()
        loss.backward()
        found.append((output, [p.grad for p in side.parameters()]))
    wide = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(*found, **wide)
    for side in (module, twin):
        side.zero_grad()
        side(x)[0].sum().backward()  # one number for all
    grads = [[p.grad for p in side.parameters()] for side in (module, twin)]
    torch.testing.assert_close(*grads, **wide)


def test_a_frozen_sequence_gives_a_state_without_a_graph() -> None:
    module = TestNTM.make().requires_grad_(False)
    module.output.requires_grad_()
    state = None
    for _ in range(2):
        output, state, weightings = module(data(), state, return_weightings=True)
        assert at_once(output) and not weightings.requires_grad
        assert not any(t.requires_grad for t in state)
        output.sum().backward()


def test_gradients_of_some_outputs_and_of_some_parameters() -> None:
    module, x = TestNTM.make(output_activation="tanh"), data()
    twin = long_way(module)
    for learns in (["output.weight"], ["output.bias"], ["initial_weightings"], ["head_bias"]):
        for ask in (
            lambda found: found[0],
            lambda found: found[1].memory,
            lambda found: (found[0], found[1].hidden),
        ):
            for side in (module, twin):
                side.zero_grad()
                for name, parameter in side.named_parameters():
                    parameter.requires_grad_(name in learns)
                loss = weighed(ask(side(x)))
                if loss.requires_grad:
                    loss.backward()
            for own, other in zip(module.parameters(), twin.parameters(), strict=True):
                assert other.grad is None or own.grad is not None
                if own.grad is not None:
                    same(own.grad, torch.zeros_like(own) if other.grad is None else other.grad)


def test_the_output_layer_may_be_another() -> None:
    """What a compiled module does not know of goes the long way."""
    x = data()
    module = TestNTM.make()
    expected, _ = module(x)
    assert at_once(expected)
    called: list[Any] = []
    handle = module.output.register_forward_hook(lambda *_: called.append(1))
    same(module(x)[0], expected)
    assert called
    handle.remove()
    assert at_once(module(x)[0])
    nn.utils.parametrize.register_parametrization(module.output, "weight", nn.Identity())
    nn.utils.parametrize.register_parametrization(module, "head_weight", nn.Identity())
    same(module(x)[0], expected)
    nn.utils.parametrize.remove_parametrizations(module.output, "weight")
    same(module(x)[0], expected)
    module.output = nn.Sequential(module.output, nn.Tanh())
    same(module(x)[0], expected.tanh())
    module.output = nn.Linear(11, 2, bias=False).double()
    assert module(x)[0].shape == (6, 3, 2)


def test_modes_are_asked() -> None:
    """A mode that watches ops sees them all, and one that changes them does."""
    module, x = TestNTM.make(), data()
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() > 6 * 3 * module.output.weight.numel()
    with torch.device("cpu"):
        assert not at_once(module(x)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert not at_once(module(x)[0])
    assert at_once(module(x)[0])
    with torch.inference_mode():
        silent, _ = module(x)
    same(silent, module(x)[0])


def test_forward_mode_is_not_lost() -> None:
    """The output layer has one, if the op has none."""
    module, x = TestNTM.make(), data()
    weight = module.output.weight.detach()
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, torch.ones_like(weight))
        output, _ = torch.func.functional_call(module, {"output.weight": dual}, (x,))
        assert forward_ad.unpack_dual(output).tangent is not None


def test_a_change_between_the_passes_is_found() -> None:
    module = TestNTM.make()
    output, _ = module(data())
    with torch.no_grad():
        module.output.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


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
