"""The op of least recently used access: the inherited suite, ties, and edges of its own."""

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
from seqmem_fast.reference import lrua as reference
from seqmem_fast.reference.common import Sample
from seqmem_fast.reference.lrua import LRUAState, LRUATrace

ALL = [sample.name for sample in reference.sample_inputs()]
Sizes = tuple[int, int, int, int, int, int]
SIZES = (5, 3, 4, 6, 10, 5)  # T, B, I, C, N, M; slots that fill no whole vectors
TINY = (2, 2, 2, 2, 5, 2)
USAGE = LRUAState._fields.index("usage")


def sample_of(name: str, dtype: torch.dtype, sizes: Sizes = SIZES, **kwargs: Any) -> Sample:
    samples = reference.sample_inputs(dtype=dtype, sizes=sizes, **kwargs)
    return next(s for s in samples if s.name == name)


def without_usage(state: Any) -> tuple[Tensor, ...]:
    return (*state[:USAGE], *state[USAGE + 1 :])


def case_of(sample: Sample) -> Case:
    """lrua_trace of positional tensors: input, state, head weight and bias, controller, initial,
    lengths, reset. Usage, which has no gradient, is no argument and no result of the case."""
    input, state, controller, head_weight, head_bias = sample.args
    options = dict(sample.kwargs)
    initial = options.pop("initial", None)
    lengths, reset = options.pop("lengths", None), options.pop("reset", None)
    end = 8 + len(controller)

    def state_of(parts: Any, usage: Tensor) -> LRUAState:
        return LRUAState(*parts[:USAGE], usage.to(parts[0].dtype), *parts[USAGE:])

    def bind(function: Any) -> Function:
        def call(*tensors: Any) -> tuple[Tensor, ...]:
            rows = tensors[0].size(1)
            features, final, trace = function(
                tensors[0],
                state_of(tensors[1:6], state.usage[:rows]),
                tensors[8:end],
                *tensors[6:8],
                initial=None if initial is None else state_of(tensors[end:-2], initial.usage),
                lengths=tensors[-2],
                reset=tensors[-1],
                **options,
            )
            return features, *without_usage(final), *trace[1:]

        return call

    first = () if initial is None else without_usage(initial)
    tensors = (
        input, *without_usage(state), head_weight, head_bias, *controller, *first, lengths, reset
    )  # fmt: skip
    shared = (None,) * (2 + len(controller) + len(first))
    return Case(
        bind(ops.lrua_trace),
        bind(reference.lrua_trace),
        tensors,
        (1, 1, 1, 0, 0, 0, *shared, 0, 1),
        (1, 1, 1, 0, 0, 0, 1, 1),
    )


def raw_arguments(sample: Sample) -> tuple[list[Any], list[Any]]:
    """The op's tensors and its options, but for its last two."""
    input, state, controller, head_weight, head_bias = sample.args
    kwargs = sample.kwargs
    tensors = [input, list(state), list(controller), head_weight, head_bias]
    tensors += [list(kwargs.get("initial", ())), kwargs.get("lengths"), kwargs.get("reset")]
    options = [kwargs.get("controller_type", "lstm") == "lstm", kwargs.get("add", "own") == "own"]
    options += [kwargs.get("strength", False), kwargs.get("erase_all", False)]
    return tensors, [*options, kwargs.get("gamma", 0.95)]


