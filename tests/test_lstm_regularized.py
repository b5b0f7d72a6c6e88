"""Zoneout and layer normalisation: ``ops.lstm_regularized``, and these options of the modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hostile_suite import Bad, HostileSuite, Target
from op_suite import (
    TOLERANCES,
    Case,
    Function,
    OpSuite,
    Threaded,
    check_against_float64,
    check_same_bits_at_any_thread_count,
    sample_of,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import seqmem_fast as sf
from seqmem_fast import ops
from seqmem_fast.reference import lstm_regularized as reference
from seqmem_fast.reference.common import dropped

T, B, IN, H = 4, 3, 3, 5
DOUBLE: Any = {"dtype": torch.float64}
NAMES = [sample.name for sample in reference.sample_inputs()]
VARIABLE = ("seed", "lengths", "reset", "batch_sizes")


def case_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Case:
    """Of positional tensors: input, h, c, weights, biases, norms, and those of VARIABLE."""
    input, hx, *weights, norms = args
    rest = {key: value for key, value in kwargs.items() if key not in VARIABLE}

    def bind(function: Any) -> Function:
        def call(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            x, h, c, w_ih, w_hh, b_ih, b_hh, *more = tensors
            output, state, gates, cells = function(
                x,
                None if h is None else (h, c),
                *(w_ih, w_hh, b_ih, b_hh, None if more[0] is None else tuple(more[:4])),
                **dict(zip(VARIABLE, more[4:], strict=True)),
                **rest,
                return_gates=True,
            )
            return output, *state, gates, cells

        return call

    variable = [kwargs.get(key) for key in VARIABLE]
    tensors = (input, *(hx or (None, None)), *weights, *(norms or (None,) * 4), *variable)
    batch = 0 if kwargs.get("batch_first") else 1
    rows_in: tuple[int | None, ...] = (batch, 0, 0, *(None,) * 9, 0, batch, None)
    rows_out: tuple[int | None, ...] = (batch, 0, 0, batch, batch)
    if "batch_sizes" in kwargs:
        rows_in, rows_out = (None,) * 15, (None,) * 5
    functions = bind(ops.lstm_regularized), bind(reference.lstm_regularized)
    return Case(*functions, tensors, rows_in, rows_out)


def sized_case(
    name: str, sizes: tuple[int, int, int, int], dtype: torch.dtype = torch.float32
) -> Case:
    samples = reference.sample_inputs(dtype=dtype, sizes=sizes)
    return next(case_of(s.args, s.kwargs) for s in samples if s.name == name)


def threaded() -> Threaded:
    """Calls below and above the size at which one takes several threads."""
    options = {"zoneout_h": 0.1, "layer_norm": True}
    sizes = ((20, 1, 16, 16), (12, 1, 32, 320), (30, 24, 64, 128))
    return [(sf.LSTM(i, h, **options).eval(), (torch.randn(t, b, i),)) for t, b, i, h in sizes]


class TestLstmRegularized(OpSuite):
    names = NAMES

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        return sized_case(name, (3, 2, 2, 3) if tiny else (5, 3, 4, 6), dtype)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        sample = sample_of(reference, name, dtype=torch.float64)
        *tensors, seed, lengths, reset, sizes = case_of(sample.args, sample.kwargs).tensors
        rest = (
            *(seed, sample.kwargs.get("zoneout_h", 0.0), sample.kwargs.get("zoneout_c", 0.0)),
            *(lengths, reset, sizes),
            *(sample.kwargs.get(key, False) for key in ("batch_first", "reverse")),
        )
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        output, hy, cy, *saved = torch.ops.seqmem.lstm_regularized(*tensors, *rest, True)
        grads = map(torch.ones_like, (output, hy, cy, *saved[:2]))
        if tensors[-1] is None:
            saved[2:] = [None] * 4
        forward = torch.ops.seqmem.lstm_regularized.default
        return [
            (forward, (*leaves, *rest, False)),
            (forward, (*leaves, *rest, True)),
            (
                torch.ops.seqmem.lstm_regularized_backward.default,
                (*grads, *tensors, *rest, output, *saved, [True] * 3),
            ),
        ]


# Around the widths of vectors and blocks, and both sides of every split of work.
SIZES = [
    *((3, 2, 5, hidden) for hidden in (1, 7, 8, 9, 15, 16, 17, 31, 33, 65, 129)),
    *((3, batch, 9, 20) for batch in (1, 4, 7, 31, 65)),
    *((time, 3, 4, 8) for time in (1, 2, 17, 50)),
    (4, 1, 64, 520),
    (3, 40, 200, 264),
]


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", ["plain norm zoneout", "zero_state zoneout", "all_padded norm"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_sizes(name: str, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    if sizes[-1] == 1 and "norm" in name:
        pytest.skip("a norm takes out the only direction of one unit's products: gradients cancel")
    (full,) = (each for each in NAMES if each.startswith(name))
    check_against_float64(sized_case(full, sizes, dtype))


@pytest.mark.isa
@pytest.mark.parametrize("sizes", [(6, 1, 40, 300), (9, 37, 40, 96), (3, 2, 600, 520)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_large_same_bits_at_any_thread_count(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, restored_threads: None
) -> None:
    for name in ("plain norm zoneout", "zero_state zoneout"):
        check_same_bits_at_any_thread_count(sized_case(name, sizes, dtype))


@pytest.mark.sanitize
def test_without_either_it_is_the_lstm() -> None:
    case = sized_case("zero_state zoneout", (9, 5, 7, 33))
    x, _, _, *weights = case.tensors[:7]
    found = ops.lstm_regularized(x, None, *weights, return_gates=True)
    torch.testing.assert_close(found, ops.lstm_trace(x, None, *weights))


@pytest.mark.isa
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_norm_of_values_far_from_zero(offset: float) -> None:
    """Where the sum of squares less the square of the sum would lose every digit."""
    hidden = 40
    x = torch.randn(3, 2, 6)
    weights = torch.randn(4 * hidden, 6) * 0.1, torch.randn(4 * hidden, hidden) * 0.1
    x[..., 0], weights[0][:, 0] = offset, 1.0
    norms = tuple(torch.ones(n * hidden) for n in (4, 4, 1, 1))
    found = ops.lstm_regularized(x, None, *weights, norms=ops.LSTMNorms(*norms))[0]
    exact = [t.double() for t in (x, *weights, *norms)]
    right = reference.lstm_regularized(exact[0], None, *exact[1:3], norms=exact[3:])[0]
    torch.testing.assert_close(found.double(), right, rtol=1e-3, atol=2e-3 if offset else 1e-5)


def test_only_what_is_wanted_is_computed() -> None:
    case = sized_case(NAMES[0], (T, B, IN, H))
    op, tensors = case.op, [None if t is None else t.clone() for t in case.tensors]
    for k in range(11):
        for n in range(11):
            tensors[n].grad = None  # type: ignore[union-attr]
            tensors[n].requires_grad_(n == k)  # type: ignore[union-attr]
        op(*tensors)[0].sum().backward()
        assert [t.grad is not None for t in tensors[:11]] == [n == k for n in range(11)]  # type: ignore[union-attr]


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
    seed = torch.randint(-(2**63), 2**63 - 1, (2,))
    shares = module.zoneout_h, module.zoneout_c
    return [dropped((*shape, H), p, s) for p, s in zip(shares, seed.split(1), strict=True)]


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


z = torch.zeros


def right() -> dict[str, Any]:
    return {
        "input": z(T, B, IN),
        "hx": z(B, H),
        "cx": z(B, H),
        "weight_ih": z(4 * H, IN),
        "weight_hh": z(4 * H, H),
        "bias_ih": z(4 * H),
        "bias_hh": z(4 * H),
        "gain_ih": z(4 * H),
        "gain_hh": z(4 * H),
        "gain_c": z(H),
        "shift_c": z(H),
        "seed": z(2).long(),
    }


def call(
    input: Tensor, hx: Tensor, cx: Tensor, weight_ih: Tensor, weight_hh: Tensor, **more: Any
) -> Any:
    norms: Any = tuple(more.pop(name) for name in ops.LSTMNorms._fields)
    shares = {"zoneout_h": 0.2, "zoneout_c": 0.1}
    weights = weight_ih, weight_hh, more.pop("bias_ih"), more.pop("bias_hh")
    found = ops.lstm_regularized(input, (hx, cx), *weights, norms, **shares | more)
    return found[:2]


ROWS = [
    Bad("input 2-D", {"input": z(B, IN)}, ValueError, "input with 3 dimensions, got 2"),
    Bad("input width", {"input": z(T, B, 7)}, ValueError, r"input of shape \[..., 3\]"),
    Bad("input integer", {"input": z(T, B, IN).long()}, TypeError, "input"),
    Bad("input double", {"input": z(T, B, IN).double()}, TypeError, "input of weight_ih's dtype"),
    Bad("no steps", {"input": z(0, B, IN)}, ValueError, "at least one time step"),
    Bad("cx rows", {"cx": z(2, H)}, ValueError, r"cx of shape \[3, 5\], got \[2, 5\]"),
    Bad("bias size", {"bias_ih": z(3)}, ValueError, r"bias_ih of shape \[20\]"),
    Bad("gain size", {"gain_c": z(4 * H)}, ValueError, r"gain_c of shape \[5\], got \[20\]"),
    Bad("gain absent", {"gain_hh": None}, ValueError, "gain_ih and gain_hh both or neither"),
    Bad("shift dtype", {"shift_c": z(H).double()}, TypeError, "shift_c of input's dtype"),
    Bad("seed size", {"seed": z(1).long()}, ValueError, r"seed of shape \[2\], got \[1\]"),
    Bad("seed type", {"seed": z(2).int()}, TypeError, "seed of dtype int64"),
    Bad("share", {"zoneout_c": 2.0}, ValueError, r"zoneout_c in 0\.\.1, got 2"),
    Bad("share NaN", {"zoneout_h": float("nan")}, ValueError, r"zoneout_h in 0\.\.1, got nan"),
    Bad(
        "lengths too long",
        {"lengths": torch.tensor([1, 5, 2])},
        ValueError,
        r"lengths in 0\.\.4, got 5",
        needs_values=True,
    ),
    Bad("lengths size", {"lengths": torch.tensor([1, 2])}, ValueError, r"lengths of shape \[3\]"),
    Bad("reset size", {"reset": z(2, B).bool()}, ValueError, r"reset of shape \[4, 3\]"),
    Bad("reset type", {"reset": z(T, B)}, TypeError, "reset of dtype bool"),
    Bad(
        "packed with reset",
        {"input": z(8, IN), "batch_sizes": torch.tensor([3, 3, 2]), "reset": z(T, B).bool()},
        ValueError,
        "without lengths, reset",
    ),
]


class TestWrongArguments(HostileSuite):
    targets = (
        Target(
            "lstm_regularized",
            call,
            right,
            ROWS,
            compiled=("input width", "gain absent", "share", "seed size"),
            on_cpu=("batch_sizes",),
        ),
    )


def test_wrong_inputs_of_a_module() -> None:
    for lstm in regularized():
        for shape in ((IN,), (T, B, 1, IN)):
            with pytest.raises(ValueError, match=r"expected input of shape \[T, B, I\] or"):
                lstm(torch.zeros(shape, **DOUBLE))


def test_no_row_is_no_error() -> None:
    for lstm in regularized():
        output, (h, _) = lstm(torch.randn(T, 0, IN, **DOUBLE))
        assert output.shape == (T, 0, H) and h.shape == (1, 0, H)
