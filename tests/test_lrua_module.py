"""MANN: shapes, chunks, lengths and reset, options, and that it remembers at one sight."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peak_memory import growth_mib
from torch import Tensor

import seqmem_fast as sf
from seqmem_fast import MANN, LRUAState, LRUATrace

SIZES: dict[str, Any] = {
    "input_size": 4,
    "output_size": 3,
    "controller_size": 6,
    "memory_size": 8,
    "memory_dim": 5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "keys": {"read_heads": 1, "add": "key", "gamma": 0.5},
    "deep": {"num_layers": 2, "memory_init": "learned", "strength": True, "read_heads": 3},
    "feedforward": {"controller": "feedforward", "num_layers": 2, "erase_all": True},
    "fixed": {"memory_init": "random", "output_activation": "sigmoid", "read_heads": 2},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def make(**options: Any) -> MANN:
    options.setdefault("dtype", torch.float64)
    mann = MANN(**SIZES, **options)
    with torch.no_grad():  # off the initial values, at which much is zero or alike
        for tensor in (*mann.parameters(), mann.initial_memory):
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return mann


def data(time: int = 6, batch: int = 3) -> Tensor:
    return torch.randn(time, batch, 4, dtype=torch.float64)


@variants
def test_shapes(options: dict[str, Any]) -> None:
    mann, heads = make(**options), options.get("read_heads", 4)
    output, state, trace = mann(data(), return_trace=True)
    layers = 0 if options.get("controller") == "feedforward" else options.get("num_layers", 1)
    assert output.shape == (6, 3, 3)
    assert isinstance(state, LRUAState) and isinstance(trace, LRUATrace)
    assert [tuple(t.shape) for t in state] == [
        (layers, 3, 6),
        (layers, 3, 6),
        (3, 8, 5),
        (3, 8),
        (3, heads, 8),
        (3, heads, 5),
    ]
    assert [tuple(t.shape) for t in trace] == [(6, 3, 8), (6, 3, heads, 8), (6, 3, heads, 8)]
    torch.testing.assert_close(trace.read_weights[-1], state.read_weights)
    torch.testing.assert_close(trace.usage[-1], state.usage)
    torch.testing.assert_close(trace.read_weights.sum(-1), torch.ones(6, 3, heads).double())


@variants
def test_chunks_equal_the_whole(options: dict[str, Any]) -> None:
    mann, x = make(**options), data()
    whole, last, trace = mann(x, return_trace=True)
    state, outputs, traces = None, [], []
    for chunk in x.split((1, 3, 2)):
        output, state, part = mann(chunk, state, return_trace=True)
        outputs.append(output)
        traces.append(part)
    torch.testing.assert_close(torch.cat(outputs), whole)
    for a, b in zip(zip(*traces, strict=True), trace, strict=True):
        torch.testing.assert_close(torch.cat(a), b)
    torch.testing.assert_close(state, last)


@variants
def test_every_parameter_learns(options: dict[str, Any]) -> None:
    mann = make(**options)
    output, _ = mann(data())
    output.square().sum().backward()
    for name, parameter in mann.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@variants
def test_unbatched(options: dict[str, Any]) -> None:
    mann, x = make(**options), data()
    batched = mann(x, return_trace=True)
    output, state, trace = mann(x[:, 1], return_trace=True)
    torch.testing.assert_close(output, batched[0][:, 1])
    for a, b in zip(trace, batched[2], strict=True):
        torch.testing.assert_close(a, b[:, 1])
    assert [t.dim() for t in state] == [2, 2, 2, 1, 2, 2]
    again, _ = mann(x[:, 1], state)
    torch.testing.assert_close(again, mann(x, batched[1])[0][:, 1])


def test_batch_first() -> None:
    mann, x = make(), data()
    first = make(batch_first=True)
    first.load_state_dict(mann.state_dict())
    reset = torch.rand(6, 3) < 0.3
    lengths = torch.tensor([6, 2, 4])
    expected = mann(x, lengths=lengths, reset=reset, return_trace=True)
    found = first(x.transpose(0, 1), lengths=lengths, reset=reset.t(), return_trace=True)
    torch.testing.assert_close(found[0].transpose(0, 1), expected[0])
    torch.testing.assert_close(found[1], expected[1])
    for a, b in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(a.transpose(0, 1), b)


@variants
def test_lengths(options: dict[str, Any]) -> None:
    mann, x = make(**options), data()
    lengths = [6, 0, 4]
    x[4:, 2] = float("nan")
    output, state, trace = mann(x, lengths=torch.tensor(lengths), return_trace=True)
    for b, length in enumerate(lengths):
        alone, last, part = mann(x[:length, b : b + 1], return_trace=True)
        torch.testing.assert_close(output[:length, b], alone[:, 0])
        assert not output[length:, b].any()
        for a, c in zip(trace, part, strict=True):
            torch.testing.assert_close(a[:length, b], c[:, 0])
            assert not a[length:, b].any()
        for k, (a, c) in enumerate(zip(state, last, strict=True)):
            torch.testing.assert_close(a.select(int(k < 2), b), c.select(int(k < 2), 0))
    output.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in mann.parameters() if p.grad is not None)


@variants
def test_reset_starts_anew(options: dict[str, Any]) -> None:
    mann, x = make(**options), data()
    _, before = mann(data())
    reset = torch.zeros(6, 3, dtype=torch.bool)
    reset[0, 0] = reset[4, 1] = True
    output, _ = mann(x, before, reset=reset)
    torch.testing.assert_close(output[:, :1], mann(x[:, :1])[0])
    torch.testing.assert_close(output[4:, 1:2], mann(x[4:, 1:2])[0])
    torch.testing.assert_close(output[:, 2], mann(x, before)[0][:, 2])
    torch.testing.assert_close(output[:4, 1], mann(x[:4], before)[0][:, 1])


def test_no_steps_and_no_rows() -> None:
    mann = make()
    output, state = mann(data(time=0))
    assert output.shape == (0, 3, 3)
    torch.testing.assert_close(state, mann.init_state(3))
    assert mann(data(batch=0))[0].shape == (6, 0, 3)


@variants
def test_state_dict_round_trip(options: dict[str, Any]) -> None:
    mann, other, x = make(**options), make(**options), data()
    other.load_state_dict(mann.state_dict())
    assert torch.equal(other(x)[0], mann(x)[0])
    for twin in (copy.deepcopy(mann), pickle.loads(pickle.dumps(mann))):
        assert torch.equal(twin(x)[0], mann(x)[0])
        assert repr(twin) == repr(mann)


def test_a_state_detaches() -> None:
    mann = make()
    state = mann.init_state(2)
    assert state.hidden.requires_grad
    bare = state.detach()
    assert isinstance(bare, LRUAState) and not any(t.requires_grad for t in bare)
    mann(data(batch=2), bare)[0].sum().backward()
    assert mann.initial_hidden.grad is None


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


def test_compile() -> None:
    """With sizes as symbols; the op's own suite has both kinds."""
    mann, x = make(), data()
    torch.compiler.reset()
    compiled = torch.compile(mann, fullgraph=True, backend="aot_eager", dynamic=True)
    found = compiled(x, return_trace=True)
    torch.testing.assert_close(found, mann(x, return_trace=True))
    found[0].sum().backward()


