"""Does a DNC ever come to NaN? Trains repeat copy for very many steps and looks at every one.

    python -m benchmarks.studies.dnc_endurance [--steps 100000] [--variant paper] [--log FILE]

The training that DeepMind's code comes with: 4 bits, length 1 to 2, 1 to 2 copies, 16 rows, 16
slots of 16, 4 read heads, an LSTM of 64, RMSprop at 1e-4 with epsilon 1e-10, gradient norm at most
50; from zeros, where other programs report NaN. Stops at the first loss or gradient, and at the end
at the first weight, that is not a finite number. --log keeps a line of every thousand steps.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import seqmem_fast as sf
from benchmarks.harness import report
from seqmem_fast.tasks.repeat_copy import RepeatCopyTask
from seqmem_fast.tasks.task import loss_of

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "csordas": {"masks": True, "deallocate": True, "sharpen": True},
    "franke": {"links": False, "layer_norm": True, "bypass_dropout": 0.1},
    "softmax": {"allocation": "softmax"},
    "plain_norms": {"norm_floor": 0.0, "strength": "softplus", "usage_gradient": True},
}
TASK = RepeatCopyTask(bits=4, max_length=2, max_repeats=2)


def train(dnc: nn.Module, batch_size: int, seed: int, rate: float) -> Iterator[tuple[float, float]]:
    """Loss and norm of the gradient, step after step without end."""
    parameters = list(dnc.parameters())
    optimizer = torch.optim.RMSprop(parameters, rate, eps=1e-10)
    generator = torch.Generator().manual_seed(seed)
    while True:
        batch = TASK.batch(batch_size, generator, **TASK.draw(generator))
        loss = loss_of(dnc(batch.input)[0], batch)
        optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, 50.0))
        optimizer.step()
        yield loss.item(), norm


def main(argv: Sequence[str] | None = None) -> int:
    """0 where all stayed finite, 1 where it did not."""
    parser = report.parser("benchmarks.studies.dnc_endurance", __doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--variant", choices=VARIANTS, default="paper")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path)
    args = parser.parse_args(argv)
    console = report.console()
    torch.manual_seed(args.seed)
    sizes = TASK.input_size, TASK.output_size, 64, 16, 16
    dnc = sf.DNC(*sizes, read_heads=4, **VARIANTS[args.variant])
    start, largest, losses = time.perf_counter(), 0.0, []

    def say(line: str) -> None:
        console.print(line, highlight=False)
        if args.log:
            with args.log.open("a") as log:
                log.write(f"{line}\n")

    for step, (loss, norm) in enumerate(train(dnc, 16, args.seed, args.learning_rate), 1):
        if not math.isfinite(loss) or not math.isfinite(norm):
            say(f"not finite at step {step:,}: loss {loss}, norm of the gradient {norm}")
            return 1
        losses.append(loss)
        largest = max(largest, norm)
        if step % 1000 == 0 or step == args.steps:
            seconds = time.perf_counter() - start
            mean = sum(losses) / len(losses)
            say(f"{step:,} steps, {seconds:.0f} s: loss {mean:.4f}, largest gradient {largest:.2f}")
            losses.clear()
        if step == args.steps:
            break
    finite = all(bool(torch.isfinite(weight).all()) for weight in dnc.parameters())
    say(
        f"{args.variant}: {args.steps:,} steps, every loss and gradient finite, the weights at the "
        f"end {'finite' if finite else 'NOT finite'}"
    )
    return 0 if finite else 1


if __name__ == "__main__":
    sys.exit(main())
