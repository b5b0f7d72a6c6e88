"""accelerate and restore: what is swapped, what stays and why, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import seqmem_fast as sf


class Model(nn.Module):
    """One of each: a plain layer, a stack, a cell, one module under two names, others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(5, 6, batch_first=True)
        self.stack = nn.ModuleList(
            [nn.LSTM(6, 4, 2, bidirectional=True, proj_size=3, batch_first=True)]
        )
        self.cell = nn.LSTMCell(6, 6)
        self.again = self.cell
        self.gru = nn.GRU(6, 2)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.first(x)
        y, _ = self.stack[0](y)
        h, _ = self.cell(y[:, 0])
        h, c = self.again(h)
        return torch.as_tensor(self.head(h + c))


def model() -> Model:
    torch.manual_seed(0)
    return Model()


x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("replace", [False, True])
def test_swaps_all_and_restores_all(replace: bool) -> None:
    net = model()
    before = net(x)
    modules = dict(net.named_modules())
    parameters = dict(net.named_parameters())
    state = list(net.state_dict())
    report = sf.accelerate(net, replace=replace)
    assert [name for name, _ in report.swapped] == ["first", "stack.0", "cell"]
    assert type(net.first) is (sf.LSTM if replace else nn.LSTM)
    assert ("forward" in vars(net.cell)) is not replace
    assert dict(net.named_modules()) == modules
    assert all(p is parameters[name] for name, p in net.named_parameters())
    assert list(net.state_dict()) == state
    torch.testing.assert_close(net(x), before)
    assert sf.restore(net) == 3
    assert type(net.first) is nn.LSTM and vars(net.first).keys() == vars(nn.LSTM(5, 6)).keys()
    assert torch.equal(net(x), before)


def test_report_says_what_and_why() -> None:
    class Own(nn.LSTM):
        def forward(self, input: Any, hx: Any = None) -> Any:
            return super().forward(2 * input, hx)

    class Permuted(nn.LSTM):
        def permute_hidden(self, hx: Any, permutation: Any) -> Any:
            return hx[0] * 2, hx[1]

    net = model()
    net.own = Own(5, 6)
    net.permuted = Permuted(5, 6)
    net.patched = nn.LSTM(5, 6)
    net.patched.forward = lambda input: input  # type: ignore[method-assign]
    text = str(sf.accelerate(net))
    for line in (
        "swapped 3, left 4",
        "swapped first: LSTM(5, 6, batch_first=True)",
        "left gru: GRU: not an LSTM",
        "left own: Own: a subclass",
        "left permuted: Permuted: a subclass",
        "left patched: LSTM: its forward was patched",
    ):
        assert line in text
    assert type(net.own) is Own and type(net.patched) is nn.LSTM
    assert "head" not in text


def test_a_second_call_finds_nothing() -> None:
    net = model()
    sf.accelerate(net)
    report = sf.accelerate(net)
    assert not report.swapped and [name for name, *_ in report.kept] == ["gru"]
    assert sf.restore(net) == 3
    assert sf.restore(net) == 0


@pytest.mark.parametrize("module", [nn.LSTM(5, 6), nn.LSTMCell(5, 6)], ids=["LSTM", "LSTMCell"])
def test_the_model_itself_is_swapped(module: Any) -> None:
    expected = module(x[0])[0]
    assert "swapped (the model itself)" in str(sf.accelerate(module))
    torch.testing.assert_close(module(x[0])[0], expected)
    assert ours_runs(module, x[0])


def ours_runs(module: nn.Module, *args: Any) -> bool:
    """Whether a call reaches one of our ops."""
    names: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        module(*args)
    return any(name.startswith("seqmem") for name in names)


def test_quantized_and_scripted_stay() -> None:
    net = nn.ModuleDict({"a": torch.jit.script(nn.LSTM(5, 6)), "b": nn.LSTM(5, 6)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net["b"] = torch.ao.quantization.quantize_dynamic(nn.Sequential(net["b"]), {nn.LSTM})[0]
    reasons = {name: reason for name, _, reason in sf.accelerate(net).kept}
    assert "scripted" in reasons["a"] and "quantized" in reasons["b"]


def test_weights_that_no_kernel_takes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["seqmem_fast.accelerate"], "_DEVICES", ("cuda",))
    net = nn.ModuleDict({"here": nn.LSTM(5, 6), "complex": nn.LSTM(5, 6, dtype=torch.complex64)})
    reasons = {name: reason for name, _, reason in sf.accelerate(net).kept}
    assert reasons == {
        "here": "there is no kernel for devices of type cpu",
        "complex": "there is no kernel for torch.complex64",
    }


def test_an_optimizer_goes_on() -> None:
    """Half of the training before the swap, half after, equals training without it."""
    losses = []
    for swap in (False, True):
        net = model()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        history = []
        for step in range(12):
            if swap and step == 6:
                sf.accelerate(net)
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(torch.tensor(history))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)
    assert losses[0][-1] < losses[0][0]


def test_restore_brings_the_trained_weights() -> None:
    net = model().eval()
    sf.accelerate(net)
    net.train()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    trained = net(x)
    sf.restore(net)
    assert net.first.training
    torch.testing.assert_close(net(x), trained)


