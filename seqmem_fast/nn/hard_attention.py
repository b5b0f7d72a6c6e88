"""Hard attention: a policy over locations, and one step of REINFORCE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops

__all__ = ["HardAttention", "MovingAverageBaseline", "discounted_returns", "reinforce_train_step"]


class HardAttention(nn.Module):
    """A policy that looks at one of several locations.

    Parameters: policy_net.0, a Linear layer from ``input_dim`` to ``hidden_dim``, and, after a
    ReLU, policy_net.2, one from there to ``num_locations``.

    Calling it as ``module(x)``: x [..., input_dim] -> logits [..., num_locations].
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        num_locations: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"input_dim": input_dim, "hidden_dim": hidden_dim, "num_locations": num_locations}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool):
                kind = type(size).__name__
                raise TypeError(f"seqmem::hard_attention: expected {name} to be an int, got {kind}")
            if size <= 0:
                raise ValueError(f"seqmem::hard_attention: expected {name} > 0, got {size}")
        super().__init__()
        self.num_locations = num_locations
        self.policy_net = nn.Sequential(
            nn.Linear(input_dim, hidden_dim, device=device, dtype=dtype),
            nn.ReLU(),
            nn.Linear(hidden_dim, num_locations, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.policy_net(x)
        return logits

    def select_action(
        self, state: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """A location for each state [..., input_dim]: (action int64, log_prob), each [...].

        log_prob is differentiable with respect to the parameters.
        """
        action, log_prob, _ = ops.categorical_sample(self(state), generator=generator)
        return action, log_prob


class MovingAverageBaseline:
    """The average return of the steps so far, the latest weighing most: a baseline that learns.

    Args:
        momentum: how much of the average each step keeps, 0 <= momentum < 1.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"seqmem::hard_attention: expected 0 <= momentum < 1, got {momentum}")
        self.momentum = momentum
        self.value: float | None = None  # None before the first step

    def update(self, returns: Tensor) -> None:
        """Take in the mean of a step's returns; the first one is the average so far."""
        if returns.numel() == 0:
            raise ValueError(
                "MovingAverageBaseline: expected at least one return, "
                f"got shape {list(returns.shape)}"
            )
        mean = float(returns.mean(dtype=torch.float64))
        if self.value is not None:
            mean = self.momentum * self.value + (1 - self.momentum) * mean
        self.value = mean

    def __repr__(self) -> str:
        return f"MovingAverageBaseline(momentum={self.momentum}, value={self.value})"


def reinforce_train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    states: Tensor | Sequence[Tensor],
    rewards: Tensor | Sequence[float],
    *,
    baseline: Tensor | float | MovingAverageBaseline | None = None,
    entropy_weight: float = 0.0,
    generator: torch.Generator | None = None,
) -> float:
    r"""One REINFORCE update: sample an action in each state and step along the gradient.

    The loss is :math:`\sum_t -\log \pi(a_t | s_t) (R_t - b_t) - w H_t`; all states go through the
    model in one call, and the gradient with respect to the logits is computed in closed form
    (:func:`seqmem_fast.ops.reinforce_loss`).

    Args:
        model: from states to logits over the actions; HardAttention, or any other module.
        optimizer: over its parameters; its gradients are cleared first.
        states: T tensors of one shape, or one tensor [T, ...].
        rewards: T numbers, R_t; for rewards to go see :func:`discounted_returns`.
        baseline: b: numbers [T] or one for all, or a :class:`MovingAverageBaseline`, which is read
            first (as zero at its first step) and then updated; None for zero.
        entropy_weight: w >= 0 keeps the policy from settling too early.
        generator: of the actions; torch's own if None.

    Returns:
        The loss, as a number.

    Raises:
        ValueError: states and rewards do not fit each other. TypeError: a type does not fit.
    """
    if entropy_weight < 0:
        raise ValueError(
            f"seqmem::reinforce_train_step: expected entropy_weight >= 0, got {entropy_weight}"
        )
    batch = _stacked(states)
    logits = model(batch)
    returns = torch.as_tensor(rewards, dtype=logits.dtype, device=logits.device)
    if returns.shape != logits.shape[:-1]:
        raise ValueError(
            "seqmem::reinforce_train_step: expected rewards of shape "
            f"{list(logits.shape[:-1])}, one for each state, got {list(returns.shape)}"
        )
    with torch.no_grad():
        action, _, _ = ops.categorical_sample(logits, generator=generator)
    constant = baseline.value if isinstance(baseline, MovingAverageBaseline) else baseline
    if isinstance(constant, Tensor):
        constant = constant.to(logits)
    loss = ops.reinforce_loss(logits, action, returns, constant, entropy_weight=entropy_weight)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if isinstance(baseline, MovingAverageBaseline):
        baseline.update(returns)
    return loss.item()


def discounted_returns(
    rewards: Tensor | Sequence[float], gamma: float, *, ends: Tensor | None = None
) -> Tensor:
    r"""Rewards to go: :math:`R_t = r_t + \gamma R_{t+1}`, from the last step to the first.

    Args:
        rewards: [T] or [T, ...], time first; floating, or numbers that become float32.
        gamma: 0 <= gamma <= 1.
        ends: bool, shaped as rewards: true where an episode ends with step t, so that nothing of
            what follows is counted.

    Returns:
        The returns, shaped as rewards; differentiable with respect to them.

    Raises:
        ValueError: gamma or a shape does not fit. TypeError: a dtype does not.
    """
    r = torch.as_tensor(rewards)
    r = r if r.is_floating_point() else r.to(torch.get_default_dtype())
    if not 0 <= gamma <= 1:
        raise ValueError(f"seqmem::discounted_returns: expected 0 <= gamma <= 1, got {gamma}")
    if r.dim() == 0:
        raise ValueError("seqmem::discounted_returns: expected rewards of shape [T, ...], got []")
    if ends is not None:
        if ends.dtype != torch.bool:
            raise TypeError(
                f"seqmem::discounted_returns: expected ends of dtype bool, got {ends.dtype}"
            )
        if ends.shape != r.shape:
            raise ValueError(
                f"seqmem::discounted_returns: expected ends of shape {list(r.shape)}, "
                f"got {list(ends.shape)}"
            )
    if r.size(0) == 0:
        return r.clone()
    steps = list(r.unbind(0))
    for t in range(len(steps) - 2, -1, -1):
        later = gamma * steps[t + 1]
        steps[t] = steps[t] + (later if ends is None else later.masked_fill(ends[t], 0))
    return torch.stack(steps)


def _stacked(states: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(states, Tensor):
        return states
    if not isinstance(states, Sequence) or not all(isinstance(s, Tensor) for s in states):
        raise TypeError(
            "seqmem::reinforce_train_step: expected states to be a tensor or a sequence of "
            f"tensors, got {type(states).__name__}"
        )
    if not states:
        raise ValueError("seqmem::reinforce_train_step: expected at least one state, got none")
    shapes = {tuple(s.shape) for s in states}
    if len(shapes) > 1:
        raise ValueError(
            f"seqmem::reinforce_train_step: expected states of one shape, got {sorted(shapes)}"
        )
    return torch.stack(tuple(states))
