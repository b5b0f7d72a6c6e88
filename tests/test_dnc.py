"""The DNC op: the inherited suite, ties, and edges of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hostile_suite import Bad, HostileSuite, Target
from op_suite import (
    Case,
    Function,
    OpSuite,
    check_against_float64,
    check_same_bits_at_any_thread_count,
    compare,
    error,
    values_and_gradients,
)
from op_suite import split as split_case
from torch import Tensor

from seqmem_fast import ops
from seqmem_fast.ops.dnc import _words_of
from seqmem_fast.reference import dnc as reference
from seqmem_fast.reference.common import Sample
from seqmem_fast.reference.dnc import DNCOptions, DNCState, DNCTrace

ALL = [sample.name for sample in reference.sample_inputs()]
Sizes = tuple[int, int, int, int, int, int]
SIZES = (5, 3, 4, 6, 10, 5)  # T, B, I, C, N, M; slots that fill no whole vectors
TINY = (2, 2, 2, 2, 5, 2)
PARTS = len(DNCState._fields)
BATCH_IN = (1, 1, *[0] * (PARTS - 2))  # of a state's parts


def sample_of(name: str, dtype: torch.dtype, sizes: Sizes = SIZES, seed: int = 0) -> Sample:
    samples = reference.sample_inputs(dtype=dtype, sizes=sizes, seed=seed)
    return next(s for s in samples if s.name == name)


def case_of(sample: Sample) -> Case:
    """dnc_trace of positional tensors: input, state, interface, controller, norm, initial, lengths,
    reset. The gates of the trace are no results of the case: they are computed from features.

    With the gradient through w-hat, which finite differences see, and without which the write
    weightings of the state have none."""
    input, state, controller, weight, bias = sample.args
    options = {"usage_gradient": True, **sample.kwargs}
    norm, initial = options.pop("norm", ()), options.pop("initial", None)
    lengths, reset = options.pop("lengths", None), options.pop("reset", None)
    first = () if initial is None else tuple(initial)
    ends = [3 + PARTS, 3 + PARTS + len(controller)]
    ends.append(ends[-1] + len(norm))
    ends.append(ends[-1] + len(first))

    def bind(function: Any) -> Function:
        def call(*tensors: Any) -> tuple[Tensor, ...]:
            features, final, trace = function(
                tensors[0],
                DNCState(*tensors[1 : 1 + PARTS]),
                tensors[ends[0] : ends[1]],
                *tensors[1 + PARTS : ends[0]],
                norm=tensors[ends[1] : ends[2]],
                initial=DNCState(*tensors[ends[2] : ends[3]]) if first else None,
                lengths=tensors[-2],
                reset=tensors[-1],
                **options,
            )
            return features, *final, *trace[:3]

        return call

    tensors = (input, *state, weight, bias, *controller, *norm, *first, lengths, reset)
    shared = (None,) * (2 + len(controller) + len(norm) + len(first))
    return Case(
        bind(ops.dnc_trace),
        bind(reference.dnc_trace),
        tensors,
        (1, *BATCH_IN, *shared, 0, 1),
        (1, *BATCH_IN, 1, 1, 1),
    )


def raw_arguments(sample: Sample) -> tuple[list[Any], list[Any]]:
    """The op's tensors and its options, but for its last two."""
    input, state, controller, weight, bias = sample.args
    kwargs = dict(sample.kwargs)
    lists = [list(kwargs.pop("norm", ())), list(kwargs.pop("initial", ()))]
    tensors = [input, list(state), list(controller), weight, bias, *lists]
    tensors += [kwargs.pop("lengths", None), kwargs.pop("reset", None)]
    kind = kwargs.pop("controller_type", "lstm")
    options = DNCOptions(**kwargs)
    words = _words_of(options, kind)
    return tensors, [words, options.norm_floor, options.eps, options.mask_min]


