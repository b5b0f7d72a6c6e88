"""NTM and NTMMemory: shapes, chunks, lengths and reset, options, and a convert's faithfulness."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peak_memory import growth_mib
from torch import Tensor, nn

import seqmem_fast as sf
from seqmem_fast import NTM, NTMMemory, NTMState

SIZES: dict[str, Any] = {
    "input_size": 4,
    "output_size": 3,
    "controller_size": 6,
    "memory_size": 8,
    "memory_dim": 5,
}
VARIANTS: dict[str, dict[str, Any]] = {
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
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def make(**options: Any) -> NTM:
    options.setdefault("dtype", torch.float64)
    ntm = NTM(**SIZES, **options)
    with torch.no_grad():  # off the initial values, at which much is zero or alike
        for parameter in ntm.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return ntm


def data(time: int = 6, batch: int = 3) -> Tensor:
    return torch.randn(time, batch, 4, dtype=torch.float64)


@variants
def test_shapes(options: dict[str, Any]) -> None:
    ntm, heads = make(**options), options.get("heads", "wr")
    output, state, weightings = ntm(data(), return_weightings=True)
    layers = 0 if options.get("controller") == "feedforward" else options.get("num_layers", 1)
    assert output.shape == (6, 3, 3)
    assert weightings.shape == (6, 3, len(heads), 8)
    assert isinstance(state, NTMState)
    assert [tuple(t.shape) for t in state] == [
        (layers, 3, 6),
        (layers, 3, 6),
        (3, 8, 5),
        (3, len(heads), 8),
        (3, heads.count("r"), 5),
    ]
    torch.testing.assert_close(weightings[-1], state.weightings)
    torch.testing.assert_close(weightings.sum(-1), torch.ones(6, 3, len(heads)).double())


@variants
def test_chunks_equal_the_whole(options: dict[str, Any]) -> None:
    ntm, x = make(**options), data()
    whole, last, weightings = ntm(x, return_weightings=True)
    state, outputs, traces = None, [], []
    for chunk in x.split((1, 3, 2)):
        output, state, trace = ntm(chunk, state, return_weightings=True)
        outputs.append(output)
        traces.append(trace)
    torch.testing.assert_close(torch.cat(outputs), whole)
    torch.testing.assert_close(torch.cat(traces), weightings)
    torch.testing.assert_close(state, last)


@variants
def test_every_parameter_learns(options: dict[str, Any]) -> None:
    ntm = make(**options)
    output, _ = ntm(data())
    output.square().sum().backward()
    for name, parameter in ntm.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@variants
def test_unbatched(options: dict[str, Any]) -> None:
    ntm, x = make(**options), data()
    batched = ntm(x, return_weightings=True)
    output, state, weightings = ntm(x[:, 1], return_weightings=True)
    torch.testing.assert_close(output, batched[0][:, 1])
    torch.testing.assert_close(weightings, batched[2][:, 1])
    assert [t.dim() for t in state] == [2] * 5
    again, _ = ntm(x[:, 1], state)
    torch.testing.assert_close(again, ntm(x, batched[1])[0][:, 1])


def test_batch_first() -> None:
    ntm, x = make(), data()
    first = make(batch_first=True)
    first.load_state_dict(ntm.state_dict())
    reset = torch.rand(6, 3) < 0.3
    lengths = torch.tensor([6, 2, 4])
    expected = ntm(x, lengths=lengths, reset=reset, return_weightings=True)
    found = first(x.transpose(0, 1), lengths=lengths, reset=reset.t(), return_weightings=True)
    torch.testing.assert_close(found[0].transpose(0, 1), expected[0])
    torch.testing.assert_close(found[1], expected[1])
    torch.testing.assert_close(found[2].transpose(0, 1), expected[2])


@variants
def test_lengths(options: dict[str, Any]) -> None:
    ntm, x = make(**options), data()
    lengths = [6, 0, 4]
    x[4:, 2] = float("nan")
    output, state, weightings = ntm(x, lengths=torch.tensor(lengths), return_weightings=True)
    for b, length in enumerate(lengths):
        alone, last, trace = ntm(x[:length, b : b + 1], return_weightings=True)
        torch.testing.assert_close(output[:length, b], alone[:, 0])
        torch.testing.assert_close(weightings[:length, b], trace[:, 0])
        assert not output[length:, b].any() and not weightings[length:, b].any()
        for k, (a, c) in enumerate(zip(state, last, strict=True)):
            torch.testing.assert_close(a.select(int(k < 2), b), c.select(int(k < 2), 0))
    output.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ntm.parameters() if p.grad is not None)


@variants
def test_reset_starts_anew(options: dict[str, Any]) -> None:
    ntm, x = make(**options), data()
    _, before = ntm(data())
    reset = torch.zeros(6, 3, dtype=torch.bool)
    reset[0, 0] = reset[4, 1] = True
    output, _ = ntm(x, before, reset=reset)
    torch.testing.assert_close(output[:, :1], ntm(x[:, :1])[0])
    torch.testing.assert_close(output[4:, 1:2], ntm(x[4:, 1:2])[0])
    torch.testing.assert_close(output[:, 2], ntm(x, before)[0][:, 2])
    torch.testing.assert_close(output[:4, 1], ntm(x[:4], before)[0][:, 1])


def test_no_steps_and_no_rows() -> None:
    ntm = make()
    output, state = ntm(data(time=0))
    assert output.shape == (0, 3, 3)
    torch.testing.assert_close(state, ntm.init_state(3))
    assert ntm(data(batch=0))[0].shape == (6, 0, 3)


@variants
def test_state_dict_round_trip(options: dict[str, Any]) -> None:
    ntm, other, x = make(**options), make(**options), data()
    other.load_state_dict(ntm.state_dict())
    assert torch.equal(other(x)[0], ntm(x)[0])
    for twin in (copy.deepcopy(ntm), pickle.loads(pickle.dumps(ntm))):
        assert torch.equal(twin(x)[0], ntm(x)[0])
        assert repr(twin) == repr(ntm)
    file = io.BytesIO()
    torch.save(ntm.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))


def test_the_state_is_a_pytree_and_detaches() -> None:
    """As truncated backpropagation uses it."""
    ntm = make()
    _, state = ntm(data())
    state = NTMState(*(t.detach() for t in state))
    ntm(data(), state)[0].sum().backward()
    assert ntm.initial_memory.grad is None
    assert ntm.initial_hidden.grad is None


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("init", ["learned", "constant"])
def test_an_initial_state_may_be_changed_in_place(init: str, batch: int | None) -> None:
    ntm = NTM(**SIZES, memory_init=init)
    before = copy.deepcopy(ntm.state_dict())
    state = ntm.init_state(batch)
    with torch.no_grad():
        for tensor in state:
            tensor[..., 0, :] = 7
        if batch:
            state.memory[0] = 8
    assert all(
        torch.equal(a, b) for a, b in zip(ntm.state_dict().values(), before.values(), strict=True)
    )
    if batch:
        assert torch.equal(state.memory[1, 1:], ntm.initial_memory[1:])


def test_a_state_detaches() -> None:
    state = NTM(**SIZES).init_state(2)
    assert state.hidden.requires_grad
    bare = state.detach()
    assert isinstance(bare, NTMState) and not any(t.requires_grad for t in bare)
    assert all(torch.equal(a, b) for a, b in zip(state, bare, strict=True))


def test_a_new_layer_breaks_the_symmetry_of_its_slots() -> None:
    ntm = NTM(**SIZES)
    _, state, weightings = ntm(torch.randn(10, 2, 4), return_weightings=True)
    assert (weightings[0, 0].max(-1).values > 0.2).all()
    assert state.memory[0].std(0).min() > 1e-4


def test_compile() -> None:
    """With sizes as symbols; the op's own suite has both kinds."""
    ntm, x = make(), data()
    torch.compiler.reset()
    compiled = torch.compile(ntm, fullgraph=True, backend="aot_eager", dynamic=True)
    output, state, weightings = compiled(x, return_weightings=True)
    expected = ntm(x, return_weightings=True)
    torch.testing.assert_close((output, state, weightings), expected)
    output.sum().backward()


