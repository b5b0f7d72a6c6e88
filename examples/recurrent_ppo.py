"""A pole balanced by memory: recurrent PPO of sb3-contrib, as it is and accelerated, side by side.

    python examples/recurrent_ppo.py [--seed 0] [--steps 81920] [--envs 4] [--threads 1]

CartPole shows where the cart and the pole are, not how fast they move: the velocities are hidden,
so that a policy must remember. Two models of the same seed learn in turns, a rollout each, so that
whatever else the computer does slows both alike: one as sb3-contrib makes it, one after
``seqmem_fast.integrations.sb3.accelerate``. Each keeps its own random numbers; until rounding makes
the first action differ, they are the same training. The picture shows the reward over the steps,
and over the seconds that each took.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from seqmem_fast.integrations import sb3

HIDDEN, ROLLOUT, EPISODES = 64, 128, 40  # EPISODES: over which rewards are averaged
SOLVED = 475.0  # of 500, as gymnasium says


class Positions(gym.Wrapper):  # type: ignore[misc, unused-ignore]
    """CartPole without its velocities; angle and reward are scaled to fit the networks."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def seen(self, state: Any) -> Any:
        return (state[[0, 2]] * np.array([1.0, 5.0])).astype(np.float32)

    def reset(self, **options: Any) -> Any:
        state, info = self.env.reset(**options)
        return self.seen(state), info

    def step(self, action: Any) -> Any:
        state, reward, ended, cut, info = self.env.step(action)
        return self.seen(state), float(reward) * 0.1, ended, cut, info


@dataclass
class Learner:
    """A model, what it took, and its random numbers while the other one learns."""

    name: str
    model: Any
    seconds: float = 0.0
    curve: list[tuple[int, float, float]] = field(default_factory=list)  # steps, seconds, reward
    rng: Any = None

    @classmethod
    def start(cls, name: str, envs: int, seed: int) -> Learner:
        env = make_vec_env("CartPole-v1", envs, seed=seed, wrapper_class=Positions)
        model = RecurrentPPO(
            "MlpLstmPolicy",
            env,
            learning_rate=1e-3,
            n_steps=ROLLOUT,
            batch_size=256,
            gamma=0.98,
            seed=seed,
            policy_kwargs={"lstm_hidden_size": HIDDEN, "net_arch": [64]},
            stats_window_size=EPISODES,
            device="cpu",
        )
        return cls(name, model, rng=(torch.get_rng_state(), np.random.get_state()))

    def rollout(self) -> None:
        """Acts for a while and learns from it."""
        torch.set_rng_state(self.rng[0])
        np.random.set_state(self.rng[1])
        started = time.perf_counter()
        self.model.learn(ROLLOUT * self.model.n_envs, reset_num_timesteps=False)
        self.seconds += time.perf_counter() - started
        self.rng = torch.get_rng_state(), np.random.get_state()
        rewards = [episode["r"] for episode in self.model.ep_info_buffer]
        if rewards:
            self.curve.append((self.model.num_timesteps, self.seconds, float(np.mean(rewards))))

    @property
    def solved(self) -> int | None:
        """After how many steps."""
        return next((steps for steps, _, reward in self.curve if reward >= SOLVED), None)

    @property
    def speed(self) -> float:
        """Steps a second, of all environments together."""
        return float(self.model.num_timesteps / self.seconds)

    def examine(self, episodes: int = 20) -> float:
        """The mean reward of fresh episodes, the likeliest action taken."""
        env = make_vec_env("CartPole-v1", 1, seed=10**6, wrapper_class=Positions)
        return float(np.mean(evaluate_policy(self.model, env, n_eval_episodes=episodes)[0]))


def train(learners: Sequence[Learner], steps: int, bar: Progress) -> None:
    """In turns, a rollout each, until both have solved it or have had their steps."""
    tasks: dict[str, TaskID] = {
        each.name: bar.add_task(each.name, total=steps, speed=0.0, reward=0.0) for each in learners
    }
    while learners[0].model.num_timesteps < steps and not all(each.solved for each in learners):
        for each in learners:
            each.rollout()
            bar.update(
                tasks[each.name],
                completed=each.model.num_timesteps,
                speed=each.speed,
                reward=each.curve[-1][-1] if each.curve else 0.0,
            )


def picture(learners: Sequence[Learner], out: Path) -> None:
    """The rewards over steps, and over the time that they took."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    over_steps, over_time = figure.subplots(1, 2, sharey=True)
    for each, colour, width in zip(learners, ("#8a8a8a", "#e07a3f"), (3.5, 1.5), strict=True):
        steps, seconds, rewards = np.array(each.curve).T
        label = f"{each.name}: {each.speed:,.0f} steps/s"
        over_steps.plot(steps, rewards, color=colour, lw=width, label=each.name)
        over_time.plot(seconds, rewards, color=colour, lw=width, label=label)
    for axes, text in ((over_steps, "steps"), (over_time, "seconds")):
        axes.axhline(SOLVED, color="black", lw=0.7, ls=":")
        axes.set_xlabel(text)
        axes.set_ylim(0, 510)
        axes.set_xlim(0)
        axes.legend(loc="lower right", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    over_steps.set_ylabel(f"reward, last {EPISODES} episodes")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main(argv: Sequence[str] | None = None) -> list[Learner]:
    """Trains both, prints what was reached, draws the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=81920)
    parser.add_argument("--envs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="more do not help at this size")
    parser.add_argument("--out", type=Path, default=Path("docs/images/recurrent_ppo.png"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console()
    learners = [Learner.start(name, args.envs, args.seed) for name in ("sb3", "accelerated")]
    console.print(sb3.accelerate(learners[1].model), highlight=False)
    columns = TextColumn("{task.description:<12}"), BarColumn()
    shown = TextColumn("{task.fields[speed]:,.0f} steps/s, reward {task.fields[reward]:.0f}")
    with Progress(*columns, shown, TimeElapsedColumn(), console=console) as bar:
        train(learners, args.steps, bar)
    plain, ours = learners
    for each in learners:
        solved = f"solved after {each.solved:,} steps" if each.solved else "not solved"
        console.print(
            f"{each.name}: {each.speed:,.0f} steps/s; {solved}; "
            f"reward of fresh episodes {each.examine():.0f}",
            highlight=False,
        )
    console.print(f"accelerated is {ours.speed / plain.speed:.1f} times as fast", highlight=False)
    picture(learners, args.out)
    console.print(f"picture: {args.out}", highlight=False)
    return learners


if __name__ == "__main__":
    main()
