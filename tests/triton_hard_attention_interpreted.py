"""Triton hard attention on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import Kernel

import seqmem_fast
from seqmem_fast._triton import hard_attention as launchers
from seqmem_fast.reference import hard_attention as reference

assert seqmem_fast.__version__
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(params=[1024, 16], ids=["one_block", "blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_BLOCK", request.param)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_sample_and_gradient(dtype: torch.dtype, block: None) -> None:
    logits = torch.randn(2, 3, 21).to(dtype)
    logits[0, 0, 3:] = float("-inf")
    exact = logits.double().requires_grad_()
    uniform = torch.rand(2, 3, dtype=torch.float64)
    uniform[0, 0], uniform[1, 1] = 0, 1 - 2.0**-20
    action, log_prob, entropy = reference.sample_at(exact, uniform)
    ours = launchers.categorical_sample(logits, uniform.to(launchers.wide(dtype)))
    assert torch.equal(ours[0], action)
    assert relative(ours[1], log_prob.detach()) <= TOLERANCES[dtype]
    assert relative(ours[2], entropy.detach()) <= TOLERANCES[dtype]
    a, b = torch.randn(2, 3).to(dtype), torch.randn(2, 3).to(dtype)
    (right,) = torch.autograd.grad((log_prob * a + entropy * b).sum(), exact)
    right = right.nan_to_num()  # where p is 0
    grad = launchers.categorical_sample_backward(a, b, logits, action)
    assert relative(grad, right) <= 10 * TOLERANCES[dtype]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss(reduction: str, block: None) -> None:
    logits = torch.randn(5, 21)
    action, returns, baseline = torch.randint(0, 21, (5,)), torch.randn(5), torch.randn(())
    exact = logits.double().requires_grad_()
    right = reference.reinforce_loss(
        exact, action, returns.double(), baseline.double(), entropy_weight=0.1, reduction=reduction
    )
    tail = (action, returns, baseline, 0.1, ["none", "mean", "sum"].index(reduction))
    assert relative(launchers.reinforce_loss(logits, *tail), right.detach()) <= 2e-6
    seed = torch.randn(right.shape)
    (expected,) = torch.autograd.grad(right, exact, seed.double())
    grad = launchers.reinforce_loss_backward(seed, logits, *tail)
    assert relative(grad, expected) <= 2e-5


def test_rows_and_checks() -> None:
    logits, uniform = torch.randn(3, 4), torch.rand(3)
    clean = launchers.categorical_sample(logits, uniform)
    logits[1, 2] = float("nan")
    action, log_prob, entropy = launchers.categorical_sample(logits, uniform)
    assert log_prob[1].isnan() and entropy[1].isnan() and 0 <= action[1] < 4
    assert torch.equal(log_prob[[0, 2]], clean[1][[0, 2]])
    assert launchers.categorical_sample(logits[:0], uniform[:0])[0].shape == (0,)
    with pytest.raises(ValueError, match="expected uniform of shape"):
        launchers.categorical_sample(logits, uniform[:2])


# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(4, 7), (256, 2000)]


def kernels() -> list[Kernel]:
    file, shape = "hard_attention", {"BLOCK": 256}
    wide = {"uniform_ptr": "*fp32", "by_log_prob_ptr": "*fp32", "by_entropy_ptr": "*fp32"}
    names = ("hard_attention_forward", "hard_attention_backward")
    return [Kernel(file, k, "bf16", 1, shape, {"action_ptr": "*i64", **wide}) for k in names]
