r"""Hard attention on GPU: launchers of `categorical_sample`, `reinforce_loss` and their backwards.

Formulas, shapes and errors: `ops/hard_attention.py`. A program a row: softmax, its entropy and the
inverse of the cumulative distribution in one kernel, the gradient in another; the loss' arithmetic
on one number a row is torch's. Actions are not checked here, which would wait for the GPU: one out
of range gives NaN.

Where the package was built with nvcc, csrc/cuda/hard_attention.cpp runs in their place.

State of proof: as in lstm.py.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.hard_attention import LossArguments
from .common import accumulator, launcher, next_power_of_2, wide

_BLOCK = 1024
_MEAN, _SUM = 1, 2  # reductions, as csrc/ops/hard_attention.cpp has them


@triton.jit
def _logits(ptr, n, count, ACC: tl.constexpr):
    return tl.load(ptr + n, mask=n < count, other=float("-inf")).to(ACC)


@triton.jit
def _normalizer(ptr, count, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Largest logit m, sum z of exp(x - m), and entropy of a row."""
    m = tl.max(tl.full([BLOCK], float("-inf"), ACC), axis=0)
    for start in range(0, count, BLOCK):
        m = tl.maximum(m, tl.max(_logits(ptr, start + tl.arange(0, BLOCK), count, ACC), axis=0))
    z = tl.sum(tl.zeros([BLOCK], ACC), axis=0)
    mean = z
    for start in range(0, count, BLOCK):
        x = _logits(ptr, start + tl.arange(0, BLOCK), count, ACC) - m
        e = tl.exp(x)
        # Also where m is -inf or a logit NaN: e is NaN there, and so is all that follows.
        e = tl.where(start + tl.arange(0, BLOCK) < count, e, 0.0)
        z += tl.sum(e, axis=0)
        mean += tl.sum(tl.where(e == 0.0, 0.0, e * x), axis=0)
    return m, z, tl.log(z) - mean / z


