"""DNC: the suite of machines' modules, options, trace, links, and a convert's faithfulness."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from machine_module_suite import SIZES as SHARED_SIZES
from machine_module_suite import MachineModuleSuite, check_memory_of_a_training_step, data, same
from torch import Tensor, nn

from seqmem_fast import DNC, DNCState, DNCTrace

SIZES = {**SHARED_SIZES, "read_heads": 2}


class TestDNC(MachineModuleSuite):
    module, state, noise = DNC, DNCState, 0.3
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "plain": {},
        "many_heads": {"read_heads": 3, "write_heads": 2, "usage_gradient": True},
        "deep": {"num_layers": 2, "hidden_init": "learned", "layer_norm": True},
        "feedforward": {"controller": "feedforward", "num_layers": 2, "read_heads": 1},
        "csordas": {"masks": True, "mask_min": 0.1, "deallocate": True, "sharpen": True},
        "franke": {"links": False, "layer_norm": True, "bypass_dropout": 0.0},
        "softmax": {
            "allocation": "softmax",
            "squash": True,
            "strength": "softplus",
            "norm_floor": 0.0,
        },
    }
    starts = ({"hidden_init": "learned"},)
    refused: ClassVar[dict[str, dict[str, Any]]] = {
        "input_size": {"input_size": 0},
        "memory_size": {"memory_size": 0},
        "read_heads > 0": {"read_heads": 0},
        "write_heads > 0": {"write_heads": 0},
        "controller": {"controller": "gru"},
        "strength": {"strength": "exp"},
        "allocation": {"allocation": "topk"},
        "hidden_init": {"hidden_init": "random"},
        "0 <= mask_min": {"mask_min": 1.0},
        "0 <= bypass_dropout": {"bypass_dropout": -0.1},
        "norm_floor >= 0": {"norm_floor": -1e-6},
        "norm_floor >= 0 and eps >= 0, one": {"norm_floor": 0.0, "eps": 0.0},
        "output_activation": {"output_activation": "softmax"},
    }

    @classmethod
    def make(cls, **options: Any) -> DNC:
        return super().make(**{"read_heads": 2, **options})

    def asking(self, module: Any, *steps: int) -> dict[str, Any]:
        return {"links_at": steps} if module.links else {"return_trace": True}

    def shapes(self, module: Any) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        reads, writes, linked = module.read_heads, module.write_heads, module.links
        links = writes if linked else 0
        state = [(8, 5), (8,), (links, 8, 8), (links, 8), (writes, 8), (reads, 8), (reads, 5)]
        modes = (reads, 1 + 2 * writes if linked else 0)
        return state, [(8,), (writes, 8), (reads, 8), (writes,), (writes,), (reads,), modes]

    def test_its_trace_has_names(self) -> None:
        assert isinstance(self.make()(data(), return_trace=True)[2], DNCTrace)

    def test_it_computes_what_the_equations_say(self, options: dict[str, Any]) -> None:
        """A step of the memory by hand, from the state and the gates that the trace tells of."""
        dnc, x = self.make(**options), data(1)
        _, before = dnc(data())
        output, after, trace = dnc(x, before, return_trace=True)
        kept = (1 - trace.free_gates[0][..., None] * before.read_weights).prod(1)
        written = 1 - (1 - before.write_weights).prod(1)
        same(trace.usage[0], (before.usage + (1 - before.usage) * written) * kept)
        assert (after.write_weights.sum(-1) <= trace.write_gates[0] + 1e-12).all()
        for h in range(dnc.write_heads if dnc.links else 0):
            w, p = after.write_weights[:, h], before.precedence[:, h]
            link = (1 - w[:, :, None] - w[:, None]) * before.link[:, h] + w[:, :, None] * p[:, None]
            link.diagonal(dim1=1, dim2=2).zero_()
            same(after.link[:, h], link)
            same(after.precedence[:, h], (1 - w.sum(-1, keepdim=True)) * p + w)
        same(after.reads, after.read_weights @ after.memory)
        top = (
            after.hidden[-1]
            if len(after.hidden)
            else torch.tanh(
                F.linear(
                    torch.tanh(
                        F.linear(
                            torch.cat((x[0], before.reads.flatten(1)), 1),
                            dnc.weight_l0,
                            dnc.bias_l0,
                        )
                    ),
                    dnc.weight_l1,
                    dnc.bias_l1,
                )
            )
        )
        same(output[0], dnc.output(torch.cat((top, after.reads.flatten(1)), 1)))


make = TestDNC.make


@pytest.mark.parametrize("chosen", [(0,), (5,), (3, 1), (2, 2, 4), range(6)], ids=str)
def test_links_of_chosen_steps(chosen: Any) -> None:
    dnc, x = make(write_heads=2, layer_norm=True), data()
    reset, lengths = torch.zeros(6, 3, dtype=torch.bool), torch.tensor([6, 4, 0])
    reset[2, 0] = reset[3, 1] = True
    given = {"lengths": lengths, "reset": reset}
    whole = dnc(x, return_trace=True, **given)
    output, state, trace, links = dnc(x, links_at=chosen, **given)
    same((output, state, tuple(trace)), (*whole[:2], tuple(whole[2])))
    assert links.shape == (len(chosen), 3, 2, 8, 8)
    for step, found in zip(chosen, links, strict=True):
        _, last = dnc(x[: step + 1], lengths=lengths.clamp(max=step + 1), reset=reset[: step + 1])
        valid = (step < lengths)[:, None, None, None]
        same(found, torch.where(valid, last.link, 0))
    links.square().sum().backward()
    assert dnc.interface_weight.grad is not None
    assert dnc.interface_weight.grad.any() == (max(chosen) > 0)  # the first write follows none


def test_links_at_refuses() -> None:
    dnc, x = make(), data()
    for bad in ((6,), (0, -1)):
        with pytest.raises(ValueError, match=r"expected steps of 0\.\.5 in links_at"):
            dnc(x, links_at=bad)
    with pytest.raises(ValueError, match=r"expected links_at of a DNC with links"):
        make(links=False)(x, links_at=(1,))
    for lengths in ([7, 1, 1], [-1, 1, 1]):
        with pytest.raises(ValueError, match="lengths"):
            dnc(x, lengths=torch.tensor(lengths), links_at=(2,))
    with pytest.raises(ValueError, match="reset"):
        dnc(x, reset=torch.zeros(7, 3, dtype=torch.bool), links_at=(2,))


def test_one_slot_and_one_head() -> None:
    """Of one slot nothing can be linked to anything."""
    dnc = make(memory_size=1, read_heads=1)
    output, state, _, links = dnc(data(), links_at=(2, 5))
    assert torch.isfinite(output).all() and not links.any() and not state.link.any()


def test_bypass_dropout_drops_the_controller_on_its_way_out_alone() -> None:
    plain = make(output_size=11)
    dropping = make(output_size=11, bypass_dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    with torch.no_grad():  # the output is the features as they come
        for dnc in (plain, dropping):
            dnc.output = nn.Linear(16, 16, dtype=torch.float64)
            dnc.output.weight.copy_(torch.eye(16))
            dnc.output.bias.zero_()
    x = data()
    features, state, trace = plain(x, return_trace=True)
    dropped, last, steps = dropping(x, return_trace=True)
    same((last, tuple(steps)), (state, tuple(trace)))
    same(dropped[..., 6:], features[..., 6:])
    gone = dropped[..., :6] == 0
    assert 0.2 < gone.double().mean() < 0.8
    same(dropped[..., :6], torch.where(gone, 0, 2 * features[..., :6]))
    same(dropping.eval()(x)[0], features)


def test_layer_norm_makes_the_interface_blind_to_its_scale() -> None:
    dnc, x = make(layer_norm=True), data()
    expected = dnc(x)[0]
    with torch.no_grad():
        dnc.interface_weight.mul_(1e4)
        dnc.interface_bias.mul_(1e4)
        torch.testing.assert_close(dnc(x)[0], expected, rtol=1e-4, atol=1e-5)
        dnc.norm_bias.add_(1)
        assert (dnc(x)[0] - expected).abs().max() > 1e-3


def test_the_initial_hidden_is_learned_where_asked_for() -> None:
    assert not dict(DNC(**SIZES).named_parameters()).keys() & {"initial_hidden", "initial_cell"}
    assert not any(t.any() for t in DNC(**SIZES).init_state(2))
    dnc = make(hidden_init="learned")
    state = dnc.init_state()
    same(state.hidden, dnc.initial_hidden)
    dnc(data(1))[0].sum().backward()
    assert dnc.initial_hidden.grad is not None and dnc.initial_cell.grad is not None


def test_repr_names_what_is_not_usual() -> None:
    assert "DNC(\n  4, 3, 6, 8, 5, read_heads=2\n" in repr(DNC(**SIZES))
    assert "5, write_heads=2, links=False" in repr(
        DNC(**{**SIZES, "read_heads": 4}, write_heads=2, links=False)
    )


def test_memory_is_kept_across_episodes_on_purpose() -> None:
    """The other use of a reset: the state handed on, but for what the controller holds."""
    dnc, x = make(), data()
    _, state = dnc(data())
    fresh = dnc.init_state(3)
    kept = state._replace(hidden=fresh.hidden, cell=fresh.cell)
    assert (dnc(x, kept)[0] - dnc(x)[0]).abs().max() > 1e-3


@pytest.mark.slow
def test_ten_thousand_steps_train_within_100_mib() -> None:
    """The op 86 MiB, the rest is the output layer's; all links of all steps would be 625."""
    check_memory_of_a_training_step("sf.DNC(9, 8, 100, 128, 20)", 10_000, 1, 100)


