"""Does an NTM ever come to NaN? Trains on for very many steps and looks at every one.

    python -m benchmarks.studies.ntm_endurance [--steps 100000] [--task copy] [--seed 0]

Small sizes, the whole learning rate to the end, gradients clipped as in ordinary training. Stops at
the first loss, and at the end at the first weight, that is not a finite number.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import report
from seqmem_fast.tasks import TASKS
from seqmem_fast.tasks.display import Bar
from seqmem_fast.tasks.settings import Settings
from seqmem_fast.tasks.training import Diverged, Training

SMALL: dict[str, Any] = {"batch_size": 2, "controller_size": 32, "memory_size": 16, "memory_dim": 8}


class Tireless(Training):
    """Training whose learning rate never falls."""

    def learning_rate(self) -> float:
        return self.settings.learning_rate


def main(argv: Sequence[str] | None = None) -> int:
    """0 where all stayed finite, 1 where it did not."""
    parser = report.parser("benchmarks.studies.ntm_endurance", __doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--task", choices=TASKS, default="copy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    console = report.console()
    training = Tireless(Settings(args.task, seed=args.seed, steps=args.steps, **SMALL))
    start, worst = time.perf_counter(), 0.0
    with Bar(console, training) as bar:
        while training.step_count < args.steps:
            try:
                loss, wrong = training.step()
            except Diverged as error:
                console.print(f"not finite: {error}", style="bold red")
                return 1
            worst = max(worst, loss)
            bar(training, loss, wrong)
    finite = all(bool(torch.isfinite(weight).all()) for weight in training.parameters)
    console.print(
        f"{args.steps:,} steps in {time.perf_counter() - start:.0f} s: every loss finite, the "
        f"largest {worst:.3f}, the weights at the end {'finite' if finite else 'NOT finite'}",
        highlight=False,
    )
    return 0 if finite else 1


if __name__ == "__main__":
    sys.exit(main())