class TestDnc(OpSuite):
    names = ("many_heads", "sharpen", "reset")

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        return case_of(sample_of(name, dtype, TINY if tiny else SIZES))

    def test_gradgradcheck(self, name: str) -> None:
        """Of one vector of all inputs to one of all outputs: a few directions, not every pair."""
        floats, call = split_case(self.case(name, tiny=True))
        sizes = [t.numel() for t in floats]

        def joined(values: Tensor) -> Tensor:
            parts = zip(values.split(sizes), floats, strict=True)
            return torch.cat([o.flatten() for o in call(*(v.view_as(t) for v, t in parts))])

        values = torch.cat([t.detach().flatten() for t in floats]).requires_grad_()
        assert torch.autograd.gradgradcheck(joined, (values,), fast_mode=True)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        tensors, options = raw_arguments(sample_of(name, torch.float64))
        forward, backward = torch.ops.seqmem.dnc.default, torch.ops.seqmem.dnc_backward.default
        *outputs, saved, checkpoints = forward(*tensors, *options, True, True)
        # What is kept of rows that have ended has no meaning.
        saved, checkpoints = (torch.nan_to_num(t) for t in (saved, checkpoints))
        grads = [torch.ones_like(t) for t in outputs]
        kept = [outputs[0], *outputs[-3:], saved, checkpoints]

        def leaf(t: Any) -> Any:
            if isinstance(t, list):
                return [leaf(one) for one in t]
            return t.clone().requires_grad_() if isinstance(t, Tensor) else t

        leaves = [leaf(t) for t in tensors[:-2]] + tensors[-2:]
        calls = [(forward, (*leaves, *options, False, False))]
        return [*calls, (backward, (*grads, *tensors, *kept, *options, [True] * 4))]


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("name", [name for name in ALL if name not in TestDnc.names])
def test_other_options_against_float64(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        check_against_float64(case_of(sample_of(name, dtype)), name)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("name", ["plain", "reset"])
def test_no_gradient_through_what_has_been_written(name: str) -> None:
    """The default: the write weightings of a state lead nowhere but to its end."""
    sample = sample_of(name, torch.float64)
    found = []
    for function in (ops.dnc, reference.dnc):
        state = DNCState(*(a.clone().requires_grad_() for a in sample.args[1]))
        leaves = [a.clone().requires_grad_() for a in (sample.args[0], *sample.args[2])]
        args = (leaves[0], state, leaves[1:], *sample.args[3:])
        features, final = function(*args, **sample.kwargs)
        loss = features.square().sum() + final.usage.sum() + final.read_weights.square().sum()
        found.append(torch.autograd.grad(loss, [*leaves, *state], allow_unused=True))
    at = len(leaves) + DNCState._fields.index("write_weights")
    assert found[1][at] is None and not found[0][at].any()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("many_heads", (17, 7, 1, 13, 37, 3)),  # several segments, tails of vectors of every kind
        ("reset", (17, 7, 1, 13, 37, 3)),
        ("sharpen", (10, 7, 1, 13, 37, 3)),
        ("plain", (3, 5, 3, 8, 16, 4)),
        ("masks", (3, 2, 3, 8, 37, 9)),
        ("plain", (2, 1, 5, 1, 1, 1)),
        ("many_heads", (3, 2, 2, 3, 2, 1)),
        ("sharpen", (3, 2, 2, 3, 1, 2)),
    ],
)
def test_odd_sizes(name: str, sizes: Sizes) -> None:
    case = case_of(sample_of(name, torch.float64, sizes))
    compare(case.op, case.reference, case.tensors, case.tensors)


def with_heads(
    sizes: Sizes, reads: int, writes: int, dtype: torch.dtype = torch.float64, **kwargs: Any
) -> Sample:
    """A call with so many heads, from distinct usages."""
    _, batch, width, control, slots, slot = sizes
    sample = sample_of("plain", dtype, sizes)
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    parts = reference.interface_parts(slot, reads, writes, DNCOptions(**kwargs)).values()
    rows = sum(torch.Size(shape).numel() for shape in parts)
    hidden, cell, memory, usage = sample.args[1][:4]
    state = DNCState(
        hidden,
        cell,
        memory,
        usage,
        normal(batch, writes, slots, slots).abs() / slots,
        normal(batch, writes, slots).softmax(-1) * 0.9,
        normal(batch, writes, slots).softmax(-1) * 0.9,
        normal(batch, reads, slots).softmax(-1) * 0.9,
        normal(batch, reads, slot),
    )
    first = normal(4 * control, width + reads * slot) * 0.3
    controller = (first, *sample.args[2][1:])
    args = (sample.args[0], state, controller, normal(rows, control), normal(rows))
    return sample._replace(args=args, kwargs=kwargs)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("reads", "writes", "options"),
    [
        (7, 1, {}),
        (5, 2, {"sharpen": True, "deallocate": True}),
        (9, 3, {"masks": True}),
        (4, 1, {}),
        (1, 2, {}),
    ],
)
def test_any_number_of_heads(reads: int, writes: int, options: dict[str, Any]) -> None:
    """More read heads than one pass over the links takes; links with a diagonal, which is void."""
    case = case_of(with_heads((4, 2, 3, 6, 19, 4), reads, writes, **options))
    compare(case.op, case.reference, case.tensors, case.tensors)