# ---- a stand-in with the attributes of the package dnc (pytorch-dnc), after its documentation


class Memory(nn.Module):
    """A layer for each part of the interface, or one; modes are backward, forward, content."""

    def __init__(self, control: int, slots: int, width: int, reads: int, apart: bool) -> None:
        super().__init__()
        self.mem_size, self.cell_size, self.read_heads = slots, width, reads
        self.independent_linears = apart
        names = ("read_keys", "read_strengths", "write_key", "write_strength", "erase_vector")
        names += ("write_vector", "free_gates", "allocation_gate", "write_gate", "read_modes")
        self.rows = [reads * width, reads, width, 1, width, width, reads, 1, 1, 3 * reads]
        self.names = [f"{name}_transform" for name in names]
        if not apart:
            self.interface_weights = nn.Linear(control, sum(self.rows))
        for name, rows in zip(self.names, self.rows, strict=True):
            if apart:
                setattr(self, name, nn.Linear(control, rows))

    def start(self, batch: int) -> SimpleNamespace:
        N, R = self.mem_size, self.read_heads
        zeros = partial(torch.zeros, dtype=torch.float64)
        return SimpleNamespace(
            M=zeros(batch, N, self.cell_size),
            L=zeros(batch, N, N),
            p=zeros(batch, N),
            w=zeros(batch, N),
            r=zeros(batch, R, N),
            u=zeros(batch, N),
        )

    def forward(self, h: Tensor, s: SimpleNamespace) -> Tensor:
        R, N = self.read_heads, self.mem_size
        if self.independent_linears:
            parts = [getattr(self, name)(h) for name in self.names]
        else:
            parts = list(self.interface_weights(h).split(self.rows, 1))
        (keys, strengths, key, strength, erase, add, free, allocate, write, modes) = parts

        def content(keys: Tensor, strengths: Tensor) -> Tensor:
            keys = keys.tanh()
            norms = s.M.norm(dim=2)[:, None] * keys.norm(dim=2)[:, :, None]
            cosine = keys @ s.M.transpose(1, 2) / (norms + 1e-6)
            return (F.softplus(strengths)[..., None] * cosine).softmax(2)

        kept = (1 - free.sigmoid()[..., None] * s.r).prod(1)
        s.u = (s.u + (1 - s.u) * s.w) * kept
        used, order = (1e-6 + (1 - 1e-6) * s.u).sort(dim=1, stable=True)
        free_first = (1 - used) * torch.cat((torch.ones(len(h), 1), used.cumprod(1)[:, :-1]), 1)
        gate, allocated = allocate.sigmoid(), torch.zeros_like(used).scatter(1, order, free_first)
        found = content(key[:, None], strength)[:, 0]
        s.w = write.sigmoid() * (gate * allocated + (1 - gate) * found)
        s.M = s.M * (1 - s.w[..., None] * erase.sigmoid()[:, None])
        s.M = s.M + s.w[..., None] * add.tanh()[:, None]
        scale = 1 - s.w[:, :, None] - s.w[:, None]
        s.L = (scale * s.L + s.w[:, :, None] * s.p[:, None]) * (1 - torch.eye(N))
        s.p = (1 - s.w.sum(1, keepdim=True)) * s.p + s.w
        back, forward, look = modes.unflatten(1, (R, 3)).softmax(2).unbind(2)
        looked = content(keys.unflatten(1, (R, -1)), strengths)
        forwards, backwards = s.r @ s.L.transpose(1, 2), s.r @ s.L
        s.r = back[..., None] * backwards + forward[..., None] * forwards + look[..., None] * looked
        return (s.r @ s.M).flatten(1)


