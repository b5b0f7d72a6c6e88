"""The whole-sequence NTM op: the suites of machines, and edges of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hostile_suite import Bad, HostileSuite
from machine_suite import MachineSuite, target
from machines import NTM, SIZES
from op_suite import TOLERANCES, cast, compare, error, values_and_gradients
from torch import Tensor

from seqmem_fast.reference.ntm_addressing import NTMState

threaded = NTM.threaded


class TestNtmSequence(MachineSuite):
    machine = NTM
    names, all_names = ("feedforward", "all_padded"), NTM.names
    odd_sizes = (
        ("all_padded", (17, 7, 1, 13, 37, 3), {}),
        ("plain", (10, 7, 1, 13, 37, 3), {}),
        ("all_padded", (3, 5, 3, 8, 16, 4), {}),
        ("read_first", (3, 5, 3, 8, 37, 3), {}),
        ("plain", (2, 1, 5, 1, 3, 1), {}),
        ("all_padded", (2, 1, 5, 1, 3, 1), {}),
    )
    long = (1000, 2, 2, 8, 128, 20)


def distances(found: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """The largest relative distances among the outputs and among the gradients."""
    each = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    outputs = len(NTMState._fields) + 2
    return max(each[:outputs]), max(each[outputs:])


def test_long_padded_sequences_are_as_near_to_float64_as_eager() -> None:
    """Through 25 steps a rounding error grows, in any float32 arithmetic: now and then beyond the
    bounds that hold for most weights, and then in eager PyTorch as well."""
    sizes = (25, 3, 9, 24, 32, 12)
    cases = [NTM.case(NTM.sample("lengths", torch.float32, sizes, seed=k)) for k in range(4)]
    exact = [
        values_and_gradients(case.reference, cast(case.tensors, torch.float64)) for case in cases
    ]

    def farthest(side: str) -> Iterator[float]:
        """Of outputs and of gradients, over all seeds."""
        found = [values_and_gradients(getattr(case, side), case.tensors) for case in cases]
        return map(max, zip(*map(distances, found, exact), strict=True))

    bounds = (1e-5, 1e-4)
    ours = list(farthest("op"))
    if any(a > bound for a, bound in zip(ours, bounds, strict=True)):
        eager = farthest("reference")
        for a, plain, bound in zip(ours, eager, bounds, strict=True):
            assert a <= max(bound, 2 * plain)


@pytest.mark.sanitize
@pytest.mark.parametrize(("slots", "reach"), [(9, 4), (8, 4), (2, 1), (1, 0)])
def test_shift_up_to_half_the_memory(slots: int, reach: int) -> None:
    """Every slot can reach every other, the opposite one of an even number on two ways."""
    sample = NTM.sample(sizes=(4, 2, 3, 5, slots, 3))
    input, state, controller, _, _ = sample.args
    rows = 2 * (3 + 2 * reach + 4) + 2 * 3
    args = (input, state, controller, torch.randn(rows, 5).double(), torch.randn(rows).double())
    case = NTM.case(sample._replace(args=args, kwargs={"shift_range": reach}))
    compare(case.op, case.reference, case.tensors, case.tensors)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("gamma", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_memory_and_sharp_focus(gamma: float, dtype: torch.dtype) -> None:
    """An all-zero memory and keys, weightings of one slot: sums stay 1, gradients are finite."""
    sample = NTM.sample("plain", dtype, (6, 2, 3, 4, 128, 5))
    input, state, controller, head_weight, head_bias = sample.args
    head_weight, head_bias = torch.zeros_like(head_weight), torch.zeros_like(head_bias)
    for start in (0, 21):  # the heads' parts of the bias
        head_bias[start + 5 + 5] = gamma
    memory, weightings = torch.zeros_like(state.memory), torch.zeros_like(state.weightings)
    weightings[:, :, 0] = 1
    args = (input, state._replace(memory=memory, weightings=weightings), controller, head_weight)
    case = NTM.case(sample._replace(args=(*args, head_bias)))
    values = values_and_gradients(case.op, case.tensors)
    assert all(torch.isfinite(v).all() for v in values)
    torch.testing.assert_close(values[6].sum(-1), torch.ones(6, 2, 2, dtype=dtype))
    for a, b in zip(values[:7], case.reference(*case.tensors), strict=True):
        assert error(a, b) <= 20 * TOLERANCES[dtype].output  # gamma magnifies rounding


def test_empty_weightings_stay_empty() -> None:
    """Weightings of zeros that only the previous step feeds give zeros, not NaN."""
    sample = NTM.sample()
    input, state, controller, head_weight, head_bias = sample.args
    head_weight, head_bias = torch.zeros_like(head_weight), torch.zeros_like(head_bias)
    for start in (0, 21):
        head_bias[start + 6] = -1e4  # the gate is 0
    args = (input, state._replace(weightings=torch.zeros_like(state.weightings)), controller)
    case = NTM.case(sample._replace(args=(*args, head_weight, head_bias)))
    values = values_and_gradients(case.op, case.tensors)
    assert not values[6].any()
    assert all(torch.isfinite(v).all() for v in values)


# ---- wrong arguments: always the same clear exception, never a crash

z = torch.zeros
T, B, _, C, N, M = SIZES
ROWS = [
    Bad("weightings heads", {"weightings": z(B, 1, N)}, ValueError, "weightings of shape"),
    Bad("heads empty", {"heads": ""}, ValueError, "heads to be a string of 'w' and 'r'"),
    Bad("heads unknown", {"heads": "wx"}, ValueError, "'wx'"),
    Bad("heads longer", {"heads": "wrr"}, ValueError, "head_weight of shape"),
    Bad("shift negative", {"shift_range": -1}, ValueError, "shift_range"),
    Bad("shift too wide", {"shift_range": 6}, ValueError, r"0\.\.5 for 10 slots, got 6"),
    Bad("shift huge", {"shift_range": 2**62}, ValueError, "shift_range"),
]


class TestHostile(HostileSuite):
    targets = (target(NTM, ROWS, "heads unknown", "shift negative"),)
