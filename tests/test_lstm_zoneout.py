"""Zoneout and layer normalisation: ``ops.lstm_regularized``, and these options of the modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import seqmem_fast as sf
from seqmem_fast.ops.lstm_regularized_steps import Steps
from seqmem_fast.reference.lstm_regularized import lstm_regularized as reference

T, B, IN, H = 4, 3, 3, 5
DOUBLE: Any = {"dtype": torch.float64}
LENGTHS = torch.tensor([4, 0, 2])
RESET = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.bool)
SIZES = torch.tensor([3, 3, 1, 1])
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"reverse": True},
    "lengths": {"lengths": LENGTHS},
    "lengths_reset": {"lengths": LENGTHS, "reset": RESET},
    "all_reverse": {"lengths": LENGTHS, "reset": RESET, "reverse": True},
    "batch_first": {"lengths": LENGTHS, "reset": RESET.t(), "batch_first": True},
    "packed": {"batch_sizes": SIZES},
    "packed_reverse": {"batch_sizes": SIZES, "reverse": True},
    "no_gates": {"return_gates": False},
}
OPTIONS = {
    "lengths": None,
    "reset": None,
    "batch_sizes": None,
    "batch_first": False,
    "reverse": False,
    "return_gates": True,
}


def arguments(
    norm: bool, zoneout: str, layout: dict[str, Any], state: bool = True
) -> tuple[list[Any], list[Any]]:
    """Those with gradients, and the others, by position."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, **DOUBLE).requires_grad_()

    packed, first = "batch_sizes" in layout, layout.get("batch_first")
    shape = (int(SIZES.sum()), IN) if packed else (B, T, IN) if first else (T, B, IN)
    tensors: list[Any] = [draw(*shape), *([draw(B, H), draw(B, H)] if state else [None, None])]
    tensors += [draw(4 * H, IN), draw(4 * H, H)]
    tensors += [draw(4 * H), draw(4 * H)] if state else [None, None]
    tensors += [draw(4 * H), draw(4 * H), draw(H), draw(H)] if norm else [None] * 4
    masks = torch.rand(2, T, B, H) < 0.4
    zoneouts: Any = {"none": (0.0, 0.0), "eval": (0.3, 0.2), "train": masks, "h": (masks[0], 0.0)}
    return tensors, [*zoneouts[zoneout], *(OPTIONS | layout).values()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zoneout", ["none", "eval", "train", "h"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_steps_and_their_backward_are_the_reference_s(
    norm: bool, zoneout: str, layout: str, state: bool
) -> None:
    tensors, rest = arguments(norm, zoneout, LAYOUTS[layout], state)
    ours, theirs = Steps.apply(*tensors, *rest), reference(*tensors, *rest)
    assert [each is None for each in ours] == [each is None for each in theirs]
    results = [[each for each in some if each is not None] for some in (ours, theirs)]
    torch.testing.assert_close(*results)
    inputs = [each for each in tensors if each is not None]
    grads = [torch.randn_like(each) for each in results[0]]
    found = [torch.autograd.grad(some, inputs, grads) for some in results]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("zoneout", ["eval", "train"])
def test_derivatives(zoneout: str) -> None:
    tensors, rest = arguments(True, zoneout, LAYOUTS["batch_first"])

    def run(*some: Tensor) -> Any:
        return Steps.apply(*some, *rest)

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_only_what_is_wanted_is_computed() -> None:
    tensors, rest = arguments(True, "train", {})
    for k, tensor in enumerate(tensors):
        for each in tensors:
            each.requires_grad_(each is tensor)
        Steps.apply(*tensors, *rest)[0].sum().backward()
        assert [each.grad is not None for each in tensors] == [n <= k for n in range(11)]


def test_inside_func_it_is_the_same() -> None:
    lstm = sf.LSTM(IN, H, layer_norm=True, zoneout_h=0.2, **DOUBLE).eval()
    x = torch.randn(T, B, IN, **DOUBLE)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(lstm, weights, (x,))[0].square().sum()

    parameters = dict(lstm.named_parameters())
    found = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    torch.testing.assert_close(list(found.values()), list(expected))


def masks(module: Any, *shape: int) -> list[Tensor]:
    """What one layer draws from seed 5."""
    torch.manual_seed(5)
    return [torch.rand(*shape, H) < share for share in (module.zoneout_h, module.zoneout_c)]


def run(module: nn.Module, *args: Any, **options: Any) -> Any:
    torch.manual_seed(5)
    return module(*args, **options)


