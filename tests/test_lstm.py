"""The LSTM ops: the inherited suite, and edges of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_suite import (
    TOLERANCES,
    Case,
    Function,
    OpSuite,
    Threaded,
    check_against_float64,
    check_nothing_left_over,
    check_same_bits_at_any_thread_count,
    compare,
    error,
    sample_of,
    values_and_gradients,
)
from torch import Tensor

from seqmem_fast import LSTM, LSTMCell, ops
from seqmem_fast.reference import lstm as reference

NAMES = [sample.name for sample in reference.sample_inputs()]
CELL_NAMES = [sample.name for sample in reference.cell_sample_inputs()]


def trace_case(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Case:
    """lstm_trace of positional tensors: input, h, c, weights, lengths, reset, batch_sizes."""
    input, hx, *weights = args
    options = {k: kwargs[k] for k in ("batch_first", "reverse") if k in kwargs}

    def bind(function: Any) -> Function:
        def call(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            x, h, c, *rest = tensors
            output, (hy, cy), gates, cells = function(
                x,
                None if h is None else (h, c),
                *rest[:5],
                lengths=rest[5],
                reset=rest[6],
                batch_sizes=rest[7],
                **options,
            )
            return output, hy, cy, gates, cells

        return call

    variable = [kwargs.get(k) for k in ("lengths", "reset", "batch_sizes")]
    tensors = (input, *(hx or (None, None)), *weights, *variable)
    batch = 0 if options.get("batch_first") else 1
    rows: list[tuple[int | None, ...]] = [
        (batch, 0, 0, None, None, None, None, None, 0, batch, None),
        (batch, 0, 0, batch, batch),
    ]
    if "batch_sizes" in kwargs:
        rows = [(None,) * 11, (None,) * 5]
    return Case(bind(ops.lstm_trace), bind(reference.lstm_trace), tensors, *rows)


def cell_case(args: tuple[Any, ...]) -> Case:
    input, hx, *weights = args

    def bind(function: Any) -> Function:
        return lambda x, h, c, *rest: function(x, None if h is None else (h, c), *rest)

    tensors = (input, *(hx or (None, None)), *weights)
    return Case(
        bind(ops.lstm_cell), bind(reference.lstm_cell), tensors, (0, 0, 0) + (None,) * 4, (0, 0)
    )


def threaded() -> Threaded:
    """Calls below and above the size at which one takes several threads."""
    return [
        (LSTM(16, 16), (torch.randn(20, 1, 16),)),
        (LSTM(32, 64, 2, bidirectional=True), (torch.randn(12, 8, 32),)),
        (LSTM(32, 320), (torch.randn(12, 1, 32),)),
        (LSTM(64, 128), (torch.randn(30, 24, 64),)),
    ]


class TestLstm(OpSuite):
    names = NAMES

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        sizes = (3, 2, 2, 3) if tiny else (5, 3, 4, 6)
        sample = sample_of(reference, name, dtype=dtype, sizes=sizes)
        return trace_case(sample.args, sample.kwargs)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        sample = sample_of(reference, name, dtype=torch.float64)
        tensors = trace_case(sample.args, sample.kwargs).tensors
        batch_first, reverse = (sample.kwargs.get(k, False) for k in ("batch_first", "reverse"))
        leaves = tuple(
            t.clone().requires_grad_() if t is not None and t.is_floating_point() else t
            for t in tensors
        )
        output, hy, cy, gates, cells = torch.ops.seqmem.lstm(*tensors, batch_first, reverse, True)
        x, h, c, w_ih, w_hh, b_ih, _, w_hr, *variable = tensors
        backward = (
            *map(torch.ones_like, (output, hy, cy, gates, cells)),
            *(x, h, c, w_ih, w_hh, w_hr, *variable, output, gates, cells),
            *(b_ih is not None, batch_first, reverse, [True] * 3),
        )
        forward = torch.ops.seqmem.lstm.default
        return [
            (forward, (*leaves, batch_first, reverse, False)),
            (forward, (*leaves, batch_first, reverse, True)),
            (torch.ops.seqmem.lstm_backward.default, backward),
        ]


class TestLstmCell(OpSuite):
    names = CELL_NAMES

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        samples = reference.cell_sample_inputs(dtype=dtype, sizes=(2, 2, 3) if tiny else (3, 4, 6))
        return cell_case(next(s.args for s in samples if s.name == name))

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        x, h, c, w_ih, w_hh, b_ih, _ = tensors = self.case(name).tensors
        leaves = tuple(None if t is None else t.clone().requires_grad_() for t in tensors)
        hy, cy, gates = torch.ops.seqmem.lstm_cell(*tensors, True)
        backward = (
            *map(torch.ones_like, (hy, cy, gates)),
            *(x, h, c, w_ih, w_hh, gates, cy, b_ih is not None, [True] * 3),
        )
        return [
            (torch.ops.seqmem.lstm_cell.default, (*leaves, False)),
            (torch.ops.seqmem.lstm_cell.default, (*leaves, True)),
            (torch.ops.seqmem.lstm_cell_backward.default, backward),
        ]

    def test_autocast(self, name: str) -> None:
        """On CPU the state stays float32, as torch's cell keeps it, and so does the arithmetic."""
        case = self.case(name, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = case.op(*case.tensors)
        for a, b in zip(outputs, case.op(*case.tensors), strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)


def plain_case(
    time: int, batch: int, width: int, hidden: int, dtype: torch.dtype, **kwargs: Any
) -> Case:
    sizes = (time, batch, width, hidden)
    sample = next(iter(reference.sample_inputs(dtype=dtype, sizes=sizes)))
    return trace_case(sample.args, kwargs)


# Around the widths of vectors, register blocks and panels, and both sides of every split of work.
SIZES = [
    *((3, 2, 5, hidden) for hidden in (1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 129)),
    *((3, batch, 9, 20) for batch in (1, 4, 5, 6, 7, 13, 31, 33, 65)),
    *((time, 3, 4, 8) for time in (1, 2, 15, 16, 17, 33, 70)),
    *((2, 3, width, 16) for width in (1, 2, 17, 64, 100)),
    (4, 1, 300, 256),
    (4, 1, 64, 520),
    (3, 40, 200, 264),
]


@pytest.mark.isa
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_sizes(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_against_float64(plain_case(*sizes, dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_ragged_rows_with_resets(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, reverse: bool
) -> None:
    time, batch, _, _ = sizes
    lengths = torch.randint(0, time + 1, (batch,))
    reset = torch.rand(time, batch) < 0.2
    check_against_float64(plain_case(*sizes, dtype, lengths=lengths, reset=reset, reverse=reverse))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sequence(dtype: torch.dtype) -> None:
    check_against_float64(plain_case(512, 4, 32, 64, dtype))


@pytest.mark.isa
@pytest.mark.parametrize("sizes", [(6, 1, 40, 300), (9, 37, 40, 96), (3, 2, 600, 520)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_large_same_bits_at_any_thread_count(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, restored_threads: None
) -> None:
    check_same_bits_at_any_thread_count(plain_case(*sizes, dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_never_read(reverse: bool) -> None:
    case = plain_case(5, 3, 4, 6, torch.float32)
    lengths = torch.tensor([0, 3, 5])
    results = []
    for filler in (0.0, float("nan"), float("inf")):
        x = case.tensors[0].clone()
        for row, length in enumerate(lengths):
            x[length:, row] = filler
        tensors = (x, *case.tensors[1:8], lengths, None, None)
        op = trace_case((x, None, *tensors[3:8]), {"reverse": reverse}).op
        results.append(values_and_gradients(op, tensors))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.sanitize
def test_length_zero_hands_the_state_through() -> None:
    case = plain_case(4, 2, 3, 5, torch.float32)
    lengths = torch.zeros(2, dtype=torch.int32)
    output, hy, cy, gates, cells = case.op(*case.tensors[:8], lengths, None, None)
    assert not output.any() and not gates.any() and not cells.any()
    assert torch.equal(hy, case.tensors[1]) and torch.equal(cy, case.tensors[2])


@pytest.mark.sanitize
def test_a_reset_everywhere_makes_steps_independent() -> None:
    case = plain_case(4, 2, 3, 5, torch.float64)
    reset = torch.ones(4, 2, dtype=torch.bool)
    output, *_ = case.op(*case.tensors[:8], None, reset, None)
    x, weights = case.tensors[0], case.tensors[3:8]
    alone = [ops.lstm(x[t : t + 1], None, *weights)[0] for t in range(4)]
    torch.testing.assert_close(output, torch.cat(alone))


@pytest.mark.sanitize
def test_sequence_equals_steps_of_the_cell() -> None:
    case = plain_case(4, 3, 5, 7, torch.float64)
    x, h, c, *weights = case.tensors[:7]
    output, (hy, cy) = ops.lstm(x, (h, c), *weights)
    for t in range(4):
        h, c = ops.lstm_cell(x[t], (h, c), *weights)
        torch.testing.assert_close(output[t], h)
    torch.testing.assert_close((hy, cy), (h, c))


def test_chunks_equal_the_whole() -> None:
    case = plain_case(9, 3, 5, 7, torch.float32)
    x, h, c, *weights = case.tensors[:7]
    whole, state = ops.lstm(x, (h, c), *weights)
    first, middle = ops.lstm(x[:4], (h, c), *weights)
    second, last = ops.lstm(x[4:], middle, *weights)
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(last, state)


def test_saturated_gates_are_finite_and_exact() -> None:
    """Pre-activations far beyond the range of exp, in both directions."""
    values = torch.tensor([-1e30, -1e4, -89.0, -30.0, 0.0, 30.0, 89.0, 1e4, 1e30])
    weight = torch.ones(4, 1)
    x = values.reshape(1, -1, 1).expand(2, -1, -1)
    for dtype in (torch.float32, torch.float64):
        args = (x.to(dtype), None, weight.to(dtype), torch.zeros(4, 1, dtype=dtype))
        ours = ops.lstm_trace(*args)
        exact = reference.lstm_trace(*args)
        assert torch.isfinite(ours[0]).all()
        assert error(ours[2], exact[2]) <= TOLERANCES[dtype].output


@pytest.mark.isa
@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 16), (40, 3)])  # dots, transposed, packed
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 2.0**126), (torch.float64, 1e308)])
def test_closed_gates_let_nothing_of_the_largest_cell_through(
    dtype: torch.dtype, size: float, T: int, B: int
) -> None:
    H = 20
    x = torch.zeros(T, B, 3, dtype=dtype)
    hx = (torch.zeros(B, H, dtype=dtype), torch.full((B, H), size, dtype=dtype))
    weights = torch.zeros(4 * H, 3, dtype=dtype), torch.zeros(4 * H, H, dtype=dtype)
    for forget, expected in ((-1000.0, 0.0), (1000.0, size)):
        bias = torch.tensor([-1000.0, forget, 1.0, 1000.0], dtype=dtype).repeat_interleave(H)
        _, (_, c), gates, _ = ops.lstm_trace(x, hx, *weights, bias)
        assert c.eq(expected).all()
        i, f, _, o = gates.chunk(4, dim=-1)
        assert i.eq(0).all() and f.eq(forget > 0).all() and o.eq(1).all()


@pytest.mark.isa
def test_small_values_keep_their_relative_accuracy() -> None:
    """tanh near zero: no cancellation (2 sigmoid(2x) - 1 would lose digits)."""
    x = torch.logspace(-6, 0, 200).reshape(1, 1, -1).transpose(1, 2)
    weight = torch.tensor([[0.0], [0.0], [1.0], [0.0]])
    args = (x, None, weight, torch.zeros(4, 1))
    _, _, gates, _ = ops.lstm_trace(*args)
    g, exact = gates[..., 2].double(), torch.tanh(x[..., 0].double())
    assert float(((g - exact) / exact).abs().max()) < 2e-6


def test_gradient_penalty_reaches_every_weight() -> None:
    """As in WGAN-GP: a loss on the input's gradient, differentiated by the weights."""
    case = plain_case(3, 2, 3, 4, torch.float64)
    found = []
    for op in (case.op, case.reference):
        leaves = [t.clone().requires_grad_() for t in case.tensors[:7]]
        output, *_ = op(*leaves, *case.tensors[7:])
        (grad,) = torch.autograd.grad(output.sum(), leaves[0], create_graph=True)
        (grad.norm() - 1).pow(2).backward()
        found.append([leaf.grad for leaf in leaves])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_arguments_that_depend_on_each_other() -> None:
    """Second order when hx was computed from input and one tensor serves as two arguments."""
    case = plain_case(3, 2, 4, 4, torch.float64)
    x, _, _, weight, _, bias, _ = case.tensors[:7]

    def grads(op: Function) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        a, w, b = leaves
        output, *_ = op(a, a[0].sin(), a[1], w, w, b, b, None, None, None, None)
        (grad,) = torch.autograd.grad(output.sum(), a, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaves)

    for p, q in zip(grads(case.op), grads(case.reference), strict=True):
        torch.testing.assert_close(p, q)


def test_weights_of_mixed_strides_and_a_transposed_input() -> None:
    case = plain_case(3, 2, 4, 5, torch.float32)
    x, h, c, w_ih, w_hh, *rest = case.tensors
    transposed = (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        h.t().contiguous().t(),
        c[:, :1].expand_as(c),
        w_ih.t().contiguous().t(),
        w_hh.flip(1).flip(1),
    )
    plain = tuple(t.contiguous() for t in transposed)
    compare(case.op, case.op, (*transposed, *rest), (*plain, *rest))


@pytest.mark.slow
def test_more_than_2_31_elements() -> None:
    """Element 2^31 and beyond of the input is found: the last step of 2^31 + 64 values of bfloat16.

    All else is small (H = 1, so 4 GiB of input and 67 MB of the rest). A step's offset is computed
    as t * B * I, which leaves 32 bits here; were it cut to 32 bits, the last step would read
    before the input's start.
    """
    width, time = 64, 2**25 + 1
    x = torch.zeros(time, 1, width, dtype=torch.bfloat16)
    x[-1] = 1
    weight_ih = torch.ones(4, width, dtype=torch.bfloat16)
    with torch.inference_mode():
        output, _ = ops.lstm(x, None, weight_ih, torch.zeros(4, 1, dtype=torch.bfloat16))
        last, _ = ops.lstm(x[-1:], None, weight_ih, torch.zeros(4, 1, dtype=torch.bfloat16))
    torch.testing.assert_close(output[-1], last[-1], rtol=0.05, atol=0)
    assert not output[:-1].any()


@pytest.mark.parametrize("rows", [13, 19])
def test_a_batch_over_unpacked_weights_has_the_same_bits_on_any_threads(
    rows: int, restored_threads: None
) -> None:
    """Its rows fill the lanes of vectors; a thread's share may be less than one vector."""
    torch.manual_seed(rows)
    cell = LSTMCell(300, 301)
    x, h, c = torch.randn(rows, 300), torch.randn(rows, 301), torch.randn(rows, 301)
    h[3] = float("nan")
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            found.append(torch.cat(cell(x, (h, c)), 1))
    others = torch.arange(rows) != 3
    assert found[0][3].isnan().all() and found[0][others].isfinite().all()
    assert all(torch.equal(one[others], found[0][others]) for one in found[1:])
    exact = torch.nn.LSTMCell(300, 301, dtype=torch.float64)
    exact.load_state_dict(cell.state_dict())
    with torch.no_grad():
        expected = torch.cat(exact(x.double(), (h.double(), c.double())), 1)[others]
    assert (found[0][others] - expected).norm() / expected.norm() < 1e-5


def untraced_case(name: str, dtype: torch.dtype, *sizes: int) -> Case:
    """Of ops.lstm, which keeps other tensors for the backward pass than lstm_trace."""
    samples = reference.sample_inputs(dtype=dtype, sizes=sizes)  # type: ignore[arg-type]
    x, state, *weights = next(s for s in samples if s.name == name).args

    def call(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor | None) -> tuple[Tensor, ...]:
        output, (hy, cy) = ops.lstm(x, (h, c), *weights)
        return output, hy, cy

    return Case(call, call, (x, *state, *weights), (), ())


@pytest.mark.isa
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("plain", (3, 3, 5, 7)),
        ("plain", (70, 1, 5, 7)),
        ("plain", (100, 1, 64, 64)),
        ("projected", (9, 20, 5, 7)),
        ("plain", (1, 9, 5, 7)),
        ("plain", (1, 1, 5, 7)),
    ],
    ids=str,
)
def test_nothing_is_left_over_from_an_earlier_call(
    name: str,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    threads: int,
    restored_threads: None,
) -> None:
    torch.set_num_threads(threads)
    time, batch, width, hidden = sizes
    larger = (time, batch + 3, width + 40, hidden + 40)
    check_nothing_left_over(untraced_case(name, dtype, *sizes), untraced_case(name, dtype, *larger))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_gradient_of_equal_rows_is_as_one_written_out(
    batch_first: bool, dtype: torch.dtype
) -> None:
    """One row stands for all of a sum's gradient, or of a row's spread over the batch."""
    generator = torch.Generator().manual_seed(0)
    hidden = 7
    shape = (3, 4, 5) if batch_first else (4, 3, 5)
    leaves = [
        torch.randn(*sizes, generator=generator).to(dtype).requires_grad_()
        for sizes in (shape, (4 * hidden, 5), (4 * hidden, hidden))
    ]
    lengths = torch.tensor([4, 1, 3])
    output, _ = ops.lstm(leaves[0], None, *leaves[1:], lengths=lengths, batch_first=batch_first)
    one = torch.tensor(0.5, dtype=dtype).expand_as(output)
    row = torch.randn(2 * hidden, generator=generator).to(dtype)[::2].expand_as(output)
    for seed in (one, row, row.contiguous()[..., :1].expand_as(output)):
        found = torch.autograd.grad(output, leaves, seed, retain_graph=True)
        expected = torch.autograd.grad(output, leaves, seed.contiguous(), retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
