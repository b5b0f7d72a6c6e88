"""The whole-sequence NTM op: the inherited suite, and edges of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hostile_suite import Bad, HostileSuite, Target
from op_suite import (
    TOLERANCES,
    Case,
    Function,
    OpSuite,
    check_against_float64,
    compare,
    error,
    split,
    values_and_gradients,
)
from torch import Tensor

from seqmem_fast import ops
from seqmem_fast.reference import ntm as reference
from seqmem_fast.reference.common import Sample
from seqmem_fast.reference.ntm_addressing import NTMState

ALL = [sample.name for sample in reference.sample_inputs()]
SIZES = (5, 3, 4, 6, 10, 5)  # T, B, I, C, N, M; slots that fill no whole vectors
SHORT = (3, *SIZES[1:])  # the eager reference's time goes by its steps
TINY = (2, 2, 2, 2, 5, 2)


def sample_of(
    name: str, dtype: torch.dtype, sizes: tuple[int, int, int, int, int, int] = SIZES
) -> Sample:
    samples = reference.sample_inputs(dtype=dtype, sizes=sizes)
    return next(s for s in samples if s.name == name)


def case_of(sample: Sample) -> Case:
    """ntm_trace of positional tensors: input, state, head weight and bias, controller, initial,
    lengths, reset."""
    input, state, controller, head_weight, head_bias = sample.args
    options = dict(sample.kwargs)
    initial = options.pop("initial", None)
    lengths, reset = options.pop("lengths", None), options.pop("reset", None)
    end = 8 + len(controller)

    def bind(function: Any) -> Function:
        def call(*tensors: Any) -> tuple[Tensor, ...]:
            features, final, weightings = function(
                tensors[0],
                NTMState(*tensors[1:6]),
                tensors[8:end],
                *tensors[6:8],
                initial=None if initial is None else NTMState(*tensors[end:-2]),
                lengths=tensors[-2],
                reset=tensors[-1],
                **options,
            )
            return features, *final, weightings

        return call

    first = () if initial is None else tuple(initial)
    tensors = (input, *state, head_weight, head_bias, *controller, *first, lengths, reset)
    shared = (None,) * (2 + len(controller) + len(first))
    return Case(
        bind(ops.ntm_trace),
        bind(reference.ntm_trace),
        tensors,
        (1, 1, 1, 0, 0, 0, *shared, 0, 1),
        (1, 1, 1, 0, 0, 0, 1),
    )


def raw_arguments(sample: Sample) -> tuple[list[Any], list[Any]]:
    """The op's tensors and its options, but for its last two."""
    input, state, controller, head_weight, head_bias = sample.args
    kwargs = sample.kwargs
    tensors = [input, *state, list(controller), head_weight, head_bias]
    tensors += [list(kwargs.get("initial", ())), kwargs.get("lengths"), kwargs.get("reset")]
    lstm = kwargs.get("controller_type", "lstm") == "lstm"
    options = [kwargs.get("heads", "wr"), kwargs.get("shift_range", 1), lstm]
    return tensors, [*options, kwargs.get("squash", True)]


class TestNtmSequence(OpSuite):
    names = ("feedforward", "all_padded")
    all_names = ALL

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        return case_of(sample_of(name, dtype, TINY if tiny else SIZES))

    def test_gradgradcheck(self, name: str) -> None:
        """Of one vector of all inputs to one of all outputs: a few directions, not every pair."""
        floats, call = split(self.case(name, tiny=True))
        sizes = [t.numel() for t in floats]

        def joined(values: Tensor) -> Tensor:
            parts = zip(values.split(sizes), floats, strict=True)
            return torch.cat([o.flatten() for o in call(*(v.view_as(t) for v, t in parts))])

        values = torch.cat([t.detach().flatten() for t in floats]).requires_grad_()
        assert torch.autograd.gradgradcheck(joined, (values,), fast_mode=True)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        tensors, options = raw_arguments(sample_of(name, torch.float64))
        forward, backward = torch.ops.seqmem.ntm.default, torch.ops.seqmem.ntm_backward.default
        *outputs, saved, checkpoints = forward(*tensors, *options, True, True)
        # The elements beyond the slots and of rows that have ended have no meaning.
        saved, checkpoints = (torch.nan_to_num(t) for t in (saved, checkpoints))
        grads = [torch.ones_like(t) for t in outputs]
        features, trace = outputs[0], outputs[-1]
        rest = [*grads, *tensors, features, trace, saved, checkpoints, *options, [True] * 4]
        leaves = [t.clone().requires_grad_() if isinstance(t, Tensor) else t for t in tensors[:-2]]
        leaves += tensors[-2:]
        return [(forward, (*leaves, *options, False, False)), (backward, tuple(rest))]


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("name", [name for name in ALL if name not in TestNtmSequence.names])
def test_other_options_against_float64(name: str) -> None:
    check_against_float64(case_of(sample_of(name, torch.float32, SHORT)))
    check_against_float64(case_of(sample_of(name, torch.float64, SHORT)))