def saved(net: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved]
)
def test_copies_run_on_their_own_weights(copied: Any) -> None:
    lstm = nn.LSTM(5, 6, 2, batch_first=True, dropout=0.9)
    sf.accelerate(lstm)
    other = copied(lstm).eval()
    assert type(other) is nn.LSTM and other.forward.args[1] is other
    assert torch.equal(other(x)[0], copied(lstm).eval()(x)[0])  # no dropout: its own `training`
    assert ours_runs(other, x)
    other._parameters = {name: torch.zeros_like(p) for name, p in lstm.named_parameters()}
    assert not other(x)[0].any()
    replica = lstm._replicate_for_data_parallel()
    assert replica.forward.args[1] is replica
    assert sf.restore(other) == 1 and sf.restore(lstm) == 1


def test_what_our_op_refuses_is_torchs() -> None:
    lstm, attention = nn.LSTM(5, 6), nn.MultiheadAttention(4, 2, batch_first=True).eval()
    sf.accelerate(lstm)
    sf.accelerate(attention)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        lstm(torch.randn(7, 3, 4))
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    with torch.no_grad():
        output, _ = attention(nested, nested, nested, need_weights=False)
    assert output.is_nested
    with pytest.raises(ValueError, match="expected lengths of shape"):
        lstm(x, lengths=torch.ones(2).long())


@pytest.mark.parametrize(
    ("module", "args"),
    [
        (nn.Sequential(nn.LSTM(5, 6)), (x,)),
        (nn.LSTMCell(5, 6), (x[0],)),
        (nn.MultiheadAttention(5, 1), (x, x, x)),
    ],
    ids=["LSTM", "LSTMCell", "MultiheadAttention"],
)
def test_torchscript_takes_torchs_own(module: nn.Module, args: Any) -> None:
    expected = module(*args)[0]
    sf.accelerate(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "seqmem::" not in str(torch.jit.trace(module, args, check_trace=False).inlined_graph)
        scripted = torch.jit.script(module)
    assert "seqmem::" not in str(scripted.inlined_graph)
    torch.testing.assert_close(scripted(*args)[0], expected)


def test_quantize_dynamic_finds_it() -> None:
    net = nn.Sequential(nn.LSTM(5, 6))
    sf.accelerate(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(net, {nn.LSTM})[0]
    assert type(quantized).__module__.startswith("torch.ao")


def test_children_stay_and_removed_pruning_leaves_the_weight() -> None:
    lstm = nn.LSTM(5, 6)
    lstm.norm = nn.LayerNorm(6)
    prune.l1_unstructured(lstm, "weight_hh_l0", amount=0.5)
    keys = list(lstm.state_dict())
    sf.accelerate(lstm)
    assert list(lstm.state_dict()) == keys
    prune.remove(lstm, "weight_hh_l0")
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(3)
    ours = lstm(x)[0]
    sf.restore(lstm)
    torch.testing.assert_close(lstm(x)[0], ours)


def test_hooks_go_along() -> None:
    net = model()
    seen: list[str] = []
    handles = [
        net.first.register_forward_hook(lambda module, args, output: seen.append("forward")),
        net.first.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append("before"), with_kwargs=True
        ),
        net.first.register_full_backward_hook(lambda module, gi, go: seen.append("backward")),
    ]
    sf.accelerate(net)
    net(x.clone().requires_grad_()).sum().backward()
    assert seen == ["before", "forward", "backward"]
    for handle in handles:
        handle.remove()
    net(x)
    assert len(seen) == 3


@pytest.mark.parametrize("wrap", ["parametrization", "hook", "pruned"])
def test_reparametrised_weights_go_along(wrap: str) -> None:
    net = model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if wrap == "parametrization":
            parametrizations.weight_norm(net.first, "weight_hh_l0")
            parametrizations.weight_norm(net.first, "weight_ih_l0")
        elif wrap == "hook":
            weight_norm(net.first, "weight_hh_l0")
        else:
            prune.l1_unstructured(net.first, "weight_hh_l0", amount=0.5)
    names = [name for name, _ in net.named_parameters()]
    originals = list(net.parameters())
    report = sf.accelerate(net)
    assert "first" in dict(report.swapped) and "forward" in vars(net.first)
    assert [name for name, _ in net.named_parameters()] == names
    assert all(p is q for p, q in zip(net.parameters(), originals, strict=True))
    for _ in range(2):
        ours = net(x)
        grads = torch.autograd.grad(ours.sum(), list(net.first.parameters()))
        sf.restore(net)
        theirs = net(x)
        torch.testing.assert_close(ours, theirs)
        expected = torch.autograd.grad(theirs.sum(), list(net.first.parameters()))
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.2)
        sf.accelerate(net)


@pytest.mark.slow
@pytest.mark.parametrize("replace", [False, True])
def test_compiles_after_the_swap(replace: bool) -> None:
    """What nn.LSTM cannot: the whole model as one graph."""
    net = model()
    sf.accelerate(net, replace=replace)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(allow_rnn=not replace):
        torch.testing.assert_close(compiled(x), net(x))