@triton.jit
def hard_attention_forward(
    logits_ptr,  # [rows, K]
    uniform_ptr,  # [rows] wide, or None: the actions are given
    action_ptr,  # [rows] int64
    log_prob_ptr,  # [rows]
    entropy_ptr,  # [rows]
    count,  # K
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * count
    m, z, entropy = _normalizer(logits_ptr, count, ACC, BLOCK)
    if uniform_ptr is not None:
        target = tl.load(uniform_ptr + row) * z
        reached = z * 0.0
        action = count
        last = 0
        for start in range(0, count, BLOCK):
            n = start + tl.arange(0, BLOCK)
            e = tl.exp(_logits(logits_ptr, n, count, ACC) - m)
            e = tl.where(n < count, e, 0.0)
            passed = (reached + tl.cumsum(e, 0) > target) & (e > 0.0)
            action = tl.minimum(action, tl.min(tl.where(passed, n, count), axis=0))
            last = tl.maximum(last, tl.max(tl.where(e > 0.0, n, 0), axis=0))
            reached += tl.sum(e, axis=0)
        # Where rounding lets none pass, the last with any probability.
        action = tl.where(action < count, action, last).to(tl.int64)
        tl.store(action_ptr + row, action)
    else:
        action = tl.load(action_ptr + row)
    known = (action >= 0) & (action < count)
    x = tl.load(logits_ptr + action, mask=known, other=float("nan")).to(ACC)
    tl.store(log_prob_ptr + row, (x - m - tl.log(z)).to(log_prob_ptr.dtype.element_ty))
    tl.store(entropy_ptr + row, entropy.to(entropy_ptr.dtype.element_ty))


@triton.jit
def hard_attention_backward(
    logits_ptr,  # [rows, K]
    action_ptr,  # [rows] int64
    by_log_prob_ptr,  # [rows] wide
    by_entropy_ptr,  # [rows] wide
    grad_ptr,  # [rows, K]
    count,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """by_log_prob (onehot - p) - by_entropy p (log p + H)."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * count
    m, z, entropy = _normalizer(logits_ptr, count, ACC, BLOCK)
    action = tl.load(action_ptr + row)
    by_log_prob = tl.load(by_log_prob_ptr + row)
    by_entropy = tl.load(by_entropy_ptr + row)
    for start in range(0, count, BLOCK):
        n = start + tl.arange(0, BLOCK)
        x = _logits(logits_ptr, n, count, ACC) - m
        p = tl.exp(x) / z
        log_p = tl.where(p == 0.0, 0.0, x - tl.log(z))
        chosen = tl.where(n == action, 1.0, 0.0)
        grad = by_log_prob * (chosen - p) - by_entropy * p * (log_p + entropy)
        tl.store(grad_ptr + row * count + n, grad.to(grad_ptr.dtype.element_ty), mask=n < count)


def _forward(
    logits: Tensor, uniform: Tensor | None, action: Tensor, log_prob: Tensor, entropy: Tensor
) -> None:
    count = logits.shape[-1]
    if action.numel() == 0:
        return
    hard_attention_forward[(action.numel(),)](
        logits_ptr=logits.contiguous(),
        uniform_ptr=None if uniform is None else uniform.contiguous(),
        action_ptr=action,
        log_prob_ptr=log_prob,
        entropy_ptr=entropy,
        count=count,
        ACC=accumulator(logits.dtype),
        BLOCK=min(_BLOCK, max(16, next_power_of_2(count))),
        num_warps=4 if count > 256 else 1,
    )


def _gradient(logits: Tensor, action: Tensor, by_log_prob: Tensor, by_entropy: Tensor) -> Tensor:
    count = logits.shape[-1]
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if action.numel():
        hard_attention_backward[(action.numel(),)](
            logits_ptr=logits.contiguous(),
            action_ptr=action.contiguous(),
            by_log_prob_ptr=by_log_prob.contiguous(),
            by_entropy_ptr=by_entropy.contiguous(),
            grad_ptr=grad,
            count=count,
            ACC=accumulator(logits.dtype),
            BLOCK=min(_BLOCK, max(16, next_power_of_2(count))),
            num_warps=4 if count > 256 else 1,
        )
    return grad


@launcher
def categorical_sample(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`seqmem::categorical_sample` on GPU."""
    rows = logits.shape[:-1]
    action = logits.new_empty(rows, dtype=torch.int64)
    log_prob, entropy = logits.new_empty(rows), logits.new_empty(rows)
    _forward(logits, uniform, action, log_prob, entropy)
    return action, log_prob, entropy


@launcher
def categorical_sample_backward(
    grad_log_prob: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, action: Tensor
) -> Tensor:
    """`seqmem::categorical_sample_backward` on GPU."""
    dtype = wide(logits.dtype)
    zero = logits.new_zeros(action.shape, dtype=dtype)
    by_log_prob, by_entropy = (
        zero if g is None else g.to(dtype) for g in (grad_log_prob, grad_entropy)
    )
    return _gradient(logits, action, by_log_prob, by_entropy)


def _advantage(returns: Tensor, baseline: Tensor | None) -> Tensor:
    advantage = returns.to(wide(returns.dtype))
    return advantage if baseline is None else advantage - baseline.to(advantage.dtype)


@launcher
def reinforce_loss(given: LossArguments) -> Tensor:
    """`seqmem::reinforce_loss` on GPU."""
    logits, action, returns, baseline, entropy_weight, reduction = given
    log_prob = logits.new_empty(logits.shape[:-1], dtype=wide(logits.dtype))
    entropy = torch.empty_like(log_prob)
    _forward(logits, None, action.contiguous(), log_prob, entropy)
    loss = -log_prob * _advantage(returns, baseline)
    if entropy_weight != 0:
        loss = loss - entropy_weight * entropy
    if reduction == _SUM:
        loss = loss.sum()
    elif reduction == _MEAN:
        loss = loss.mean()
    return loss.to(logits.dtype)


@launcher
def reinforce_loss_backward(grad_loss: Tensor, given: LossArguments) -> Tensor:
    """`seqmem::reinforce_loss_backward` on GPU."""
    logits, action, returns, baseline, entropy_weight, reduction = given
    grad = grad_loss.to(wide(logits.dtype))
    if reduction == _MEAN:
        grad = grad / max(action.numel(), 1)
    grad = grad.expand(action.shape)
    return _gradient(logits, action, -_advantage(returns, baseline) * grad, -entropy_weight * grad)
