"""Hard attention rows: a loop over states and one batched step, side by side.

python -m benchmarks.bench_hard_attention [--threads 2] [--malloc D|M] [--rows TEXT]
"""

from __future__ import annotations

import random
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from benchmarks.harness import measure, rows
from seqmem_fast import HardAttention, ops, reinforce_train_step

LOOP = "loop over states"
LETTERS = "states, inputs, hidden, actions"
MOST = (512, 256, 256, 512)  # of a random shape


class LoopStep(nn.Module):
    """A REINFORCE step with a call of the model and of a distribution for each state."""

    def __init__(self, policy: HardAttention) -> None:
        super().__init__()
        self.policy = policy
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=1e-4)

    def forward(self, states: list[Tensor], rewards: list[float]) -> Tensor:
        log_probs = []
        for state in states:
            policy = Categorical(torch.softmax(self.policy(state), -1))
            log_probs.append(policy.log_prob(policy.sample()))
        loss = torch.stack(
            [-log_prob * reward for log_prob, reward in zip(log_probs, rewards, strict=True)]
        ).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class OurStep(LoopStep):
    """reinforce_train_step, given the same lists."""

    def forward(self, states: list[Tensor], rewards: list[float]) -> Tensor:
        return torch.tensor(reinforce_train_step(self.policy, self.optimizer, states, rewards))


class Detached(nn.Module):
    """Runs a whole training step inside a row that is timed as inference."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, states: list[Tensor], rewards: list[float]) -> Tensor:
        with torch.enable_grad():
            loss: Tensor = self.step(states, rewards)
        return loss


def step_work(states: int, inputs: int, hidden: int, actions: int) -> rows.Work:
    """A whole step, optimizer included; the two draw different actions, so nothing is compared."""
    torch.manual_seed(0)

    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        batch = torch.randn(states, inputs, generator=rng)
        return list(batch), torch.rand(states, generator=rng).tolist()

    return rows.Work(
        sample,
        Detached(OurStep(HardAttention(inputs, hidden, actions))),
        {LOOP: Detached(LoopStep(HardAttention(inputs, hidden, actions)))},
        checked=False,
    )


def eager_loss(logits: Tensor, action: Tensor, returns: Tensor, baseline: Tensor) -> Tensor:
    """The batched loss with entropy bonus, in plain PyTorch."""
    policy = Categorical(logits=logits, validate_args=False)
    return -(policy.log_prob(action) * (returns - baseline) + 0.01 * policy.entropy()).sum()


def our_loss(logits: Tensor, action: Tensor, returns: Tensor, baseline: Tensor) -> Tensor:
    """The same by the op."""
    return ops.reinforce_loss(logits, action, returns, baseline, entropy_weight=0.01)


def loss_work(count: int, actions: int, on_gpu: bool = False) -> rows.Work:
    """Loss and gradient from logits."""

    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        logits = torch.randn(count, actions, generator=rng)
        action = torch.randint(actions, (count,), generator=rng)
        return logits, action, torch.rand(count, generator=rng), torch.tensor(0.5)

    return rows.Work(
        sample,
        our_loss,
        {"eager": eager_loss},
        constants=(2, 3),
        compile_with={} if on_gpu else None,
    )


def step_row(*shape: int, goal: float | None = None) -> rows.Row:
    """A whole REINFORCE step, which takes its own gradients."""
    text, make = ", ".join(map(str, shape)), partial(step_work, *shape)
    goals = {} if goal is None else {LOOP: goal}
    return rows.Row(
        "hard_attention",
        text,
        rows.TRAINING,
        make,
        goals=goals,
        name="REINFORCE step",
        whole_step=True,
    )


def loss_rows(count: int, actions: int, on_gpu: bool = False) -> list[rows.Row]:
    """The loss alone, in both modes."""
    make = partial(loss_work, count, actions, on_gpu)
    return rows.pair("hard_attention", f"{count}, {actions}", make, name="reinforce_loss")


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """A random batch's loss in both modes."""
    count, _, _, actions = rows.draw(rng, MOST)
    return loss_rows(count, max(2, actions))


ROWS = [
    step_row(256, 64, 32, 10, goal=60),
    *loss_rows(256, 10),
    *loss_rows(4096, 100),
]
GPU_ROWS = [
    step_row(256, 64, 32, 10),
    *loss_rows(256, 10, on_gpu=True),
    *loss_rows(4096, 100, on_gpu=True),
    *loss_rows(65536, 1000, on_gpu=True),
]
test_row = measure.test_row

if __name__ == "__main__":
    sys.exit(measure.main("hard_attention", ROWS, LETTERS))
