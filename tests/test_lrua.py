"""The op of least recently used access: the suites of machines, ties, and edges of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hostile_suite import Bad, HostileSuite
from machine_suite import MachineSuite, initial, target
from machines import LRUA, SIZES
from op_suite import check_same_bits_at_any_thread_count, compare, error, values_and_gradients
from torch import Tensor

from seqmem_fast import ops
from seqmem_fast.reference import lrua as reference
from seqmem_fast.reference.lrua import LRUAState, LRUATrace

threaded = LRUA.threaded


class TestLrua(MachineSuite):
    machine = LRUA
    names = ("many_heads", "feedforward", "all_padded")
    odd_sizes = (
        ("plain", (17, 7, 1, 13, 37, 3), {"heads": 7}),  # several segments; two groups of heads
        ("all_padded", (17, 7, 1, 13, 37, 3), {"heads": 3}),
        ("plain", (3, 5, 3, 8, 16, 4), {"heads": 1}),
        ("plain", (4, 2, 3, 5, 3, 2), {"heads": 3}),  # as many slots as heads
        ("many_heads", (4, 2, 3, 5, 5, 2), {"heads": 5}),
        ("plain", (3, 2, 5, 1, 1, 1), {"heads": 1}),  # one slot of one value
        ("plain", (10, 2, 3, 6, 128, 40), {"heads": 4}),
    )
    long = (1000, 2, 2, 8, 128, 20)


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
    sample = LRUA.sample("many_heads" if erase_all else "plain", torch.float64, (1, 2, 3, 4, 8, 3))
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
    sample = LRUA.sample("plain", dtype, (12, 3, 4, 6, 37, 5), heads=3)
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
    sample = LRUA.sample()
    state = LRUAState(*(t.requires_grad_() for t in sample.args[1]))
    args = (sample.args[0], state, *sample.args[2:])
    features, final, trace = ops.lrua_trace(*args)
    assert not final.usage.requires_grad and not trace.usage.requires_grad
    assert trace.write_weights.requires_grad and trace.read_weights.requires_grad
    again, _ = ops.lrua(*args[:1], final, *args[2:])
    (features.sum() + again.sum()).backward()
    assert state.usage.grad is None and state.memory.grad is not None


def test_a_trace_changes_nothing() -> None:
    sample = LRUA.sample("all_padded", torch.float32)
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
    sample = LRUA.sample("plain", dtype, (4, 2, 3, 4, 40, 5))
    input, state, controller, head_weight, head_bias = sample.args
    zeros = torch.zeros_like(head_weight), torch.zeros_like(head_bias)
    state = state._replace(memory=torch.zeros_like(state.memory))
    case = LRUA.case(sample._replace(args=(input, state, controller, *zeros)))
    values = values_and_gradients(case.op, case.tensors)
    assert all(torch.isfinite(v).all() for v in values)
    torch.testing.assert_close(values[-len(values) :][7], torch.full_like(values[7], 1 / 40))
    compare(case.op, case.reference, case.tensors, case.tensors)


def test_large_work_on_any_number_of_threads(restored_threads: None) -> None:
    case = LRUA.case(LRUA.sample("all_padded", torch.float32, (12, 19, 5, 40, 70, 20)))
    check_same_bits_at_any_thread_count(case)


def test_nan_in_a_usage_stays_in_its_row() -> None:
    sample = LRUA.sample()
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


# ---- wrong arguments: always the same clear exception, never a crash

z = torch.zeros
T, B, _, C, N, M = SIZES
R = 2
ROWS = [
    Bad("usage slots", {"usage": z(B, 9)}, ValueError, r"usage of shape \[3, 10\]"),
    Bad("usage heads", {"usage": z(B, R, N)}, ValueError, "usage of shape"),
    Bad("weights 2-D", {"read_weights": z(B, N)}, ValueError, "read_weights with 3 dimensions"),
    Bad("no heads", {"read_weights": z(B, 0, N)}, ValueError, r"1\.\.10 heads .* got 0"),
    Bad("too many heads", {"read_weights": z(B, 11, N)}, ValueError, r"1\.\.10 heads .* got 11"),
    Bad("heads", {"read_weights": z(B, 3, N)}, ValueError, "head_weight of shape"),
    Bad("weights slots", {"read_weights": z(B, R, 9)}, ValueError, "read_weights of shape"),
    Bad("strength alone", {"strength": True}, ValueError, r"head_weight of shape \[24, 6\]"),
    Bad("key alone", {"add": "key"}, ValueError, r"head_weight of shape \[12, 6\]"),
    Bad("add", {"add": "both"}, ValueError, "add 'own' or 'key', got 'both'", False, True),
    Bad("gamma negative", {"gamma": -0.1}, ValueError, r"gamma in 0\.\.1, got -0\.1"),
    Bad("gamma large", {"gamma": 1.5}, ValueError, r"gamma in 0\.\.1"),
    Bad("gamma NaN", {"gamma": float("nan")}, ValueError, r"gamma in 0\.\.1"),
    Bad(
        "initial usage",
        {"initial": initial(LRUA, usage=z(B, N))},
        ValueError,
        "initial.usage of shape",
    ),
]


class TestHostile(HostileSuite):
    targets = (target(LRUA, ROWS, "too many heads", "gamma negative"),)