def distances(found: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """The largest relative distances among the outputs and among the gradients."""
    each = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    outputs = len(NTMState._fields) + 2
    return max(each[:outputs]), max(each[outputs:])


def test_long_padded_sequences_are_as_near_to_float64_as_eager() -> None:
    """Through 41 steps a rounding error grows, in any float32 arithmetic: now and then beyond the
    bounds that hold for most weights, and then in eager PyTorch as well."""
    sizes = (41, 3, 9, 24, 32, 12)
    ours, eager = [], []
    for seed in range(4):
        samples = reference.sample_inputs(sizes=sizes, seed=seed)
        case = case_of(next(s for s in samples if s.name == "lengths"))
        wide = [
            t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
            for t in case.tensors
        ]
        exact = values_and_gradients(case.reference, wide)
        ours.append(distances(values_and_gradients(case.op, case.tensors), exact))
        eager.append(distances(values_and_gradients(case.reference, case.tensors), exact))
    for found, plain, bound in zip(
        zip(*ours, strict=True), zip(*eager, strict=True), (1e-5, 1e-4), strict=True
    ):
        assert max(found) <= max(bound, 2 * max(plain)), (ours, eager)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("all_padded", (17, 7, 1, 13, 37, 3)),
        ("plain", (10, 7, 1, 13, 37, 3)),
        ("all_padded", (3, 5, 3, 8, 16, 4)),
        ("read_first", (3, 5, 3, 8, 37, 3)),
        ("plain", (2, 1, 5, 1, 3, 1)),
        ("all_padded", (2, 1, 5, 1, 3, 1)),
    ],
)
def test_odd_sizes(name: str, sizes: tuple[int, int, int, int, int, int]) -> None:
    """Tails of vectors of every kind, several segments, a controller of one unit."""
    case = case_of(sample_of(name, torch.float64, sizes))
    compare(case.op, case.reference, case.tensors, case.tensors)


@pytest.mark.sanitize
@pytest.mark.parametrize(("slots", "reach"), [(9, 4), (8, 4), (2, 1), (1, 0)])
def test_shift_up_to_half_the_memory(slots: int, reach: int) -> None:
    """Every slot can reach every other, the opposite one of an even number on two ways."""
    sample = sample_of("plain", torch.float64, (4, 2, 3, 5, slots, 3))
    input, state, controller, _, _ = sample.args
    rows = 2 * (3 + 2 * reach + 4) + 2 * 3
    args = (input, state, controller, torch.randn(rows, 5).double(), torch.randn(rows).double())
    case = case_of(sample._replace(args=args, kwargs={"shift_range": reach}))
    compare(case.op, case.reference, case.tensors, case.tensors)


@pytest.mark.sanitize
def test_chunks_equal_the_whole() -> None:
    args = sample_of("plain", torch.float64, (9, 3, 4, 6, 8, 5)).args
    whole, last = ops.ntm(*args)
    first, middle = ops.ntm(args[0][:4], *args[1:])
    second, end = ops.ntm(args[0][4:], middle, *args[2:])
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(tuple(end), tuple(last))


@pytest.mark.sanitize
def test_no_steps_hand_the_state_through() -> None:
    case = case_of(sample_of("plain", torch.float32))
    tensors = (case.tensors[0][:0], *case.tensors[1:])
    features, *state, weightings = case.op(*tensors)
    assert features.shape == (0, 3, 11) and weightings.shape == (0, 3, 2, 10)
    for a, b in zip(state, tensors[1:6], strict=True):
        assert torch.equal(a, b)
    memory = tensors[3].clone().requires_grad_()
    final = case.op(*tensors[:3], memory, *tensors[4:])[3]
    (grad,) = torch.autograd.grad(final.sum(), memory)
    assert torch.equal(grad, torch.ones_like(memory))


