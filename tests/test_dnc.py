"""The DNC op: the suites of machines, ties, and edges of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hostile_suite import Bad, HostileSuite
from machine_suite import MachineSuite, target
from machines import DNC, SIZES, Sizes
from op_suite import check_same_bits_at_any_thread_count, compare, error, values_and_gradients
from torch import Tensor

from seqmem_fast import ops
from seqmem_fast.reference import dnc as reference
from seqmem_fast.reference.common import Sample
from seqmem_fast.reference.dnc import DNCOptions, DNCState, DNCTrace

PARTS = len(DNCState._fields)
# With the gradient through w-hat, which finite differences see, and without which the write
# weightings of the state have none.
DEFAULTS = {"usage_gradient": True}
case_of = partial(DNC.case, **DEFAULTS)
threaded = partial(DNC.threaded, **DEFAULTS)


class TestDnc(MachineSuite):
    machine, defaults = DNC, DEFAULTS
    names = ("many_heads", "sharpen", "reset")
    odd_sizes = (
        ("many_heads", (17, 7, 1, 13, 37, 3), {}),
        ("reset", (17, 7, 1, 13, 37, 3), {}),
        ("sharpen", (10, 7, 1, 13, 37, 3), {}),
        ("plain", (3, 5, 3, 8, 16, 4), {}),
        ("masks", (3, 2, 3, 8, 37, 9), {}),
        ("plain", (2, 1, 5, 1, 1, 1), {}),
        ("many_heads", (3, 2, 2, 3, 2, 1), {}),
        ("sharpen", (3, 2, 2, 3, 1, 2), {}),
    )
    long = (1000, 2, 2, 8, 64, 8)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("name", ["plain", "reset"])
def test_no_gradient_through_what_has_been_written(name: str) -> None:
    """The default: the write weightings of a state lead nowhere but to its end."""
    sample = DNC.sample(name)
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


def with_heads(
    sizes: Sizes, reads: int, writes: int, dtype: torch.dtype = torch.float64, **kwargs: Any
) -> Sample:
    """A call with so many heads, from distinct usages."""
    _, batch, width, control, slots, slot = sizes
    sample = DNC.sample("plain", dtype, sizes)
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
        case_of(DNC.sample("reset", torch.float32, (9, 13, 4, 20, 40, 7)))
    )


# ---- sequences


@pytest.mark.parametrize("name", ["plain", "many_heads", "no_links", "lengths"])
def test_trace(name: str) -> None:
    sample = DNC.sample(name)
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


# ---- wrong arguments: always the same clear exception, never a crash

z = torch.zeros
T, B, _, C, N, M = SIZES
P = 2 * M + 3 * M + 5 * 2 + 3
ROWS = [
    Bad("usage slots", {"usage": z(B, 9)}, ValueError, "usage of shape"),
    Bad("link slots", {"link": z(B, 1, N, 9)}, ValueError, "link of shape"),
    Bad("link heads", {"link": z(B, 0, N, N)}, ValueError, "link of shape"),
    Bad("link not asked for", {"links": False}, ValueError, "interface_weight of shape"),
    Bad("precedence", {"precedence": z(B, 2, N)}, ValueError, "precedence of shape"),
    Bad("no write head", {"write_weights": z(B, 0, N)}, ValueError, "at least one head"),
    Bad("no read head", {"read_weights": z(B, 0, N)}, ValueError, "at least one head"),
    Bad("write heads", {"write_weights": z(B, 2, N)}, ValueError, "interface_weight of shape"),
    Bad("norm alone", {"norm": [z(P)]}, ValueError, "norm of 2 tensors, or none, got 1"),
    Bad("norm size", {"norm": [z(P), z(3)]}, ValueError, r"norm\[1\] of shape"),
    Bad("strength", {"strength": "exp"}, ValueError, "strength as one of"),
    Bad("allocation", {"allocation": "hard"}, ValueError, "allocation as one of"),
    Bad("floor", {"norm_floor": -1.0}, ValueError, "norm_floor >= 0"),
    Bad("floor and eps", {"norm_floor": 0.0, "eps": 0.0}, ValueError, "one > 0"),
    Bad("eps NaN", {"eps": float("nan")}, ValueError, "eps >= 0"),
    Bad("mask_min", {"mask_min": 1.0}, ValueError, "0 <= mask_min < 1, got 1"),
]


def test_unknown_words_are_refused() -> None:
    tensors, options = DNC.raw(DNC.sample(dtype=torch.float32))
    for words in ("lstm  links", "lstm linked", " lstm links", "lstm,links"):
        with pytest.raises(ValueError, match="seqmem::dnc: expected options out of squash"):
            torch.ops.seqmem.dnc(*tensors, words, *options[1:], False, False)


class TestHostile(HostileSuite):
    targets = (target(DNC, ROWS, "floor"),)