class Theirs(nn.Module):
    """`fed` says whether the controller sees what was read; theirs never does."""

    def __init__(self, layers: int = 1, apart: bool = False, bias: bool = True, **wrong: Any):
        super().__init__()
        self.input_size, self.output_size, self.rnn_type = 5, 9, "lstm"
        self.num_layers, self.dropout, self.clip, self.batch_first = 1, 0, 20, True
        rnn = nn.LSTM(5 + 2 * 4, 9, num_layers=layers, bias=bias, batch_first=True)
        self.rnns, self.memories = [rnn], [Memory(9, 7, 4, 2, apart)]
        self.rnn, self.memory = rnn, self.memories[0]
        self.output = nn.Linear(9 + 2 * 4, 5)
        for name, value in wrong.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, fed: bool) -> tuple[Tensor, SimpleNamespace]:
        state, reads = self.memory.start(len(x)), torch.zeros(len(x), 8)
        hidden, outputs = None, []
        for step in x.unbind(1):
            seen = reads if fed else torch.zeros_like(reads)
            h, hidden = self.rnn(torch.cat((step, seen), 1)[:, None], hidden)
            reads = self.memory(h[:, 0], state)
            outputs.append(self.output(torch.cat((h[:, 0], reads), 1)))
        return torch.stack(outputs, 1), state


