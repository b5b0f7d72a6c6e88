r"""Hard attention in plain PyTorch: sampling, and the policy gradient's loss, beside the formulas.

.. math::
    p = \operatorname{softmax}(z), \qquad H = -\sum_i p_i \log p_i, \qquad
    a = \min \{ i : p_1 + \dots + p_i > u \}

    L = -\log p_a \, (R - b) - w H

for logits z, a uniform number u, return R, baseline b and entropy weight w of each row. REINFORCE:
Williams, Simple statistical gradient-following algorithms for connectionist reinforcement learning,
Machine Learning 8, 1992.

Everything here works under ``torch.func`` and any order of derivative; nothing here is fast.
Arguments are not checked: the ops do that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .common import Draw, Sample, samples


def categorical_sample(
    logits: Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [..., K] -> action (int64), log_prob, entropy, each [...]."""
    return sample_at(logits, draw_uniform(logits, generator))


def draw_uniform(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One number in [0, 1) for each row, of the type that the arithmetic is done in."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.rand(logits.shape[:-1], generator=generator, dtype=dtype, device=logits.device)


def sample_at(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sample that the given uniform numbers [...] lead to."""
    p = torch.softmax(logits.detach(), -1)
    reached = p.cumsum(-1)
    target = uniform.to(p.dtype) * reached[..., -1]
    passed = (reached > target[..., None]) & (p > 0)
    # The first that passes; the last with any probability where rounding lets none pass.
    index = torch.arange(p.size(-1), device=p.device)
    last = torch.where(p > 0, index, 0).amax(-1)
    action = torch.where(passed.any(-1), passed.to(torch.uint8).argmax(-1), last)
    return action, *policy(logits, action)


def reinforce_loss(
    logits: Tensor,
    action: Tensor | None,
    returns: Tensor,
    baseline: Tensor | float | None = None,
    *,
    entropy_weight: float = 0.0,
    reduction: str = "sum",
) -> Tensor:
    """logits [..., K] (log-probabilities [...] without action) -> the loss, summed or [...]."""
    advantage = returns.detach()
    if baseline is not None:
        advantage = advantage - (
            baseline.detach() if isinstance(baseline, Tensor) else torch.as_tensor(baseline)
        ).to(advantage.dtype)
    if action is None:
        loss = -logits * advantage
    else:
        log_prob, entropy = policy(logits, action)
        loss = -log_prob * advantage
        if entropy_weight != 0:
            loss = loss - entropy_weight * entropy
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


def policy(logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """log_prob and entropy; an action of probability 0 adds nothing to the entropy."""
    log_p = torch.log_softmax(logits, -1)
    p = torch.softmax(logits, -1)
    finite = log_p.masked_fill(p == 0, 0)
    entropy = -(p * finite).sum(-1)
    return log_p.gather(-1, action[..., None]).squeeze(-1), entropy


@samples(4, 7)
def sample_inputs(draw: Draw, sizes: Sequence[int]) -> Iterator[Sample]:
    """Calls that reach every option of :func:`reinforce_loss` and :func:`sample_at` once;
    sizes = (rows, K)."""
    rows, actions = sizes
    action = draw.whole(0, actions, rows).to(draw.device)
    logits, returns, baseline = draw(rows, actions), draw(rows), draw(rows)
    uniform = torch.rand(rows, generator=draw.generator, dtype=torch.float64)
    mean, each = {"reduction": "mean"}, {"reduction": "none", "entropy_weight": 0.3}
    yield Sample("plain", (logits, action, returns), function="reinforce_loss")
    yield Sample("mean", (logits, action, returns, baseline), mean, "reinforce_loss")
    yield Sample("rows", (logits, action, returns, baseline[0]), each, "reinforce_loss")
    if draw.dtype != torch.float64:
        uniform = uniform.float()
    yield Sample("sample", (logits, uniform.to(draw.device)), function="sample_at")