class TestLrua(OpSuite):
    names = ("many_heads", "feedforward", "all_padded")

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
        forward, backward = torch.ops.seqmem.lrua.default, torch.ops.seqmem.lrua_backward.default
        *outputs, slots, saved, checkpoints = forward(*tensors, *options, True, True)
        # The elements beyond the slots and of rows that have ended have no meaning.
        saved, checkpoints = (torch.nan_to_num(t) for t in (saved, checkpoints))
        grads = [torch.ones_like(outputs[k]) for k in (0, 1, 2, 3, 5, 6, 8, 9)]
        rest = [*grads, *tensors, outputs[0], outputs[9], slots, saved, checkpoints, *options]

        def leaf(t: Any, differs: bool = True) -> Any:
            if isinstance(t, list):
                return [leaf(one, k != USAGE or len(t) != 6) for k, one in enumerate(t)]
            return t.clone().requires_grad_() if isinstance(t, Tensor) and differs else t

        leaves = [leaf(t) for t in tensors[:-2]]
        calls = [(forward, (*leaves, *tensors[-2:], *options, False, False))]
        return [*calls, (backward, (*rest, [True] * 4))]


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("name", [name for name in ALL if name not in TestLrua.names])
def test_other_options_against_float64(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        check_against_float64(case_of(sample_of(name, dtype)), name)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("name", "sizes", "heads"),
    [
        ("plain", (17, 7, 1, 13, 37, 3), 7),  # several segments; two groups of heads
        ("all_padded", (17, 7, 1, 13, 37, 3), 3),
        ("plain", (3, 5, 3, 8, 16, 4), 1),
        ("plain", (4, 2, 3, 5, 3, 2), 3),  # as many slots as heads
        ("many_heads", (4, 2, 3, 5, 5, 2), 5),
        ("plain", (3, 2, 5, 1, 1, 1), 1),  # one slot of one value
        ("plain", (10, 2, 3, 6, 128, 40), 4),
    ],
)
def test_odd_sizes(name: str, sizes: Sizes, heads: int) -> None:
    """Everything of the trace and the state, usage included, to 1e-10."""
    sample = sample_of(name, torch.float64, sizes, heads=heads)
    case = case_of(sample)
    for a, b in zip(
        values_and_gradients(case.op, case.tensors),
        values_and_gradients(case.reference, case.tensors),
        strict=True,
    ):
        assert error(a, b) <= 1e-10
    found = ops.lrua_trace(*sample.args, **sample.kwargs)
    expected = reference.lrua_trace(*sample.args, **sample.kwargs)
    torch.testing.assert_close(found[1].usage, expected[1].usage, rtol=0, atol=1e-10)
    torch.testing.assert_close(found[2].usage, expected[2].usage, rtol=0, atol=1e-10)


def chosen(usage: Tensor, heads: int, **kwargs: Any) -> tuple[Tensor, LRUAState]:
    """Which slots a step writes to from that usage [B, N], and the state that it leaves, of heads
    that write nothing but to the least used slots, and there nothing but zeros."""
    batch, slots = usage.shape
    state = LRUAState(
        torch.zeros(1, batch, 3),
        torch.zeros(1, batch, 3),
        torch.ones(batch, slots, 4),
        usage,
        torch.zeros(batch, heads, slots),
        torch.zeros(batch, heads, 4),
    )
    controller = [torch.zeros(12, 2 + heads * 4), torch.zeros(12, 3), *torch.zeros(2, 12)]
    weight, bias = torch.zeros(heads * 9, 3), torch.zeros(heads, 9)
    bias[:, 8] = -1e4  # the gate is 0
    input = torch.zeros(1, batch, 2)
    arguments = (input, state, controller, weight, bias.flatten())
    _, final, trace = ops.lrua_trace(*arguments, **kwargs)
    _, same, _ = reference.lrua_trace(*arguments, **kwargs)
    torch.testing.assert_close(tuple(final), tuple(same), equal_nan=True)
    assert torch.equal(trace.write_weights.sum(-1), torch.ones(1, batch, heads))
    return trace.write_weights[0].argmax(-1), final


@pytest.mark.isa
@pytest.mark.parametrize("heads", [1, 4, 7])
def test_ties_go_by_ascending_index(heads: int) -> None:
    slots = 37
    equal = torch.full((slots,), 0.5)
    falling = torch.arange(slots, 0, -1).float()
    some = torch.ones(slots)
    some[[30, 5, 17, 9, 33, 20, 2, 25]] = 0.25
    pairs = torch.arange(slots).float().div(2, rounding_mode="floor").flip(0)
    usage = torch.stack((equal, falling, some, pairs, torch.zeros(slots)))
    found, _ = chosen(usage, heads)
    expected = torch.sort(usage, dim=-1, stable=True).indices[:, :heads]
    assert torch.equal(found, expected)
    assert torch.equal(found[0], torch.arange(heads))