@pytest.mark.parametrize("training", [False, True])
def test_zoneout_is_the_paper_s(training: bool) -> None:
    lstm = sf.LSTM(IN, H, zoneout_h=0.3, zoneout_c=0.6, **DOUBLE).train(training)
    cell = nn.LSTMCell(IN, H, **DOUBLE)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in lstm.state_dict().items()})
    x, h, c = (torch.randn(*shape, **DOUBLE) for shape in ((T, B, IN), (B, H), (B, H)))
    output, (h_n, c_n) = run(lstm, x, (h[None], c[None]))
    drawn: Any = masks(lstm, T, B) if training else [torch.full((T, B, H), p) for p in (0.3, 0.6)]
    for t in range(T):
        h_new, c_new = cell(x[t], (h, c))  # its h comes of the c before zoneout
        d_h, d_c = drawn[0][t].double(), drawn[1][t].double()
        h, c = d_h * h + (1 - d_h) * h_new, d_c * c + (1 - d_c) * c_new
        torch.testing.assert_close(output[t], h, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close((h_n[0], c_n[0]), (h, c), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_is_the_paper_s(bias: bool) -> None:
    lstm = sf.LSTM(IN, H, bias=bias, layer_norm=True, **DOUBLE)
    weights = dict(lstm.named_parameters())
    with torch.no_grad():
        for name in ("gain_ih_l0", "gain_hh_l0", "gain_c_l0", "shift_c_l0"):
            weights[name].normal_()
    x = torch.randn(T, B, IN, **DOUBLE)
    h = c = torch.zeros(B, H, **DOUBLE)
    output, (h_n, c_n) = lstm(x)
    for t in range(T):
        z = F.layer_norm(x[t] @ weights["weight_ih_l0"].t(), (4 * H,), weights["gain_ih_l0"])
        z = z + F.layer_norm(h @ weights["weight_hh_l0"].t(), (4 * H,), weights["gain_hh_l0"])
        if bias:
            z = z + weights["bias_ih_l0"] + weights["bias_hh_l0"]
        i, f, g, o = z.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * F.layer_norm(c, (H,), weights["gain_c_l0"], weights["shift_c_l0"]).tanh()
        torch.testing.assert_close(output[t], h)
    torch.testing.assert_close((h_n[0], c_n[0]), (h, c))


def regularized(**options: Any) -> Iterator[sf.LSTM]:
    torch.manual_seed(0)
    for norm in (False, True):
        yield sf.LSTM(IN, H, zoneout_h=0.3, zoneout_c=0.2, layer_norm=norm, **options, **DOUBLE)


def test_rows_of_a_stack_are_what_they_are_alone() -> None:
    for lstm in regularized(num_layers=2, bidirectional=True, batch_first=True):
        lstm.eval()
        x, lengths = torch.randn(B, T, IN, **DOUBLE), torch.tensor([4, 3, 1])
        state = torch.randn(4, B, H, **DOUBLE), torch.randn(4, B, H, **DOUBLE)
        output, (h, c), gates = lstm(x, state, lengths=lengths, return_gates=True)
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        for row, n in enumerate(lengths.tolist()):
            alone, (h_1, c_1) = lstm(x[row, :n], (state[0][:, row], state[1][:, row]))
            torch.testing.assert_close(output[row, :n], alone)
            assert not output[row, n:].any() and not gates.c[:, row, n:].any()
            torch.testing.assert_close((h[:, row], c[:, row]), (h_1, c_1))
        assert torch.equal(gates.c[2, torch.arange(B), lengths - 1], c[2])
        result, (h_2, c_2) = lstm(packed, state)
        again = pack_padded_sequence(output, lengths, batch_first=True)
        torch.testing.assert_close((result.data, h_2, c_2), (again.data, h, c))


def test_a_reset_starts_anew() -> None:
    for lstm in regularized():
        x, reset = torch.randn(T, B, IN, **DOUBLE), torch.zeros(T, B, dtype=torch.bool)
        reset[2] = True
        lstm.eval()
        output, _ = lstm(x, reset=reset)
        torch.testing.assert_close(output, torch.cat((lstm(x[:2])[0], lstm(x[2:])[0])))


def test_masks_come_from_the_seed_alone() -> None:
    threads = torch.get_num_threads()
    lstm = sf.LSTM(IN, H, 2, zoneout_h=0.5, zoneout_c=0.5)
    x = torch.randn(T, B, IN)
    first = run(lstm, x)
    try:
        torch.set_num_threads(2)
        torch.testing.assert_close(run(lstm, x), first)
        torch.set_num_threads(1)
        torch.testing.assert_close(run(lstm, x), first)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(lstm(x)[0], first[0])
    big = sf.LSTM(IN, 64, zoneout_h=0.3)
    output, _ = big(torch.randn(100, 8, IN))
    stayed = (output[1:] == output[:-1]).float().mean()
    assert 0.28 < float(stayed) < 0.32
    all_kept = sf.LSTM(IN, H, zoneout_h=1.0, zoneout_c=1.0)
    state = torch.randn(1, B, H), torch.randn(1, B, H)
    assert torch.equal(all_kept(x, state)[1][1], state[1])
    torch.testing.assert_close(all_kept.eval()(x, state)[1], state)


def test_with_both_dropouts() -> None:
    for lstm in regularized(num_layers=2, dropout=0.5, locked_dropout=True, weight_dropout=1.0):
        x = torch.randn(T, B, IN, **DOUBLE)
        found = run(lstm, x)
        lstm.weight_dropout = 0.0
        assert not torch.equal(run(lstm, x)[0], found[0])
        lstm.weight_dropout = 1.0
        with torch.no_grad():  # what is dropped does not matter
            lstm.get_parameter("weight_hh_l0").normal_()
        torch.testing.assert_close(run(lstm, x), found)
        lstm.dropout = 1.0
        lstm.eval()
        assert lstm(x)[0].any()


def test_a_cell_is_one_step() -> None:
    for lstm in regularized():
        cell = sf.LSTMCell(
            IN, H, zoneout_h=0.3, zoneout_c=0.2, layer_norm=lstm.layer_norm, **DOUBLE
        )
        cell.load_state_dict({k.removesuffix("_l0"): v for k, v in lstm.state_dict().items()})
        x = torch.randn(2, B, IN, **DOUBLE)
        state = run(cell, x[0])
        torch.testing.assert_close(state[0], run(lstm, x[:1])[0][0])
        lstm.eval()
        cell.eval()
        expected = lstm(x[1:], (state[0][None], state[1][None]))[1]
        found = cell(x[1], state)
        torch.testing.assert_close(found, (expected[0][0], expected[1][0]))
        alone = cell(x[1, 0], (state[0][0], state[1][0]))
        torch.testing.assert_close(alone, (found[0][0], found[1][0]))
        with pytest.raises(ValueError, match=r"lstm_cell: expected input of shape \[B, I\]"):
            cell(x)


def test_they_are_kept_said_and_started_again() -> None:
    lstm = sf.LSTM(IN, H, 2, bidirectional=True, zoneout_c=0.1, layer_norm=True, forget_bias=1.0)
    assert "forget_bias=1.0, zoneout_c=0.1, layer_norm=True" in repr(lstm)
    names = [n + s for n in ("gain_ih_l1", "shift_c_l0") for s in ("", "_reverse")]
    assert all(name in lstm.state_dict() for name in names)
    assert len(lstm.state_dict()) == 4 * 8
    lstm.eval()
    x = torch.randn(T, B, IN)
    for twin in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert repr(twin) == repr(lstm)
        torch.testing.assert_close(twin(x), lstm(x))
    torch.manual_seed(1)
    plain = nn.LSTM(IN, H, 2, bidirectional=True)
    with torch.no_grad():
        lstm.get_parameter("gain_c_l1").zero_()
    torch.manual_seed(1)
    lstm.reset_parameters()
    assert torch.equal(lstm.get_parameter("gain_c_l1"), torch.ones(H))
    assert not lstm.get_parameter("shift_c_l1").any()
    assert torch.equal(lstm.weight_hh_l1_reverse, plain.weight_hh_l1_reverse)
    cell = sf.LSTMCell(IN, H, layer_norm=True, zoneout_h=0.5)
    assert repr(cell) == "LSTMCell(3, 5, zoneout_h=0.5, layer_norm=True)"
    cell.reset_parameters()
    assert torch.equal(cell.get_parameter("gain_hh"), torch.ones(4 * H))
    lstm = sf.LSTM(IN, H, zoneout_h=0.1, layer_norm=True, device="meta")
    assert lstm.get_parameter("gain_c_l0").is_meta
    assert lstm(torch.empty(4, 2, IN, device="meta"))[0].shape == (4, 2, H)
    theirs = nn.LSTM(IN, H)
    sf.accelerate(theirs, replace=True)
    theirs(x)


def test_under_autocast_it_computes_in_its_type() -> None:
    for norm in (False, True):
        lstm = sf.LSTM(IN, H, zoneout_h=0.1, layer_norm=norm)
        x = torch.randn(T, B, IN)
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = run(lstm, x)
        assert output.dtype == torch.bfloat16
        output.float().sum().backward()
        torch.testing.assert_close(output.float(), run(lstm, x)[0], rtol=0.05, atol=0.05)
        assert lstm.weight_ih_l0.grad.dtype == torch.float32


@pytest.mark.slow
def test_they_compile_in_one_graph() -> None:
    lstm = sf.LSTM(IN, H, zoneout_h=0.3, zoneout_c=0.2, layer_norm=True)
    x, lengths = torch.randn(2, B, IN), torch.tensor([2, 2, 1])
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    output, _ = compiled(x, lengths=lengths)
    output.sum().backward()
    lstm.eval()
    torch.testing.assert_close(compiled(x, lengths=lengths), lstm(x, lengths=lengths))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"zoneout_h": 1.5}, ValueError, r"expected zoneout_h in 0\.\.1, got 1\.5"),
        ({"zoneout_c": -1}, ValueError, r"expected zoneout_c in 0\.\.1, got -1"),
        ({"layer_norm": 1}, TypeError, r"expected layer_norm to be a bool, got 1"),
    ],
)
def test_wrong_options(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="seqmem::lstm: " + message):
        sf.LSTM(IN, H, **options)
    with pytest.raises(error, match="seqmem::lstm_cell: " + message):
        sf.LSTMCell(IN, H, **options)


