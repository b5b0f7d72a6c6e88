"""accelerate and restore: what is swapped, what stays and why, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

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


def test_swaps_all_and_restores_all() -> None:
    net = model()
    before = net(x)
    originals = dict(net.named_modules())
    parameters = dict(net.named_parameters())
    state = list(net.state_dict())
    report = sf.accelerate(net)
    assert [name for name, _ in report.swapped] == ["first", "cell", "again", "stack.0"]
    assert isinstance(net.first, sf.LSTM) and isinstance(net.stack[0], sf.LSTM)
    assert isinstance(net.cell, sf.LSTMCell) and net.cell is net.again
    assert dict(net.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in net.named_parameters())
    assert list(net.state_dict()) == state
    torch.testing.assert_close(net(x), before)
    assert sf.restore(net) == 4
    assert dict(net.named_modules()) == originals
    assert torch.equal(net(x), before)


def test_report_says_what_and_why() -> None:
    class Own(nn.LSTM):
        pass

    net = model()
    net.own = Own(5, 6)
    net.patched = nn.LSTM(5, 6)
    net.patched.forward = lambda input: input  # type: ignore[method-assign]
    text = str(sf.accelerate(net))
    for line in (
        "swapped 4, left 3",
        "swapped first: LSTM(5, 6, batch_first=True)",
        "swapped again: shared",
        "left gru: GRU: not an LSTM",
        "left own: Own: a subclass",
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
    assert sf.restore(net) == 4
    assert sf.restore(net) == 0


@pytest.mark.parametrize("module", [nn.LSTM(5, 6), nn.LSTMCell(5, 6)], ids=["LSTM", "LSTMCell"])
def test_the_model_itself_is_reported(module: Any) -> None:
    report = sf.accelerate(module)
    assert not report.swapped
    assert f"seqmem_fast.{type(module).__name__}.from_torch" in str(report)
    ours = getattr(sf, type(module).__name__).from_torch(module)
    torch.testing.assert_close(ours(x[0])[0], module(x[0])[0])
    assert all(p is q for p, q in zip(ours.parameters(), module.parameters(), strict=True))


def test_quantized_and_scripted_stay() -> None:
    net = nn.ModuleDict({"a": torch.jit.script(nn.LSTM(5, 6)), "b": nn.LSTM(5, 6)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net["b"] = torch.ao.quantization.quantize_dynamic(nn.Sequential(net["b"]), {nn.LSTM})[0]
    reasons = {name: reason for name, _, reason in sf.accelerate(net).kept}
    assert "scripted" in reasons["a"] and "quantized" in reasons["b"]


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


@pytest.mark.parametrize("again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_moves_copies_and_casts_keep_sharing(again: Any) -> None:
    net = model()
    sf.accelerate(net)
    net = again(net).double()
    expected = net(x.double())
    sf.restore(net)
    assert type(net.first) is nn.LSTM
    torch.testing.assert_close(net(x.double()), expected)


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
    assert "first" in dict(report.swapped) and isinstance(net.first, sf.LSTM)
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


def test_compiles_after_the_swap() -> None:
    """What nn.LSTM cannot: the whole model as one graph."""
    net = model()
    sf.accelerate(net)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))
