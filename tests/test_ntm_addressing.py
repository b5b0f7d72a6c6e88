"""The NTM's functionals: the inherited suite, and edges of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hostile_suite import Bad, HostileSuite, Target
from op_suite import (
    DTYPES,
    TOLERANCES,
    Case,
    OpSuite,
    Threaded,
    check_against_float64,
    check_same_bits_at_any_thread_count,
    error,
    sample_of,
    values_and_gradients,
)
from torch import Tensor

from seqmem_fast import ops
from seqmem_fast.reference import ntm_addressing as reference

Sizes = tuple[int, int, int, int, int]
NAMES = [sample.name for sample in reference.sample_inputs()]
UNBATCHED = [name for name in NAMES if name.endswith("_unbatched")]


def tupled(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *tensors: (function(*tensors),)


def make(name: str, dtype: torch.dtype, sizes: Sizes) -> Case:
    sample = sample_of(reference, name, dtype=dtype, sizes=sizes)
    row = None if name.endswith("_unbatched") else 0
    op, plain = (getattr(m, sample.function) for m in (ops, reference))
    return Case(tupled(op), tupled(plain), sample.args, (row,) * len(sample.args), (row,))


def threaded() -> Threaded:
    """Calls below and above the size at which one takes several threads."""
    names = ("addressing_heads", "read_heads", "write_heads")
    sizes = (1, 9, 5, 2, 3), (8, 256, 32, 2, 3)
    cases = [make(name, torch.float32, one) for one in sizes for name in names]
    return [(case.op, case.tensors) for case in cases]


class TestNtm(OpSuite):
    names = ("content", "addressing", "addressing_heads", "read_heads", "write_heads")

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        return make(name, dtype, (2, 4, 3, 2, 3) if tiny else (3, 8, 5, 2, 3))

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        sample = sample_of(reference, name, dtype=torch.float64)
        forward = getattr(torch.ops.seqmem, sample.function).default
        backward = getattr(torch.ops.seqmem, f"{sample.function}_backward").default
        leaves = tuple(t.clone().requires_grad_() for t in sample.args)
        grad = torch.ones_like(forward(*sample.args))
        return [(forward, leaves), (backward, (grad, *sample.args, [True] * len(leaves)))]


# Around the widths of vectors and tiles, in slots and within a slot; N and M below one vector; the
# widest shifts, whose two ends meet.
SIZES: list[Sizes] = [
    *((4, 9, width, 1, 3) for width in (2, 3, 4, 7, 8, 9, 15, 16, 17, 20, 31, 33, 64, 70)),
    *((2, slots, 5, 2, 3) for slots in (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 65, 128)),
    *((1, slots, 4, 3, slots // 2 * 2 + 1) for slots in (2, 3, 8, 17)),
    (5, 4, 3, 7, 3),
]


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(sizes: Sizes, dtype: torch.dtype) -> None:
    for name in ("content", "addressing", "read", "write"):
        case = make(name + "_heads" * (sizes[3] > 1), dtype, sizes)
        check_against_float64(case, name)


@pytest.mark.sanitize
def test_a_shift_of_one_tap_and_slots_of_one_value() -> None:
    """Where gradients of the shift and of the memory vanish but for rounding."""
    for sizes in ((2, 5, 3, 2, 1), (2, 5, 1, 2, 3), (2, 1, 1, 1, 1)):
        for name in NAMES:
            case = make(name, torch.float64, sizes)
            results = [values_and_gradients(f, case.tensors) for f in (case.op, case.reference)]
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", UNBATCHED)
def test_unbatched_equals_a_batch_of_one(name: str) -> None:
    case = make(name, torch.float32, (1, 9, 5, 1, 3))
    (alone,) = case.op(*case.tensors)
    (batch,) = case.op(*(t.unsqueeze(0) for t in case.tensors if t is not None))
    assert torch.equal(alone, batch[0])


def test_unbatched_heads() -> None:
    """[H, ...] over memory [N, M]."""
    for name in ("content_heads", "addressing_heads", "read_heads", "write_heads"):
        case = make(name, torch.float64, (1, 6, 4, 3, 3))
        tensors = tuple(t[0] for t in case.tensors if t is not None)
        results = [values_and_gradients(f, tensors) for f in (case.op, case.reference)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_heads_equal_calls_one_by_one() -> None:
    sample = next(s for s in reference.sample_inputs() if s.name == "addressing_heads")
    memory, *rest = sample.args
    together = ops.ntm_addressing(*sample.args)
    for h in range(together.size(1)):
        assert torch.equal(together[:, h], ops.ntm_addressing(memory, *(t[:, h] for t in rest)))
    sample = next(s for s in reference.sample_inputs() if s.name == "write_heads")
    memory, *rest = sample.args
    written = memory
    for h in range(rest[0].size(1)):
        written = ops.ntm_write(written, *(t[:, h] for t in rest))
    torch.testing.assert_close(ops.ntm_write(*sample.args), written)


@pytest.mark.isa
@pytest.mark.parametrize("name", ["addressing_heads", "read_heads", "write_heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_same_bits_at_any_thread_count(
    name: str, dtype: torch.dtype, restored_threads: None
) -> None:
    check_same_bits_at_any_thread_count(make(name, dtype, (7, 400, 65, 2, 5)))


# ---- what the equations say, against the paper's own words in numpy


def paper(
    memory: Any, key: Any, beta: float, gate: float, shift: Any, gamma: float, before: Any
) -> Any:
    slots, reach = len(memory), len(shift) // 2
    similar = memory @ key / (np.linalg.norm(memory, axis=1) * np.linalg.norm(key) + 1e-8)
    content = np.exp(beta * similar) / np.exp(beta * similar).sum()
    gated = gate * content + (1 - gate) * before
    shifted = np.zeros(slots)
    for i in range(slots):
        for move in range(-reach, reach + 1):
            shifted[(i + move) % slots] += gated[i] * shift[move + reach]
    return shifted**gamma / (shifted**gamma).sum()


@pytest.mark.parametrize(("slots", "shift_range"), [(7, 0), (7, 1), (7, 3), (6, 3), (2, 1)])
def test_addressing_is_the_papers(slots: int, shift_range: int) -> None:
    case = make("addressing", torch.float64, (4, slots, 5, 1, 2 * shift_range + 1))
    (weights,) = case.op(*case.tensors)
    for b, row in enumerate(weights):
        args = [t[b].numpy() if t[b].dim() else float(t[b]) for t in case.tensors]
        np.testing.assert_allclose(row.numpy(), paper(*args), rtol=1e-12)


def test_a_positive_move_goes_to_higher_slots() -> None:
    memory, key, one = torch.zeros(5, 2), torch.zeros(2), torch.tensor(1.0)
    before = torch.tensor([0.0, 0, 1, 0, 0])
    for j, slot in enumerate((0, 1, 2, 3, 4)):
        shift = torch.zeros(5)
        shift[j] = 1
        moved = ops.ntm_addressing(memory, key, one, 0 * one, shift, one, before)
        assert moved.argmax() == slot and moved[slot] == 1
    last = ops.ntm_addressing(
        memory, key, one, 0 * one, shift, one, torch.tensor([0.0, 0, 0, 0, 1])
    )
    assert last.argmax() == 1  # around the end


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_weights_sum_to_one_for_every_gamma(dtype: torch.dtype) -> None:
    """A flat weighting over 128 slots to the 1000th is 1e-2107 per slot."""
    gamma = torch.tensor([1, 1.5, 11, 100, 1000], dtype=dtype, requires_grad=True)
    rows = gamma.numel()
    for before in (torch.ones(128) / 128, torch.rand(128).softmax(0)):
        prev = before.to(dtype).expand(rows, -1).clone().requires_grad_()
        weights = address_by_shift(prev, gamma)
        torch.testing.assert_close(
            weights.double().sum(-1),
            torch.ones(rows, dtype=torch.float64),
            rtol=0,
            atol=0.02 if dtype == torch.bfloat16 else 1e-5,
        )
        grads = torch.autograd.grad(weights[:, :64].sum(), (prev, gamma))
        assert all(torch.isfinite(g).all() for g in grads)


def address_by_shift(prev: Tensor, gamma: Tensor) -> Tensor:
    """The last stage alone: the gate closed to content, a shift that stays."""
    rows, like = prev.size(0), prev.detach()
    return ops.ntm_addressing(
        like.new_zeros(rows, prev.size(1), 3),
        like.new_zeros(rows, 3),
        like.new_ones(rows),
        like.new_zeros(rows),
        like.new_tensor([0, 1, 0]).expand(rows, 3),
        gamma,
        prev,
    )


@pytest.mark.isa
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 1.7, 1000.0, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_slots_at_zero(gamma: float, dtype: torch.dtype) -> None:
    """They stay zero, value and both gradients are finite; all zeros stay zeros."""
    prev = torch.tensor([[0, 0.5, 0.5, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1e-30, 1, 0, -1]])
    prev = prev.to(dtype).requires_grad_()
    power = torch.full((4,), gamma, dtype=dtype, requires_grad=True)
    weights = address_by_shift(prev, power)
    assert not weights[prev <= 0].any()
    torch.testing.assert_close(weights.sum(-1), torch.tensor([1, 0, 1, 1], dtype=dtype))
    for grad in torch.autograd.grad((weights * torch.arange(4)).sum(), (prev, power)):
        assert torch.isfinite(grad).all()


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_value", [0.0, 1.0])
def test_zero_memory_and_zero_key(dtype: torch.dtype, key_value: float) -> None:
    """Uniform weights; gradients as the formula gives them with a norm of slope 0, never NaN."""
    memory = torch.zeros(2, 6, 3, dtype=dtype, requires_grad=True)
    key = torch.full((2, 3), key_value, dtype=dtype, requires_grad=True)
    beta = torch.full((2,), 5.0, dtype=dtype, requires_grad=True)
    weights = ops.ntm_content_addressing(memory, key, beta)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))
    seeds = torch.arange(6.0).to(dtype)
    first = torch.autograd.grad((weights * seeds).sum(), (memory, key, beta), create_graph=True)
    slope = (seeds - seeds.mean()) / 6 * 5 * key_value / 1e-8
    expected = slope.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    if dtype != torch.float16:  # 1e8 is beyond it
        torch.testing.assert_close(first[0][0, :, 0], expected, rtol=0.02, atol=0)
    assert not first[1].any() and not first[2].any()
    if dtype != torch.float16 or key_value == 0:
        penalty = sum((g.float() * 1e-9).square().sum() for g in first)
        for grad in torch.autograd.grad(penalty, (memory, key, beta)):
            assert torch.isfinite(grad).all()


@pytest.mark.isa
def test_values_far_beyond_the_papers_ranges() -> None:
    """Computed as written, and finite."""
    case = make("addressing", torch.float32, (3, 16, 4, 1, 3))
    memory, key, _, gate, shift, _, prev = (t for t in case.tensors if t is not None)
    for beta, gamma in ((-3.0, 0.5), (-1e4, 1.0), (1e4, 1e3), (0.0, 0.0), (3.0, -1.0)):
        args = (memory, key, torch.full((3,), beta), gate, shift, torch.full((3,), gamma), prev)
        ours = values_and_gradients(case.op, args)
        assert all(torch.isfinite(v).all() for v in ours)
        exact = case.reference(*(t.double() for t in args))[0]
        assert error(ours[0], exact) <= 100 * TOLERANCES[torch.float32].output


def test_the_usual_example() -> None:
    """Write a vector into slot 5 of an empty memory, find it by its content, read it."""
    vector = torch.tensor([1.0, 2, 3, 4, 5])
    slot = torch.zeros(10)
    slot[4] = 1
    memory = ops.ntm_write(torch.zeros(10, 5), slot, torch.ones(5), vector)
    assert torch.equal(memory[4], vector) and not memory[:4].any() and not memory[5:].any()
    weights = ops.ntm_content_addressing(memory, vector, torch.tensor(10.0))
    similar = torch.zeros(10, dtype=torch.float64)
    similar[4] = 1
    expected = torch.softmax(10 * similar, 0)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        ops.ntm_read(memory, weights).double(), expected[4] * vector.double(), rtol=1e-5, atol=0
    )


# ---- wrong arguments

BATCH, SLOTS, WIDTH, TAPS = 3, 6, 5, 3
z = torch.zeros
VECTOR, ROW = (BATCH, WIDTH), (BATCH, SLOTS)
MEMORY = {"memory": (BATCH, SLOTS, WIDTH)}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "ntm_content_addressing": {**MEMORY, "key": VECTOR, "beta": (BATCH,)},
    "ntm_addressing": {
        **MEMORY,
        "key": VECTOR,
        "beta": (BATCH,),
        "gate": (BATCH,),
        "shift": (BATCH, TAPS),
        "gamma": (BATCH,),
        "prev_weights": ROW,
    },
    "ntm_read": {**MEMORY, "weights": ROW},
    "ntm_write": {**MEMORY, "weights": ROW, "erase": VECTOR, "add": VECTOR},
}


def table(op: str) -> list[Bad]:
    """Every argument with a wrong size, rank, dtype, layout; and what is wrong of this op alone."""
    shapes = SHAPES[op]
    rows = []
    for name, shape in shapes.items():
        wrong = (*shape[:-1], shape[-1] + 2)
        rows += [
            Bad(f"{name} rank", {name: z(1, *shape, 1)}, ValueError, f"expected {name} "),
            Bad(f"{name} integer", {name: z(shape).long()}, TypeError, name),
            Bad(f"{name} bool", {name: z(shape).bool()}, TypeError, name),
            Bad(f"{name} complex", {name: z(shape).cfloat()}, TypeError, name),
            Bad(f"{name} float8", {name: z(shape).to(torch.float8_e4m3fn)}, TypeError, name),
            Bad(f"{name} sparse", {name: z(shape).to_sparse()}, TypeError, name),
            Bad(f"{name} dtype", {name: z(shape).double()}, TypeError, "dtype"),
            Bad(f"{name} batch", {name: z(BATCH + 1, *shape[1:])}, ValueError, "of shape"),
        ]
        if name != "shift" and (op, name) != ("ntm_read", "memory"):  # any width fits there
            rows.append(Bad(f"{name} size", {name: z(wrong)}, ValueError, "of shape"))
    everything = {name: z(shape).int() for name, shape in shapes.items()}
    rows += [
        Bad("all integer", everything, TypeError, "expected memory of dtype"),
        Bad("memory 1-D", {"memory": z(WIDTH)}, ValueError, "memory with 2 or 3 dimensions"),
        Bad("memory 4-D", {"memory": z(1, 3, 6, 5)}, ValueError, "memory with 2 or 3 dimensions"),
        Bad("no slots", {"memory": z(BATCH, 0, WIDTH)}, ValueError, "at least one slot"),
        Bad("no width", {"memory": z(BATCH, SLOTS, 0)}, ValueError, "at least one value"),
    ]
    first = next(name for name in ("key", "weights") if name in shapes)
    headed = (BATCH, 0, shapes[first][-1])
    rows.append(Bad("no heads", {first: z(headed)}, ValueError, "at least one head"))
    if op != "ntm_read":
        rows.append(Bad("one with heads", {first: z(BATCH, 2, headed[-1])}, ValueError, "of shape"))
    if op == "ntm_addressing":
        rows += [
            Bad("even shift", {"shift": z(BATCH, 4)}, ValueError, r"odd .* got 4"),
            Bad("no taps", {"shift": z(BATCH, 0)}, ValueError, r"odd .* got 0"),
            Bad(
                "shift wider than memory",
                {"shift": z(BATCH, 9)},
                ValueError,
                r"moves by at most 3 \(half the slots of memory\), got one that moves by 4",
            ),
            Bad("a scalar gate", {"gate": z(())}, ValueError, r"gate of shape \[3\], got \[\]"),
        ]
    return rows


def target(op: str) -> Target:
    compiled = (
        "memory rank",
        "beta size",
        "add dtype",
        "shift wider than memory",
        "weights integer",
    )

    def arguments() -> dict[str, Any]:
        return {name: z(shape) for name, shape in SHAPES[op].items()}

    return Target(op, getattr(ops, op), arguments, table(op), compiled=compiled)


class TestHostile(HostileSuite):
    targets = tuple(target(op) for op in SHAPES)


def test_the_widest_shift_is_taken() -> None:
    """Its two ends move to the same slot."""
    arguments = target("ntm_addressing").arguments()
    weights = ops.ntm_addressing(**{**arguments, "shift": z(BATCH, 7) + 1})
    assert torch.isfinite(weights).all()
