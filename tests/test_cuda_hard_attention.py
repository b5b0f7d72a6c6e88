"""Hard attention's CUDA C++: it compiles without spills, and its arithmetic is right.

As in test_cuda_lstm.py, neither needs a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_stand_in import TOLERANCES, assert_near, sources_on_cpu, spills

from seqmem_fast.reference import hard_attention as reference

pytestmark = pytest.mark.slow  # the sources are compiled first
# One action; a lane for several; rows of many blocks; more than one warp's lanes; a block a row.
SIZES = [(3, 1), (5, 7), (256, 10), (1000, 33), (2, 1500)]
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


# 4 kernels, 4 types, warps and blocks; and a sum in each type
test_compiles_without_spills = spills("hard_attention", 36)
ops = sources_on_cpu("hard_attention")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows, actions", SIZES)
def test_sample(ops: Any, rows: int, actions: int, dtype: torch.dtype) -> None:
    logits = (2 * torch.randn(rows, actions)).to(dtype)
    logits[0, : actions // 2] = float("-inf")  # of no probability, first
    uniform = torch.rand(rows, dtype=torch.promote_types(dtype, torch.float32))
    uniform[0], uniform[-1] = 0, 1 - torch.finfo(uniform.dtype).eps
    wide = logits.double().requires_grad_()
    right = reference.sample_at(wide, uniform.double())
    ours = ops.categorical_sample(logits, uniform)
    assert torch.equal(ours[0], right[0])
    for a, b in zip(ours[1:], right[1:], strict=True):
        assert_near(a, b, factor=4)
    seeds = [torch.randn(rows).to(dtype) for _ in range(2)]
    for given in ([seeds[0], seeds[1]], [seeds[0], None], [None, seeds[1]]):
        pairs = zip(right[1:], given, strict=True)
        loss = sum((a * s.double()).sum() for a, s in pairs if s is not None)
        (grad,) = torch.autograd.grad(loss, wide, retain_graph=True)
        assert_near(ops.categorical_sample_backward(*given, logits, ours[0]), grad, factor=4)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows, actions", SIZES)
def test_loss(ops: Any, rows: int, actions: int, dtype: torch.dtype) -> None:
    logits, returns, baseline = (
        torch.randn(*shape).to(dtype) for shape in ((rows, actions), (rows,), (rows,))
    )
    action = torch.randint(actions, (rows,))
    wide = logits.double().requires_grad_()
    for name, number in REDUCTIONS.items():
        for given, weight in ((None, 0.0), (baseline, 0.3), (baseline[0], 0.0)):
            right = reference.reinforce_loss(
                wide,
                action,
                returns.double(),
                None if given is None else given.double(),
                entropy_weight=weight,
                reduction=name,
            )
            args = (logits, action, returns, given, weight, number)
            ours = ops.reinforce_loss(*args)
            scale = 4 if name == "none" else 4 * rows**0.5
            assert_near(ours, right, name, scale)
            seed = torch.randn_like(ours)
            (grad,) = torch.autograd.grad(right, wide, seed.double())
            assert_near(ops.reinforce_loss_backward(seed, *args), grad, factor=4)


def test_no_rows(ops: Any) -> None:
    none = torch.empty(0)
    args = (torch.empty(0, 4), none.long(), none, None, 0.0)
    assert ops.reinforce_loss(*args, 0).shape == (0,)
    assert ops.reinforce_loss(*args, 1).isnan()
    assert ops.reinforce_loss(*args, 2) == 0
    assert ops.reinforce_loss_backward(torch.ones(()), *args, 2).shape == (0, 4)
    assert [t.numel() for t in ops.categorical_sample(args[0], none)] == [0, 0, 0]


def test_nan_stays_in_its_row(ops: Any) -> None:
    for actions in (7, 1500):
        logits = torch.randn(3, actions)
        logits[1, 2] = float("nan")
        action, *numbers = ops.categorical_sample(logits, torch.rand(3))
        assert 0 <= action.min() and action.max() < actions
        for of_row in numbers:
            assert of_row[1].isnan() and not of_row[[0, 2]].isnan().any()