# ---- ties


def zero_start(sizes: Sizes, dtype: torch.dtype, usage: float = 0.0) -> Sample:
    """From nothing: all slots are equal."""
    sample = with_heads(sizes, 2, 1, dtype)
    state = DNCState(*(torch.zeros_like(a) for a in sample.args[1]))
    state = state._replace(usage=torch.full_like(state.usage, usage))
    return sample._replace(args=(sample.args[0], state, *sample.args[2:]))


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("usage", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_usages(usage: float, dtype: torch.dtype) -> None:
    """Slots may change places: features, the parameters' gradients and sorted usages agree."""
    case = case_of(zero_start((9, 3, 4, 8, 21, 5), dtype, usage))
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in case.tensors]
    exact = None
    for function, tensors in ((case.op, case.tensors), (case.reference, wide)):
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
        outputs = function(*leaves)
        weights = torch.linspace(-1, 1, outputs[0].numel(), dtype=outputs[0].dtype)
        loss = (outputs[0] * weights.view_as(outputs[0])).sum()
        of = [k for k in range(len(leaves) - 2) if k == 0 or k > PARTS]
        grads = torch.autograd.grad(loss, [leaves[k] for k in of])
        found = [outputs[0], outputs[4].sort(-1).values, loss, *grads]
        if exact is None:
            exact = [t.detach() for t in found]
            continue
        for a, b in zip(exact, found, strict=True):
            assert error(a, b) <= (1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("slots", [5, 16, 21, 37])
def test_equal_slots_have_equal_bits(slots: int, dtype: torch.dtype) -> None:
    """In whichever lane of a vector they are: ties would be broken by chance."""
    sample = zero_start((1, 2, 4, 8, slots, 5), dtype)
    state = sample.args[1]
    equal = state._replace(
        usage=torch.full_like(state.usage, 0.3),
        memory=torch.linspace(-1, 1, 5, dtype=dtype).expand_as(state.memory),
        write_weights=torch.full_like(state.write_weights, 0.3 / slots),
        read_weights=torch.full_like(state.read_weights, 0.7 / slots),
    )
    args = (sample.args[0], equal, *sample.args[2:])
    *_, trace = ops.dnc_trace(*args)
    assert (trace.usage == trace.usage[..., :1]).all()
    assert (trace.write_weights.diff(dim=-1) <= 0).all()  # the first of equal ones comes first


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("slots", [1, 2, 3, 8, 33, 100, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_allocation_sorts_as_a_stable_sort(slots: int, dtype: torch.dtype) -> None:
    """Many ties, any size; a step of pure allocation shows the order."""
    sample = with_heads((1, 2, 3, 6, slots, 4), 1, 1, dtype)
    usage = (
        torch.randint(0, 4, (2, slots), generator=torch.Generator().manual_seed(1)).to(dtype) / 3
    )
    usage[:, slots // 2] = 0.6
    zeros = torch.zeros_like
    state = sample.args[1]
    state = state._replace(
        usage=usage,
        read_weights=zeros(state.read_weights),
        write_weights=zeros(state.write_weights),
    )
    weight, bias = zeros(sample.args[3]), zeros(sample.args[4])
    start = 4 + 1 + 4 + 1 + 4 + 4 + 1
    bias[start : start + 2] = 40  # both gates open
    *_, trace = ops.dnc_trace(sample.args[0], state, sample.args[2], weight, bias)
    torch.testing.assert_close(trace.write_weights[0, :, 0], reference.allocate(usage))


@pytest.mark.sanitize
@pytest.mark.parametrize("gate", [-1e4, 1e4])
def test_free_gates_shut_and_open(gate: float) -> None:
    sample = with_heads((6, 3, 4, 8, 12, 5), 2, 1)
    weight, bias = sample.args[3].clone(), sample.args[4].clone()
    start = 2 * 5 + 2 + 5 + 1 + 5 + 5
    weight[start : start + 2], bias[start : start + 2] = 0, gate
    case = case_of(sample._replace(args=(*sample.args[:3], weight, bias)))
    compare(case.op, case.reference, case.tensors, case.tensors)


def test_same_bits_at_any_thread_count_with_many_rows(restored_threads: None) -> None:
    check_same_bits_at_any_thread_count(
        case_of(sample_of("reset", torch.float32, (9, 13, 4, 20, 40, 7)))
    )


# ---- sequences


@pytest.mark.sanitize
def test_chunks_equal_the_whole() -> None:
    args = sample_of("plain", torch.float64, (9, 3, 4, 6, 8, 5)).args
    whole, last = ops.dnc(*args)
    first, middle = ops.dnc(args[0][:4], *args[1:])
    second, end = ops.dnc(args[0][4:], middle, *args[2:])
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(tuple(end), tuple(last))


@pytest.mark.sanitize
def test_no_steps_hand_the_state_through() -> None:
    case = case_of(sample_of("plain", torch.float32))
    tensors = (case.tensors[0][:0], *case.tensors[1:])
    features, *rest = case.op(*tensors)
    assert features.shape == (0, 3, 16)
    for a, b in zip(rest[:PARTS], tensors[1:], strict=False):
        assert torch.equal(a, b)
    link = tensors[5].clone().requires_grad_()
    final = case.op(*tensors[:5], link, *tensors[6:])[5]
    (grad,) = torch.autograd.grad(final.sum(), link)
    assert torch.equal(grad, torch.ones_like(link))


@pytest.mark.sanitize
def test_an_ended_row_keeps_its_state() -> None:
    """Also where a reset stands in its padding, and whatever the padding holds."""
    case = case_of(sample_of("reset", torch.float64))
    lengths, reset = torch.tensor([0, 2, 5]), torch.ones(5, 3, dtype=torch.bool)
    reset[:2] = False
    tensors = list(case.tensors)
    tensors[-2:] = [lengths, reset]
    tensors[0] = tensors[0].clone()
    tensors[0][2:, 1] = float("nan")
    features, *rest = case.op(*tensors)
    assert not features[:, 0].any()
    assert not any(trace[2:, 1].any() for trace in rest[PARTS:])
    for part, first, dim in zip(rest[:PARTS], tensors[1:], BATCH_IN[:PARTS], strict=False):
        assert torch.equal(part.select(dim, 0), first.select(dim, 0))
    compare(case.op, case.reference, tensors, tensors)


@pytest.mark.parametrize("name", ["plain", "many_heads", "no_links", "lengths"])
def test_trace(name: str) -> None:
    sample = sample_of(name, torch.float64)
    found = ops.dnc_trace(*sample.args, **sample.kwargs)[2]
    expected = reference.dnc_trace(*sample.args, **sample.kwargs)[2]
    for field, a, b in zip(DNCTrace._fields, found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=field)


def test_invariants() -> None:
    """Of a long run: weightings and links are positive and sum to at most one."""
    sample = with_heads((60, 3, 4, 8, 12, 5), 3, 1)
    state = sample.args[1]
    state = state._replace(link=torch.zeros_like(state.link))
    _, final, trace = ops.dnc_trace(sample.args[0], state, *sample.args[2:])
    assert 0 <= trace.usage.min() and trace.usage.max() <= 1 + 1e-12
    for weights in (trace.write_weights, trace.read_weights, final.precedence, final.link):
        assert weights.min() >= -1e-12 and weights.sum(-1).max() <= 1 + 1e-12
    assert final.link.sum(-2).max() <= 1 + 1e-12
    assert not final.link.diagonal(dim1=-2, dim2=-1).any()


@pytest.mark.isa
@pytest.mark.parametrize("floor", [0.0, 1e-6])
def test_zero_memory_has_finite_gradients(floor: float) -> None:
    sample = zero_start((6, 2, 4, 8, 12, 5), torch.float64)
    sample = sample._replace(kwargs={"norm_floor": floor})
    case = case_of(sample)
    assert all(torch.isfinite(v).all() for v in values_and_gradients(case.op, case.tensors))


def test_long_sequences_train_in_little_memory() -> None:
    """Between checkpoints links are recomputed: what is kept grows slower than T N^2."""
    time, batch, slots, width = 1000, 2, 64, 8
    args = sample_of("plain", torch.float32, (time, batch, 2, 8, slots, width)).args
    input, state, controller, *interface = args
    tensors = [input, list(state), list(controller), *interface, [], [], None, None]
    *_, saved, checkpoints = torch.ops.seqmem.dnc(
        *tensors, "lstm links", 1e-6, 1e-6, 0.0, True, True
    )
    segments = -(-time // 32)  # of sqrt(T) steps
    kept = saved.numel() + segments * checkpoints[0].numel()
    assert kept < time * batch * slots * slots / 8


# ---- wrong arguments: always the same clear exception, never a crash

z = torch.zeros
T, B, WIDTH, C, N, M = SIZES
ROWS_OF_P = 2 * M + 3 * M + 5 * 2 + 3


def arguments() -> dict[str, Any]:
    return {
        "input": z(T, B, WIDTH),
        "hidden": z(1, B, C),
        "cell": z(1, B, C),
        "memory": z(B, N, M),
        "usage": z(B, N),
        "link": z(B, 1, N, N),
        "precedence": z(B, 1, N),
        "write_weights": z(B, 1, N),
        "read_weights": z(B, 2, N),
        "reads": z(B, 2, M),
        "controller": [z(4 * C, WIDTH + 2 * M), z(4 * C, C), z(4 * C), z(4 * C)],
        "interface_weight": z(ROWS_OF_P, C),
        "interface_bias": z(ROWS_OF_P),
    }


def initial(**change: Tensor) -> DNCState:
    rows = [arguments()[name] for name in DNCState._fields]
    parts = (a[:, 0] if k < 2 else a[0] for k, a in enumerate(rows))
    return DNCState(*parts)._replace(**change)


def layer(index: int, value: Tensor) -> dict[str, Any]:
    tensors = arguments()["controller"]
    tensors[index] = value
    return {"controller": tensors}


mask = z(T, B).bool()
ROWS = [
    Bad("input 2-D", {"input": z(T, WIDTH)}, ValueError, "input with 3 dimensions"),
    Bad("input width", {"input": z(T, B, 3)}, ValueError, r"controller\[0\] of shape \[24, 13\]"),
    Bad("input rows", {"input": z(T, 2, WIDTH)}, ValueError, "hidden of shape"),
    Bad("input integer", {"input": z(T, B, WIDTH).int()}, TypeError, "input of dtype"),
    Bad("input sparse", {"input": z(T, B, WIDTH).to_sparse()}, TypeError, "dense"),
    Bad("hidden layers", {"hidden": z(2, B, C)}, ValueError, r"\[1, 3, 6\], got \[2, 3, 6\]"),
    Bad("cell width", {"cell": z(1, B, 5)}, ValueError, "cell of shape"),
    Bad("memory 2-D", {"memory": z(N, M)}, ValueError, "memory with 3 dimensions"),
    Bad("memory without slots", {"memory": z(B, 0, M)}, ValueError, "memory with slots"),
    Bad("memory of width 0", {"memory": z(B, N, 0)}, ValueError, "memory with slots"),
    Bad("memory rows", {"memory": z(2, N, M)}, ValueError, "memory of shape"),
    Bad("memory dtype", {"memory": z(B, N, M).double()}, TypeError, "memory"),
    Bad("usage slots", {"usage": z(B, 9)}, ValueError, "usage of shape"),
    Bad("link slots", {"link": z(B, 1, N, 9)}, ValueError, "link of shape"),
    Bad("link heads", {"link": z(B, 0, N, N)}, ValueError, "link of shape"),
    Bad("link not asked for", {"links": False}, ValueError, "interface_weight of shape"),
    Bad("precedence", {"precedence": z(B, 2, N)}, ValueError, "precedence of shape"),
    Bad("no write head", {"write_weights": z(B, 0, N)}, ValueError, "at least one head"),
    Bad("no read head", {"read_weights": z(B, 0, N)}, ValueError, "at least one head"),
    Bad("write heads", {"write_weights": z(B, 2, N)}, ValueError, "interface_weight of shape"),
    Bad("reads", {"reads": z(B, 1, M)}, ValueError, "reads of shape"),
    Bad("no controller", {"controller": []}, ValueError, "4 controller tensors a layer, got 0"),
    Bad("3 tensors", {"controller": [z(24, 14)] * 3}, ValueError, "4 controller tensors a layer"),
    Bad(
        "weight_ih", layer(0, z(4 * C, WIDTH)), ValueError, r"controller\[0\] of shape", False, True
    ),
    Bad("weight_hh", layer(1, z(4 * C, 5)), ValueError, r"controller\[1\] of shape"),
    Bad("bias_hh dtype", layer(3, z(4 * C).half()), TypeError, r"controller\[3\]"),
    Bad("interface rows", {"interface_weight": z(31, C)}, ValueError, "interface_weight of shape"),
    Bad("interface empty", {"interface_weight": z(ROWS_OF_P, 0)}, ValueError, "with columns"),
    Bad("interface_bias", {"interface_bias": z(31)}, ValueError, "interface_bias of shape"),
    Bad("norm alone", {"norm": [z(ROWS_OF_P)]}, ValueError, "norm of 2 tensors, or none, got 1"),
    Bad("norm size", {"norm": [z(ROWS_OF_P), z(3)]}, ValueError, r"norm\[1\] of shape"),
    Bad("controller type", {"controller_type": "gru"}, ValueError, "controller_type"),
    Bad("strength", {"strength": "exp"}, ValueError, "strength as one of"),
    Bad("allocation", {"allocation": "hard"}, ValueError, "allocation as one of"),
    Bad("floor", {"norm_floor": -1.0}, ValueError, "norm_floor >= 0"),
    Bad("floor and eps", {"norm_floor": 0.0, "eps": 0.0}, ValueError, "one > 0"),
    Bad("eps NaN", {"eps": float("nan")}, ValueError, "eps >= 0"),
    Bad("mask_min", {"mask_min": 1.0}, ValueError, "0 <= mask_min < 1, got 1"),
    Bad("reset alone", {"reset": mask}, ValueError, "initial of 9 tensors beside reset"),
    Bad("reset shape", {"reset": mask.t(), "initial": initial()}, ValueError, "reset of shape"),
    Bad("reset dtype", {"reset": z(T, B), "initial": initial()}, TypeError, "reset of dtype bool"),
    Bad(
        "initial batched",
        {"reset": mask, "initial": initial(memory=z(B, N, M))},
        ValueError,
        "initial.memory of shape",
    ),
    Bad("initial dtype", {"initial": initial(reads=z(2, M).half())}, TypeError, "initial.reads"),
    Bad("lengths size", {"lengths": torch.ones(2).long()}, ValueError, "lengths of shape"),
    Bad("lengths float", {"lengths": torch.ones(3)}, TypeError, "lengths of dtype"),
    Bad("lengths negative", {"lengths": torch.tensor([1, -1, 2])}, ValueError, "got -1", True),
    Bad("lengths too long", {"lengths": torch.tensor([1, 6, 2])}, ValueError, "got 6", True),
]


def call(input: Tensor, **rest: Any) -> Any:
    return ops.dnc(input, DNCState(*(rest.pop(name) for name in DNCState._fields)), **rest)


def test_unknown_words_are_refused() -> None:
    tensors, options = raw_arguments(sample_of("plain", torch.float32))
    for words in ("lstm  links", "lstm linked", " lstm links", "lstm,links"):
        with pytest.raises(ValueError, match="seqmem::dnc: expected options out of squash"):
            torch.ops.seqmem.dnc(*tensors, words, *options[1:], False, False)


COMPILED = ("input 2-D", "memory dtype", "weight_ih", "floor", "initial batched")


class TestHostile(HostileSuite):
    targets = (Target("dnc", call, arguments, ROWS, compiled=COMPILED),)
