r"""Hard attention: sampling an action from logits, and the loss of the policy gradient.

.. math::
    p = \operatorname{softmax}(z), \qquad H = -\sum_i p_i \log p_i, \qquad
    a = \min \{ i : p_1 + \dots + p_i > u \}

    L = -\log p_a \, (R - b) - w H

for logits z, a uniform number u, return R, baseline b and entropy weight w of each row.

Paper: Williams, Simple statistical gradient-following algorithms for connectionist reinforcement
learning, Machine Learning 8, 1992.

Logits are float32, float64, bfloat16 or float16, of any strides; under ``torch.autocast`` both
functions compute in float32. They are differentiable any number of times: the first derivative has
its own kernel, higher ones run in plain PyTorch. Inside a ``torch.func`` transform the whole call
runs in plain PyTorch. A NaN in a row makes that row's numbers NaN and no other's.

Raises:
    ValueError: a shape or value does not fit; the message names the argument, what was expected
        and what came.
    TypeError: a dtype, device or layout does not fit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import hard_attention as reference
from .common import by_fields, differentiate_through, fall_back
from .flops import count_products

__all__ = ["categorical_sample", "reinforce_loss"]

_REDUCTIONS = ("none", "mean", "sum")


class LossArguments(NamedTuple):
    """Of the op ``reinforce_loss``, and of its backward after the incoming gradient."""

    logits: Tensor
    action: Tensor
    returns: Tensor
    baseline: Tensor | None
    entropy_weight: float
    reduction: int


@by_fields
def _plain_loss(given: LossArguments) -> Tensor:
    kind, weight = _REDUCTIONS[given.reduction], given.entropy_weight
    return reference.reinforce_loss(*given[:4], entropy_weight=weight, reduction=kind)


_categorical_sample = fall_back("categorical_sample", reference.sample_at)
_reinforce_loss = fall_back("reinforce_loss", _plain_loss)
differentiate_through("categorical_sample", reference.policy, gradients=2)
differentiate_through("reinforce_loss", _plain_loss, gradients=1)
count_products("categorical_sample", lambda: 0)
count_products("reinforce_loss", lambda: 0)


def categorical_sample(
    logits: Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one action for each row, by the inverse of the cumulative distribution.

    Args:
        logits: [..., K], K at least 1, unnormalised. -inf stands for an action that is never
            taken; a row needs one that is finite, else it is NaN.
        generator: of the one uniform number for each row (``torch.rand``); torch's own if None.

    Returns:
        action (int64, never one of probability 0), log_prob of it and entropy, each [...]; the
        last two are differentiable with respect to logits. The action of a NaN row is some valid
        index, its log_prob and entropy are NaN.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"seqmem::categorical_sample: expected logits to be a tensor, got "
            f"{type(logits).__name__}"
        )
    with torch.no_grad():
        uniform = reference.draw_uniform(logits, generator)
    return sample_at(logits, uniform)


def sample_at(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`categorical_sample`, with the uniform numbers given.

    Args:
        logits: [..., K].
        uniform: [...], in [0, 1); float64 beside logits of float64, else float32.
    """
    return _categorical_sample(logits, uniform)


def reinforce_loss(
    logits: Tensor,
    action: Tensor | None,
    returns: Tensor,
    baseline: Tensor | float | None = None,
    *,
    entropy_weight: float = 0.0,
    reduction: str = "sum",
) -> Tensor:
    r"""The loss whose gradient is REINFORCE's: -log p_a (R - b) - w H, summed over the rows.

    Its gradient by the logits, (p - onehot(a)) (R - b) + w p (log p + H), is computed in closed
    form, in one pass. Returns and baseline are constants: a learned baseline is trained by a loss
    of its own.

    Args:
        logits: [..., K], unnormalised; or, with ``action`` None, [...]: the log-probabilities of
            actions already taken, as :func:`categorical_sample` returns them.
        action: int64 [...], 0 <= action < K; or None.
        returns: [...], of logits' dtype.
        baseline: [...] of logits' dtype, or one number for all rows, or None for zero.
        entropy_weight: w; must be 0 where ``action`` is None.
        reduction: "sum", "mean" or "none".

    Returns:
        The loss: [], or [...] with reduction "none". Differentiable with respect to logits.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"seqmem::reinforce_loss: expected reduction 'sum', 'mean' or 'none', got {reduction!r}"
        )
    if action is None:
        _check_log_prob(logits, returns, baseline, entropy_weight)
        return reference.reinforce_loss(logits, None, returns, baseline, reduction=reduction)
    code = _REDUCTIONS.index(reduction)
    constant = baseline
    if constant is not None and not isinstance(constant, Tensor):
        constant = torch.full((), constant, dtype=logits.dtype, device=logits.device)
    return _reinforce_loss(logits, action, returns, constant, entropy_weight, code)


def _check_log_prob(
    log_prob: Tensor, returns: Tensor, baseline: Tensor | float | None, entropy_weight: float
) -> None:
    """What the op checks where it is called: here plain PyTorch does the work."""
    op = "seqmem::reinforce_loss"
    if entropy_weight != 0:
        raise ValueError(f"{op}: expected action beside entropy_weight, got None")
    if not log_prob.is_floating_point():
        raise TypeError(
            f"{op}: expected log-probabilities of a floating dtype, got {log_prob.dtype}"
        )
    for name, value in (("returns", returns), ("baseline", baseline)):
        if not isinstance(value, Tensor):
            continue
        if value.dtype != log_prob.dtype or value.device != log_prob.device:
            raise TypeError(
                f"{op}: expected {name} of dtype {log_prob.dtype} on {log_prob.device}, "
                f"got {value.dtype} on {value.device}"
            )
        if value.shape != log_prob.shape and (name == "returns" or value.dim() > 0):
            raise ValueError(
                f"{op}: expected {name} of shape {list(log_prob.shape)}, got {list(value.shape)}"
            )