def test_nan_and_infinite_usage_come_last() -> None:
    usage = torch.tensor([[torch.nan, 3.0, torch.inf, 1.0, torch.nan, 2.0], [torch.nan] * 6])
    found, _ = chosen(usage, 6)
    assert found.tolist() == [[3, 5, 1, 0, 2, 4], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("erase_all", [False, True])
def test_erased_slots(erase_all: bool) -> None:
    """The least used one, or those of all heads; no gradient goes to what stood there."""
    usage = torch.tensor([[3.0, 0.0, 2.0, 1.0, 4.0]])
    _, final = chosen(usage, 2, erase_all=erase_all)
    expected = torch.ones(1, 5, 4)
    expected[0, [1, 3] if erase_all else [1]] = 0
    assert torch.equal(final.memory, expected)
    sample = sample_of("many_heads" if erase_all else "plain", torch.float64, (1, 2, 3, 4, 8, 3))
    memory = sample.args[1].memory.requires_grad_()
    features, _ = ops.lrua(*sample.args, **sample.kwargs)
    (grad,) = torch.autograd.grad(features.sum(), memory)
    least = torch.sort(sample.args[1].usage, dim=-1, stable=True).indices
    count = 5 if erase_all else 1
    for b in range(2):
        assert not grad[b, least[b, :count]].any() and grad[b, least[b, count:]].all()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_from_zero_slots_are_alike(dtype: torch.dtype) -> None:
    """From the start, equal slots stay equal to the bit until they are written: which of them is
    written does not show in the features, and they are taken in ascending order."""
    sample = sample_of("plain", dtype, (12, 3, 4, 6, 37, 5), heads=3)
    input, state, controller, *head = sample.args
    state = LRUAState(*(torch.zeros_like(t) for t in state))
    state = state._replace(memory=torch.full_like(state.memory, 1e-6))
    ours = ops.lrua_trace(input, state, controller, *head)
    theirs = reference.lrua_trace(input, state, controller, *head)
    assert error(ours[0], theirs[0]) <= 1e-5
    for t in range(12):
        usage = ours[2].usage[t, 0]
        untouched = usage[3 * (t + 1) :]
        assert (untouched == untouched[0]).all(), t
        if 3 * (t + 2) <= 37:
            first = ours[2].usage[t].sort(dim=-1, stable=True).indices[:, :3]
            assert (first >= 0).all()
    grads = []
    for function in (ops.lrua, reference.lrua):
        leaves = [t.clone().requires_grad_() for t in (*controller, *head)]
        features, _ = function(input, state, leaves[:4], *leaves[4:])
        grads.append(torch.autograd.grad(features.square().sum(), leaves))
    for a, b in zip(*grads, strict=True):
        assert error(a, b) <= 1e-4


def test_usage_has_no_gradient() -> None:
    sample = sample_of("plain", torch.float64)
    state = LRUAState(*(t.requires_grad_() for t in sample.args[1]))
    args = (sample.args[0], state, *sample.args[2:])
    features, final, trace = ops.lrua_trace(*args)
    assert not final.usage.requires_grad and not trace.usage.requires_grad
    assert trace.write_weights.requires_grad and trace.read_weights.requires_grad
    again, _ = ops.lrua(*args[:1], final, *args[2:])
    (features.sum() + again.sum()).backward()
    assert state.usage.grad is None and state.memory.grad is not None


def test_a_trace_changes_nothing() -> None:
    sample = sample_of("all_padded", torch.float32)
    features, final = ops.lrua(*sample.args, **sample.kwargs)
    traced = ops.lrua_trace(*sample.args, **sample.kwargs)
    assert torch.equal(features, traced[0])
    assert all(torch.equal(a, b) for a, b in zip(final, traced[1], strict=True))
    assert isinstance(traced[1], LRUAState) and isinstance(traced[2], LRUATrace)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_memory_and_keys(dtype: torch.dtype) -> None:
    """Norms of zero: weightings are uniform, gradients finite."""
    sample = sample_of("plain", dtype, (4, 2, 3, 4, 40, 5))
    input, state, controller, head_weight, head_bias = sample.args
    zeros = torch.zeros_like(head_weight), torch.zeros_like(head_bias)
    state = state._replace(memory=torch.zeros_like(state.memory))
    case = case_of(sample._replace(args=(input, state, controller, *zeros)))
    values = values_and_gradients(case.op, case.tensors)
    assert all(torch.isfinite(v).all() for v in values)
    torch.testing.assert_close(values[-len(values) :][7], torch.full_like(values[7], 1 / 40))
    compare(case.op, case.reference, case.tensors, case.tensors)


def test_large_work_on_any_number_of_threads(restored_threads: None) -> None:
    case = case_of(sample_of("all_padded", torch.float32, (12, 19, 5, 40, 70, 20)))
    check_same_bits_at_any_thread_count(case)


@pytest.mark.sanitize
def test_chunks_equal_the_whole() -> None:
    args = sample_of("plain", torch.float64, (9, 3, 4, 6, 8, 5)).args
    whole, last = ops.lrua(*args)
    first, middle = ops.lrua(args[0][:4], *args[1:])
    second, end = ops.lrua(args[0][4:], middle, *args[2:])
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(tuple(end), tuple(last))


@pytest.mark.sanitize
def test_no_steps_hand_the_state_through() -> None:
    sample = sample_of("plain", torch.float32)
    input, state, *rest = sample.args
    features, final, trace = ops.lrua_trace(input[:0], state, *rest)
    assert features.shape == (0, 3, 16) and trace.usage.shape == (0, 3, 10)
    assert trace.write_weights.shape == trace.read_weights.shape == (0, 3, 2, 10)
    assert all(torch.equal(a, b) for a, b in zip(final, state, strict=True))
    memory = state.memory.clone().requires_grad_()
    final = ops.lrua(input[:0], state._replace(memory=memory), *rest)[1]
    (grad,) = torch.autograd.grad(final.memory.sum(), memory)
    assert torch.equal(grad, torch.ones_like(memory))


@pytest.mark.sanitize
def test_an_ended_row_keeps_its_state() -> None:
    """Also where a reset stands in its padding, and whatever the padding holds."""
    sample = sample_of("all_padded", torch.float64)
    input, state, *rest = sample.args
    lengths, reset = torch.tensor([0, 2, 5]), torch.ones(5, 3, dtype=torch.bool)
    reset[:2] = False
    input = input.clone()
    input[2:, 1] = float("nan")
    kwargs = {**sample.kwargs, "lengths": lengths, "reset": reset}
    features, final, trace = ops.lrua_trace(input, state, *rest, **kwargs)
    assert not features[:, 0].any()
    assert not any(a[2:, 1].any() for a in trace)
    for part, first, dim in zip(final, state, (1, 1, 0, 0, 0, 0), strict=True):
        assert torch.equal(part.select(dim, 0), first.select(dim, 0))
    case = case_of(sample._replace(args=(input, state, *rest), kwargs=kwargs))
    compare(case.op, case.reference, case.tensors, case.tensors)


def test_nan_in_a_usage_stays_in_its_row() -> None:
    sample = sample_of("plain", torch.float64)
    input, state, *rest = sample.args
    clean = ops.lrua(*sample.args)
    usage = state.usage.clone()
    usage[1] = float("nan")
    features, final = ops.lrua(input, state._replace(usage=usage), *rest)
    expected = reference.lrua(input, state._replace(usage=usage), *rest)
    torch.testing.assert_close(features, expected[0])
    torch.testing.assert_close(tuple(final), tuple(expected[1]), equal_nan=True)
    assert final.usage[1].isnan().all()
    assert torch.equal(features[:, ::2], clean[0][:, ::2])
    assert torch.equal(final.usage[::2], clean[1].usage[::2])


def test_long_sequences_train_in_little_memory() -> None:
    """Between checkpoints memories are recomputed: what is kept grows slower than T N M."""
    time, batch, slots, width = 1000, 2, 128, 20
    sample = sample_of("plain", torch.float32, (time, batch, 2, 8, slots, width))
    tensors, options = raw_arguments(sample)
    *_, saved, checkpoints = torch.ops.seqmem.lrua(*tensors, *options, False, True)
    segments = -(-time // 32)  # of sqrt(T) steps
    kept = saved.numel() + segments * checkpoints[0].numel()
    assert kept < time * batch * slots * width / 8


# ---- wrong arguments: always the same clear exception, never a crash

z = torch.zeros
T, B, WIDTH, C, N, M = SIZES
R = 2
P = R * (2 * M + 1)


def arguments() -> dict[str, Any]:
    return {
        "input": z(T, B, WIDTH),
        "hidden": z(1, B, C),
        "cell": z(1, B, C),
        "memory": z(B, N, M),
        "usage": z(B, N),
        "read_weights": z(B, R, N),
        "reads": z(B, R, M),
        "controller": [z(4 * C, WIDTH + R * M), z(4 * C, C), z(4 * C), z(4 * C)],
        "head_weight": z(P, C),
        "head_bias": z(P),
    }


def initial(**change: Tensor) -> LRUAState:
    first = LRUAState(z(1, C), z(1, C), z(N, M), z(N), z(R, N), z(R, M))
    return first._replace(**change)


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
    Bad("usage slots", {"usage": z(B, 9)}, ValueError, r"usage of shape \[3, 10\]"),
    Bad("usage heads", {"usage": z(B, R, N)}, ValueError, "usage of shape"),
    Bad("weights 2-D", {"read_weights": z(B, N)}, ValueError, "read_weights with 3 dimensions"),
    Bad("no heads", {"read_weights": z(B, 0, N)}, ValueError, r"1\.\.10 heads .* got 0"),
    Bad("too many heads", {"read_weights": z(B, 11, N)}, ValueError, r"1\.\.10 heads .* got 11"),
    Bad("heads", {"read_weights": z(B, 3, N)}, ValueError, "head_weight of shape"),
    Bad("weights slots", {"read_weights": z(B, R, 9)}, ValueError, "read_weights of shape"),
    Bad("reads heads", {"reads": z(B, 1, M)}, ValueError, "reads of shape"),
    Bad("no controller", {"controller": []}, ValueError, "4 controller tensors a layer, got 0"),
    Bad("3 tensors", {"controller": [z(24, 9)] * 3}, ValueError, "4 controller tensors a layer"),
    Bad("weight_ih", layer(0, z(4 * C, WIDTH)), ValueError, r"controller\[0\] of shape"),
    Bad("weight_hh", layer(1, z(4 * C, 5)), ValueError, r"controller\[1\] of shape"),
    Bad("bias_ih", layer(2, z(C)), ValueError, r"controller\[2\] of shape"),
    Bad("bias_hh dtype", layer(3, z(4 * C).half()), TypeError, r"controller\[3\]"),
    Bad("head_weight rows", {"head_weight": z(P - 1, C)}, ValueError, "head_weight of shape"),
    Bad("head_weight empty", {"head_weight": z(P, 0)}, ValueError, "head_weight with columns"),
    Bad("head_bias", {"head_bias": z(P + 1)}, ValueError, "head_bias of shape"),
    Bad("strength alone", {"strength": True}, ValueError, r"head_weight of shape \[24, 6\]"),
    Bad("key alone", {"add": "key"}, ValueError, r"head_weight of shape \[12, 6\]"),
    Bad("add", {"add": "both"}, ValueError, "add 'own' or 'key', got 'both'", False, True),
    Bad("gamma negative", {"gamma": -0.1}, ValueError, r"gamma in 0\.\.1, got -0\.1"),
    Bad("gamma large", {"gamma": 1.5}, ValueError, r"gamma in 0\.\.1"),
    Bad("gamma NaN", {"gamma": float("nan")}, ValueError, r"gamma in 0\.\.1"),
    Bad("controller type", {"controller_type": "gru"}, ValueError, "controller_type", False, True),
    Bad("reset alone", {"reset": mask}, ValueError, "initial of 6 tensors beside reset"),
    Bad("reset shape", {"reset": mask.t(), "initial": initial()}, ValueError, "reset of shape"),
    Bad("reset dtype", {"reset": z(T, B), "initial": initial()}, TypeError, "reset of dtype bool"),
    Bad(
        "initial batched",
        {"reset": mask, "initial": initial(memory=z(B, N, M))},
        ValueError,
        "initial.memory of shape",
    ),
    Bad("initial usage", {"initial": initial(usage=z(B, N))}, ValueError, "initial.usage of shape"),
    Bad("initial dtype", {"initial": initial(reads=z(R, M).half())}, TypeError, "initial.reads"),
    Bad("lengths size", {"lengths": torch.ones(2).long()}, ValueError, "lengths of shape"),
    Bad("lengths float", {"lengths": torch.ones(3)}, TypeError, "lengths of dtype"),
    Bad("lengths negative", {"lengths": torch.tensor([1, -1, 2])}, ValueError, "got -1", True),
    Bad("lengths too long", {"lengths": torch.tensor([1, 6, 2])}, ValueError, "got 6", True),
]


def call(input: Tensor, **rest: Any) -> Any:
    return ops.lrua(input, LRUAState(*(rest.pop(name) for name in LRUAState._fields)), **rest)


COMPILED = ("input 2-D", "memory dtype", "weight_ih", "too many heads", "gamma negative")


class TestHostile(HostileSuite):
    targets = (Target("lrua", call, arguments, ROWS, compiled=(*COMPILED, "initial batched")),)
