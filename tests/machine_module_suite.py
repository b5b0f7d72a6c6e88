"""The tests that the modules of all machines inherit: shapes, chunks, lengths and reset, state."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from peak_memory import growth_mib
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

SIZES: dict[str, Any] = {
    "input_size": 4,
    "output_size": 3,
    "controller_size": 6,
    "memory_size": 8,
    "memory_dim": 5,
}


def data(time: int = 6, batch: int = 3) -> Tensor:
    return torch.randn(time, batch, 4, dtype=torch.float64)


def same(found: Any, expected: Any) -> None:
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class MachineModuleSuite:
    module: ClassVar[type[nn.Module]]
    state: ClassVar[type[Any]]
    traced: ClassVar[str] = "return_trace"  # asks for a trace
    variants: ClassVar[dict[str, dict[str, Any]]]
    starts: ClassVar[Sequence[dict[str, Any]]]  # what an initial state may be; learned in the first
    refused: ClassVar[dict[str, dict[str, Any]]]  # by the constructor, with what it expects
    noise: ClassVar[float] = 0.1

    @classmethod
    def make(cls, **options: Any) -> Any:
        options.setdefault("dtype", torch.float64)
        module = cls.module(**{**SIZES, **options})
        with torch.no_grad():  # off the initial values, at which much is zero or alike
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=cls.noise)
        return module

    def asking(self, module: Any, *steps: int) -> dict[str, Any]:
        """The arguments for all that a call can tell of its steps."""
        return {self.traced: True}

    def shapes(self, module: Any) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Of a state's parts from the memory on, and of the trace, for one row and step."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        suite = metafunc.cls
        if "options" in metafunc.fixturenames:
            metafunc.parametrize("options", suite.variants.values(), ids=suite.variants)
        if "start" in metafunc.fixturenames:
            metafunc.parametrize("start", suite.starts, ids=str)
        if "refused" in metafunc.fixturenames:
            metafunc.parametrize("refused", suite.refused)

    def test_shapes(self, options: dict[str, Any]) -> None:
        module = self.make(**options)
        output, state, trace = module(data(), **{self.traced: True})
        layers = 0 if options.get("controller") == "feedforward" else options.get("num_layers", 1)
        of_state, of_trace = self.shapes(module)
        assert output.shape == (6, 3, 3) and type(state) is self.state
        shapes = [(layers, 3, 6)] * 2 + [(3, *shape) for shape in of_state]
        assert [tuple(t.shape) for t in state] == shapes
        shapes = [(6, 3, *shape) for shape in of_trace]
        assert [tuple(t.shape) for t in tree_leaves(trace)] == shapes
        traces = {"weightings": trace} if isinstance(trace, Tensor) else trace._asdict()
        for name in traces.keys() & set(state._fields):
            same(traces[name][-1], getattr(state, name))

    def test_chunks_equal_the_whole(self, options: dict[str, Any]) -> None:
        module, x = self.make(**options), data()
        whole, last, trace = module(x, **{self.traced: True})
        state, outputs, traces = None, [], []
        for chunk in x.split((1, 3, 2)):
            output, state, part = module(chunk, state, **{self.traced: True})
            outputs.append(output)
            traces.append(tree_leaves(part))
        same(torch.cat(outputs), whole)
        same([torch.cat(parts) for parts in zip(*traces, strict=True)], trace)
        same(state, last)
        same(module(x), (whole, last))

    def test_every_parameter_learns(self, options: dict[str, Any]) -> None:
        module = self.make(**options)
        module(data())[0].square().sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name

    def test_unbatched(self, options: dict[str, Any]) -> None:
        module, x = self.make(**options), data()
        asked = self.asking(module, 1, 4)
        output, state, *told = module(x, **asked)
        row, last, *alone = module(x[:, 1], **asked)
        same(row, output[:, 1])
        same(alone, [a[:, 1] for a in tree_leaves(told)])
        assert [t.dim() for t in last] == [t.dim() - 1 for t in state]
        same(module(x[:, 1], last)[0], module(x, state)[0][:, 1])

    def test_batch_first(self) -> None:
        module, first, x = self.make(), self.make(batch_first=True), data()
        first.load_state_dict(module.state_dict())
        reset = torch.rand(6, 3) < 0.3
        lengths = torch.tensor([6, 2, 4])
        asked = self.asking(module, 5, 2)
        output, state, *told = module(x, lengths=lengths, reset=reset, **asked)
        turned, last, *found = first(x.transpose(0, 1), lengths=lengths, reset=reset.t(), **asked)
        same(turned.transpose(0, 1), output)
        same(last, state)
        same([a.transpose(0, 1) for a in tree_leaves(found)], told)

    def test_lengths(self, options: dict[str, Any]) -> None:
        module, x = self.make(**options), data()
        lengths = [6, 0, 4]
        x[4:, 2] = float("nan")
        given = {"lengths": torch.tensor(lengths), self.traced: True}
        output, state, trace = module(x, **given)
        for b, length in enumerate(lengths):
            alone, last, steps = module(x[:length, b : b + 1], **{self.traced: True})
            same(output[:length, b], alone[:, 0])
            assert not output[length:, b].any()
            for a, c in zip(tree_leaves(trace), tree_leaves(steps), strict=True):
                same(a[:length, b], c[:, 0])
                assert not a[length:, b].any()
            for k, (a, c) in enumerate(zip(state, last, strict=True)):
                same(a.select(int(k < 2), b), c.select(int(k < 2), 0))
        output.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)

    def test_reset_starts_anew(self, options: dict[str, Any]) -> None:
        module, x = self.make(**options), data()
        _, before = module(data())
        reset = torch.zeros(6, 3, dtype=torch.bool)
        reset[0, 0] = reset[4, 1] = True
        output, _ = module(x, before, reset=reset)
        same(output[:, :1], module(x[:, :1])[0])
        same(output[4:, 1:2], module(x[4:, 1:2])[0])
        same(output[:, 2], module(x, before)[0][:, 2])
        same(output[:4, 1], module(x[:4], before)[0][:, 1])

    def test_no_steps_and_no_rows(self) -> None:
        module = self.make()
        output, state, trace = module(data(time=0), **{self.traced: True})
        assert output.shape == (0, 3, 3)
        assert all(a.shape[:2] == (0, 3) for a in tree_leaves(trace))
        same(state, module.init_state(3))
        assert module(data(batch=0))[0].shape == (6, 0, 3)

    def test_state_dict_round_trip(self, options: dict[str, Any]) -> None:
        module, other, x = self.make(**options), self.make(**options), data()
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(x)[0], module(x)[0])
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x)[0], module(x)[0])
            assert repr(twin) == repr(module)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))

    def test_a_state_detaches(self) -> None:
        """As truncated backpropagation uses it."""
        module = self.make(**self.starts[0])
        for state in (module.init_state(2), module(data(batch=2))[1]):
            assert state.hidden.requires_grad
            bare = state.detach()
            assert type(bare) is self.state and not any(t.requires_grad for t in bare)
            same(bare, state)
            module(data(batch=2), bare)[0].sum().backward()
            first = [p for name, p in module.named_parameters() if name.startswith("initial_")]
            assert first and all(p.grad is None for p in first)

    @pytest.mark.parametrize("batch", [None, 2])
    def test_an_initial_state_may_be_changed_in_place(
        self, start: dict[str, Any], batch: int | None
    ) -> None:
        module = self.module(**SIZES, **start)
        before = copy.deepcopy(module.state_dict())
        state = module.init_state(batch)
        with torch.no_grad():
            for tensor in state:
                tensor[..., 0] = 7
        same(module.state_dict(), before)
        assert all(t.eq(7).sum() * t.size(-1) == t.numel() for t in state)
        if batch:
            with torch.no_grad():
                state.memory[0] = 8
            assert not state.memory[1].eq(8).any()

    @pytest.mark.slow
    def test_compile(self) -> None:
        """With sizes as symbols; the op's own suite has both kinds."""
        module, x = self.make(), data()
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
        found = compiled(x, **{self.traced: True})
        same(found, module(x, **{self.traced: True}))
        found[0].sum().backward()

    def test_export(self) -> None:
        module, x = self.make(), data()
        program = torch.export.export(module, (x,))
        same(program.module()(x)[0], module(x)[0])

    def test_autocast(self) -> None:
        module = self.make(dtype=torch.float32)
        x = data().float()
        with torch.autocast("cpu", torch.bfloat16):
            output, state = module(x)
            output, _ = module(x, state)
        assert output.dtype == torch.bfloat16
        output.float().sum().backward()
        grads = [p.grad for p in module.parameters()]
        assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_sixteen_bits(self, dtype: torch.dtype) -> None:
        module = self.make(dtype=dtype)
        output, _ = module(data().to(dtype))
        assert output.dtype == dtype and torch.isfinite(output).all()

    def test_functional_call_and_second_derivative(self) -> None:
        module, x = self.make(), data(3, 2)
        parameters = {name: p.detach() for name, p in module.named_parameters()}

        def loss(values: dict[str, Tensor], one: Tensor) -> Tensor:
            return torch.func.functional_call(module, values, (one,))[0].square().sum()

        grads = torch.func.grad(loss)(parameters, x)
        rows = x.transpose(0, 1).unsqueeze(2)  # [B, T, 1, I]
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, rows)
        for name, grad in grads.items():
            same(each[name].sum(0), grad)
        module(x)[0].square().sum().backward()
        for name, parameter in module.named_parameters():
            same(grads[name], parameter.grad)
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(leaf)[0].square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), leaf)
        assert torch.isfinite(second).all() and second.any()

    def test_constructor_refuses(self, refused: str) -> None:
        op = self.make()._op
        with pytest.raises(ValueError, match=f"seqmem::{op}: expected {refused}"):
            self.module(**{**SIZES, **self.refused[refused]})

    def test_call_refuses(self) -> None:
        module, x = self.make(), data()
        wide = x.size(-1)
        for bad in (x[0, 0], x[None], x[..., :-1]):
            says = rf"expected input of shape \[T, B, {wide}\] or \[T, {wide}\], got"
            with pytest.raises(ValueError, match=says):
                module(bad)
        with pytest.raises(TypeError, match="expected input of the parameters' dtype"):
            module(x.half())
        with pytest.raises(TypeError, match="expected lengths to be a tensor, got list"):
            module(x, lengths=[3])
        with pytest.raises(ValueError, match="expected a batch beside lengths or reset"):
            module(x[:, 0], lengths=torch.tensor([3]))


def check_memory_of_a_training_step(model: str, steps: int, batch: int, most: float) -> None:
    """Of inputs of 9 values: MiB beyond those of a step through eight."""
    definitions = f"""
import torch
import seqmem_fast as sf
torch.manual_seed(0)
model = {model}
def step(time):
    model(torch.rand(time, {batch}, 9))[0].square().mean().backward()
"""
    assert growth_mib(definitions, "step(8)", f"step({steps})") < most