@pytest.mark.parametrize("fed_back", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"layers": 2, "apart": True}, {"bias": False}], ids=["usual", "apart", "bare"]
)
def test_from_pytorch_dnc(options: dict[str, Any], fed_back: bool) -> None:
    theirs = Theirs(**options).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(3)
    dnc = DNC.from_pytorch_dnc(theirs, fed_back=fed_back)
    assert not dnc.training and dnc.interface_weight.dtype == torch.float64
    x = torch.randn(3, 12, 5, dtype=torch.float64)
    expected, memory = theirs(x, fed_back)
    output, state = dnc(x)
    same(output, expected)
    same((state.memory, state.link[:, 0], state.usage), (memory.M, memory.L, memory.u))
    assert (theirs(x, not fed_back)[0] - expected).abs().max() > 1e-3
    mine = torch.autograd.grad(output.square().sum(), [dnc.output.weight, dnc.weight_hh_l0])
    their = torch.autograd.grad(
        expected.square().sum(), [theirs.output.weight, theirs.rnn.weight_hh_l0]
    )
    same(mine, their)


UNLIKE: dict[str, dict[str, Any]] = {
    "rnn_type \"lstm\", got 'gru'": {"rnn_type": "gru"},
    "num_layers 1, got 2": {"num_layers": 2},
    "clip 0 or at least 1, got 0.5": {"clip": 0.5},
    "dropout 0, or eval mode, got 0.1": {"dropout": 0.1},
    r"a dense Memory, got \['Identity'\]": {"memories": [nn.Identity()]},
}


@pytest.mark.parametrize("message", UNLIKE)
def test_from_pytorch_dnc_refuses_what_has_no_equal(message: str) -> None:
    with pytest.raises(ValueError, match=f"expected {message}"):
        DNC.from_pytorch_dnc(Theirs(**UNLIKE[message]))


@pytest.mark.parametrize("fed_back", [True, False])
@pytest.mark.parametrize("options", [{}, {"independent_linears": True, "num_hidden_layers": 2}])
def test_from_the_package_itself(options: dict[str, Any], fed_back: bool) -> None:
    """Where it is installed. It works in float32, and breaks ties in another order."""
    package = pytest.importorskip("dnc", reason="the package dnc is not installed")
    layers = options.setdefault("num_hidden_layers", 1)
    theirs = package.DNC(5, 9, nr_cells=7, cell_size=4, read_heads=2, **options)
    x, zeros = torch.randn(3, 12, 5), torch.zeros(layers, 3, 9)
    state: Any = [(zeros, zeros)], None, None  # it would draw the hidden at random
    outputs = []
    for chunk in x.split(1 if fed_back else 12, 1):  # between calls it does hand on the reads
        output, state = theirs(chunk, state)
        outputs.append(output)
    output, _ = DNC.from_pytorch_dnc(theirs, fed_back=fed_back)(x)
    torch.testing.assert_close(output, torch.cat(outputs, 1), rtol=0, atol=1e-5)