@pytest.mark.sanitize
def test_an_ended_row_keeps_its_state() -> None:
    """Also where a reset stands in its padding, and whatever the padding holds."""
    case = case_of(sample_of("all_padded", torch.float64))
    lengths, reset = torch.tensor([0, 2, 5]), torch.ones(5, 3, dtype=torch.bool)
    reset[:2] = False
    tensors = list(case.tensors)
    tensors[-2:] = [lengths, reset]
    tensors[0] = tensors[0].clone()
    tensors[0][2:, 1] = float("nan")
    features, *state, weightings = case.op(*tensors)
    assert not features[:, 0].any() and not weightings[2:, 1].any()
    for part, first, dim in zip(state, tensors[1:6], (1, 1, 0, 0, 0), strict=True):
        assert torch.equal(part.select(dim, 0), first.select(dim, 0))
    compare(case.op, case.reference, tensors, tensors)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("gamma", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_memory_and_sharp_focus(gamma: float, dtype: torch.dtype) -> None:
    """An all-zero memory and keys, weightings of one slot: sums stay 1, gradients are finite."""
    sample = sample_of("plain", dtype, (6, 2, 3, 4, 128, 5))
    input, state, controller, head_weight, head_bias = sample.args
    head_weight, head_bias = torch.zeros_like(head_weight), torch.zeros_like(head_bias)
    for start in (0, 21):  # the heads' parts of the bias
        head_bias[start + 5 + 5] = gamma
    memory, weightings = torch.zeros_like(state.memory), torch.zeros_like(state.weightings)
    weightings[:, :, 0] = 1
    args = (input, state._replace(memory=memory, weightings=weightings), controller, head_weight)
    case = case_of(sample._replace(args=(*args, head_bias)))
    values = values_and_gradients(case.op, case.tensors)
    assert all(torch.isfinite(v).all() for v in values)
    torch.testing.assert_close(values[6].sum(-1), torch.ones(6, 2, 2, dtype=dtype))
    for a, b in zip(values[:7], case.reference(*case.tensors), strict=True):
        assert error(a, b) <= 20 * TOLERANCES[dtype].output  # gamma magnifies rounding


def test_empty_weightings_stay_empty() -> None:
    """Weightings of zeros that only the previous step feeds give zeros, not NaN."""
    sample = sample_of("plain", torch.float64)
    input, state, controller, head_weight, head_bias = sample.args
    head_weight, head_bias = torch.zeros_like(head_weight), torch.zeros_like(head_bias)
    for start in (0, 21):
        head_bias[start + 6] = -1e4  # the gate is 0
    args = (input, state._replace(weightings=torch.zeros_like(state.weightings)), controller)
    case = case_of(sample._replace(args=(*args, head_weight, head_bias)))
    values = values_and_gradients(case.op, case.tensors)
    assert not values[6].any()
    assert all(torch.isfinite(v).all() for v in values)


def test_long_sequences_train_in_little_memory() -> None:
    """Between checkpoints memories are recomputed: what is kept grows slower than T N M."""
    time, batch, slots, width = 1000, 2, 128, 20
    args = sample_of("plain", torch.float32, (time, batch, 2, 8, slots, width)).args
    input, state, controller, *head = args
    tensors = [input, *state, list(controller), *head, [], None, None]
    *_, saved, checkpoints = torch.ops.seqmem.ntm(*tensors, "wr", 1, True, True, True, True)
    segments = -(-time // 32)  # of sqrt(T) steps
    kept = saved.numel() + segments * checkpoints[0].numel()
    assert kept < time * batch * slots * width / 8


# ---- wrong arguments: always the same clear exception, never a crash

z = torch.zeros
T, B, WIDTH, C, N, M = SIZES


def arguments() -> dict[str, Any]:
    return {
        "input": z(T, B, WIDTH),
        "hidden": z(1, B, C),
        "cell": z(1, B, C),
        "memory": z(B, N, M),
        "weightings": z(B, 2, N),
        "reads": z(B, 1, M),
        "controller": [z(4 * C, WIDTH + M), z(4 * C, C), z(4 * C), z(4 * C)],
        "head_weight": z(2 * (M + 6) + 2 * M, C),
        "head_bias": z(2 * (M + 6) + 2 * M),
    }


def initial(**change: Tensor) -> NTMState:
    return NTMState(z(1, C), z(1, C), z(N, M), z(2, N), z(1, M))._replace(**change)


def layer(index: int, value: Tensor) -> dict[str, Any]:
    tensors = arguments()["controller"]
    tensors[index] = value
    return {"controller": tensors}


mask = z(T, B).bool()
ROWS = [
    Bad("input 2-D", {"input": z(T, WIDTH)}, ValueError, "input with 3 dimensions"),
    Bad("input width", {"input": z(T, B, 3)}, ValueError, r"controller\[0\] of shape \[24, 8\]"),
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
    Bad("weightings heads", {"weightings": z(B, 1, N)}, ValueError, "weightings of shape"),
    Bad("reads heads", {"reads": z(B, 2, M)}, ValueError, "reads of shape"),
    Bad("no controller", {"controller": []}, ValueError, "4 controller tensors a layer, got 0"),
    Bad("3 tensors", {"controller": [z(24, 9)] * 3}, ValueError, "4 controller tensors a layer"),
    Bad(
        "weight_ih", layer(0, z(4 * C, WIDTH)), ValueError, r"controller\[0\] of shape", False, True
    ),
    Bad("weight_hh", layer(1, z(4 * C, 5)), ValueError, r"controller\[1\] of shape"),
    Bad("bias_ih", layer(2, z(C)), ValueError, r"controller\[2\] of shape"),
    Bad("bias_hh dtype", layer(3, z(4 * C).half()), TypeError, r"controller\[3\]"),
    Bad("head_weight rows", {"head_weight": z(31, C)}, ValueError, "head_weight of shape"),
    Bad("head_weight empty", {"head_weight": z(32, 0)}, ValueError, "head_weight with columns"),
    Bad("head_bias", {"head_bias": z(31)}, ValueError, "head_bias of shape"),
    Bad("heads empty", {"heads": ""}, ValueError, "heads to be a string of 'w' and 'r'"),
    Bad("heads unknown", {"heads": "wx"}, ValueError, "'wx'"),
    Bad("heads longer", {"heads": "wrr"}, ValueError, "head_weight of shape"),
    Bad("shift negative", {"shift_range": -1}, ValueError, "shift_range"),
    Bad("shift too wide", {"shift_range": 6}, ValueError, r"0\.\.5 for 10 slots, got 6"),
    Bad("shift huge", {"shift_range": 2**62}, ValueError, "shift_range"),
    Bad("controller type", {"controller_type": "gru"}, ValueError, "controller_type"),
    Bad("reset alone", {"reset": mask}, ValueError, "initial of 5 tensors beside reset"),
    Bad("reset shape", {"reset": mask.t(), "initial": initial()}, ValueError, "reset of shape"),
    Bad("reset dtype", {"reset": z(T, B), "initial": initial()}, TypeError, "reset of dtype bool"),
    Bad(
        "initial batched",
        {"reset": mask, "initial": initial(memory=z(B, N, M))},
        ValueError,
        "initial.memory of shape",
    ),
    Bad("initial dtype", {"initial": initial(reads=z(1, M).half())}, TypeError, "initial.reads"),
    Bad("lengths size", {"lengths": torch.ones(2).long()}, ValueError, "lengths of shape"),
    Bad("lengths float", {"lengths": torch.ones(3)}, TypeError, "lengths of dtype"),
    Bad("lengths negative", {"lengths": torch.tensor([1, -1, 2])}, ValueError, "got -1", True),
    Bad("lengths too long", {"lengths": torch.tensor([1, 6, 2])}, ValueError, "got 6", True),
]


def call(input: Tensor, **rest: Any) -> Any:
    return ops.ntm(input, NTMState(*(rest.pop(name) for name in NTMState._fields)), **rest)


COMPILED = ("input 2-D", "memory dtype", "weight_ih", "heads unknown", "shift negative")


class TestHostile(HostileSuite):
    targets = (Target("ntm", call, arguments, ROWS, compiled=(*COMPILED, "initial batched")),)