def test_export() -> None:
    mann, x = make(), data()
    program = torch.export.export(mann, (x,))
    torch.testing.assert_close(program.module()(x)[0], mann(x)[0])


def test_autocast() -> None:
    mann = make(dtype=torch.float32)
    x = data().float()
    with torch.autocast("cpu", torch.bfloat16):
        output, state = mann(x)
        output, _ = mann(x, state)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mann.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    mann = make(dtype=dtype)
    output, _ = mann(data().to(dtype))
    assert output.dtype == dtype and torch.isfinite(output).all()


def test_functional_call_and_second_derivative() -> None:
    mann, x = make(), data(3, 2)
    parameters = {name: p.detach() for name, p in mann.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(mann, values, (x,))[0].square().sum()

    grads = torch.func.grad(loss)(parameters)
    mann(x)[0].square().sum().backward()
    for name, parameter in mann.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(mann(leaf)[0].square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), leaf)
    assert torch.isfinite(second).all() and second.any()


REFUSED: dict[str, dict[str, Any]] = {
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


@pytest.mark.parametrize("name", REFUSED)
def test_constructor_refuses(name: str) -> None:
    with pytest.raises(ValueError, match=f"seqmem::lrua: expected {name}"):
        MANN(**{**SIZES, **REFUSED[name]})


def test_call_refuses() -> None:
    mann, x = make(), data()
    for bad in (x[0, 0], x[None]):
        with pytest.raises(ValueError, match="expected input with 2 or 3 dimensions"):
            mann(bad)
    with pytest.raises(ValueError, match="expected a batch beside lengths or reset"):
        mann(x[:, 0], lengths=torch.tensor([3]))


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
    definitions = """
import torch
import seqmem_fast as sf
torch.manual_seed(0)
model = sf.MANN(9, 8, 100, 128, 20, read_heads=1)
def step(time):
    model(torch.rand(time, 4, 9))[0].square().mean().backward()
"""
    assert growth_mib(definitions, "step(8)", "step(4000)") < 160


def test_public_names() -> None:
    assert sf.MANN is MANN and sf.LRUAState is LRUAState and sf.LRUATrace is LRUATrace