def test_export() -> None:
    ntm, x = make(), data()
    program = torch.export.export(ntm, (x,))
    torch.testing.assert_close(program.module()(x)[0], ntm(x)[0])


def test_autocast() -> None:
    ntm = make(dtype=torch.float32)
    x = data().float()
    with torch.autocast("cpu", torch.bfloat16):
        output, state = ntm(x)
        output, _ = ntm(x, state)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ntm.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    ntm = make(dtype=dtype)
    output, _ = ntm(data().to(dtype))
    assert output.dtype == dtype and torch.isfinite(output).all()


def test_functional_call_and_second_derivative() -> None:
    ntm, x = make(), data(3, 2)
    parameters = {name: p.detach() for name, p in ntm.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(ntm, values, (x,))[0].square().sum()

    grads = torch.func.grad(loss)(parameters)
    ntm(x)[0].square().sum().backward()
    for name, parameter in ntm.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ntm(leaf)[0].square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), leaf)
    assert torch.isfinite(second).all() and second.any()


REFUSED: dict[str, dict[str, Any]] = {
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


@pytest.mark.parametrize("name", REFUSED)
def test_constructor_refuses(name: str) -> None:
    with pytest.raises(ValueError, match=f"seqmem::ntm: expected {name}"):
        NTM(**{**SIZES, **REFUSED[name]})


def test_call_refuses() -> None:
    ntm, x = make(), data()
    for bad in (x[0, 0], x[None]):
        with pytest.raises(ValueError, match="expected input with 2 or 3 dimensions"):
            ntm(bad)
    with pytest.raises(ValueError, match="expected a batch beside lengths or reset"):
        ntm(x[:, 0], lengths=torch.tensor([3]))


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
    definitions = """
import torch
import seqmem_fast as sf
torch.manual_seed(0)
model = sf.NTM(9, 8, 100, 128, 20)
def step(time):
    model(torch.rand(time, 4, 9))[0].square().mean().backward()
"""
    assert growth_mib(definitions, "step(8)", "step(4000)") < 160