@pytest.mark.parametrize("options", [{"zoneout_h": 0.1}, {"layer_norm": True}])
def test_no_projection(options: Any) -> None:
    with pytest.raises(ValueError, match="expected no proj_size with zoneout or layer_norm, got"):
        sf.LSTM(IN, H, proj_size=2, **options)


FLOAT = torch.zeros(T, B, H)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dims": ({"input": torch.zeros(B, IN)}, ValueError, "input of 3 dimensions, got"),
    "width": ({"input": torch.zeros(T, B, 7)}, ValueError, r"weight_ih of shape \[20, 7\]"),
    "whole": ({"input": torch.zeros(T, B, IN).long()}, TypeError, "a floating input, got"),
    "double": ({"input": torch.zeros(T, B, IN, **DOUBLE)}, TypeError, "weight_ih of torch.float64"),
    "no_step": ({"input": torch.zeros(0, B, IN)}, ValueError, "at least one time step"),
    "state": ({"hx": (torch.zeros(B, H), torch.zeros(2, H))}, ValueError, r"cx of shape \[3, 5\]"),
    "bias": ({"bias_ih": torch.zeros(3)}, ValueError, r"bias_ih of shape \[20\]"),
    "device": ({"bias_hh": torch.zeros(20, device="meta")}, TypeError, "bias_hh on cpu"),
    "mask_type": ({"zoneout_h": FLOAT}, TypeError, "a bool zoneout_h"),
    "mask_shape": ({"zoneout_c": FLOAT[:1] > 0}, ValueError, r"zoneout_c of shape \[4, 3, 5\]"),
    "share": ({"zoneout_c": 2.0}, ValueError, r"zoneout_c in 0\.\.1, got 2\.0"),
    "long": ({"lengths": torch.tensor([1, 5, 2])}, ValueError, r"lengths in 0\.\.4, got 1\.\.5"),
    "lengths": ({"lengths": torch.tensor([1, 2])}, ValueError, r"lengths of shape \[3\]"),
    "lengths_type": ({"lengths": torch.ones(3)}, TypeError, "lengths of dtype int64 or int32"),
    "reset": ({"reset": RESET[:2]}, ValueError, r"reset of shape \[4, 3\]"),
    "reset_type": ({"reset": RESET.long()}, TypeError, "reset of dtype bool"),
    "packed": (
        {"input": torch.zeros(8, IN), "batch_sizes": SIZES, "reset": RESET},
        ValueError,
        "without lengths, reset",
    ),
    "norms": (
        {"norms": sf.ops.LSTMNorms(*(torch.zeros(20),) * 4)},
        ValueError,
        r"gain_c of shape \[5\], got \[20\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    changes, error, message = WRONG[name]
    right = {
        "input": torch.zeros(T, B, IN),
        "hx": None,
        "weight_ih": torch.zeros(4 * H, IN),
        "weight_hh": torch.zeros(4 * H, H),
    }
    sf.ops.lstm_regularized(**right)  # type: ignore[arg-type]
    with pytest.raises(error, match="seqmem::lstm_regularized: expected .*" + message):
        sf.ops.lstm_regularized(**right | changes)  # type: ignore[arg-type]


def test_wrong_inputs_of_a_module() -> None:
    for lstm in regularized():
        for shape in ((IN,), (T, B, 1, IN)):
            with pytest.raises(ValueError, match="expected input of 3 dimensions, got shape"):
                lstm(torch.zeros(shape, **DOUBLE))


def test_no_row_is_no_error() -> None:
    for lstm in regularized():
        output, (h, _) = lstm(torch.randn(T, 0, IN, **DOUBLE))
        assert output.shape == (T, 0, H) and h.shape == (1, 0, H)
