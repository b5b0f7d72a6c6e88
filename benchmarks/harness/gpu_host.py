"""The host's time of small calls on a GPU, which is what bounds them: ours beside eager torch.

    python -m benchmarks.harness.gpu_host [--rounds 5] [--calls 50] [--json PATH] [--device cpu]

Microseconds a call while the GPU works behind: the median of rounds of calls in a row, with a wait
before each round alone. A training step is a forward and a backward, with gradients of all floating
arguments. Both go through what a user calls, Python and dispatcher included; `launch` is one
in-place op of torch, for comparison.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.harness import machine, report
from benchmarks.harness.gpu import describe
from seqmem_fast import ops

CALLS = 50  # of a round: a GPU queues about a thousand launches before the host has to wait
# The op, its reference's module, the sample there, and the sample's sizes.
ROWS: tuple[tuple[str, str, str, tuple[int, ...]], ...] = (
    ("lstm_cell", "lstm", "plain", (1, 64, 64)),
    ("lstm_cell", "lstm", "plain", (16, 128, 128)),
    ("ntm_read", "ntm_addressing", "read", (16, 128, 20, 1, 3)),
    ("ntm_write", "ntm_addressing", "write", (16, 128, 20, 1, 3)),
    ("ntm_addressing", "ntm_addressing", "addressing", (16, 128, 20, 1, 3)),
    ("attention", "attention", "plain", (32, 64, 64, 64, 64)),
    ("attention", "attention", "plain", (8, 512, 512, 64, 64)),
    ("categorical_sample", "hard_attention", "sample", (256, 10)),
    ("reinforce_loss", "hard_attention", "plain", (256, 10)),
)
Call = Callable[[], Any]


def moved(a: Any, device: str, gradients: bool) -> Any:
    """The same on the device; floating tensors take gradients if any do."""
    if isinstance(a, tuple):
        return tuple(moved(b, device, gradients) for b in a)
    if not isinstance(a, Tensor):
        return a
    return a.detach().to(device).requires_grad_(gradients and a.is_floating_point())


def step(function: Callable[..., Any], *args: Any) -> Call:
    """A forward, and the backward of its first floating output."""
    wanted = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad]
    outputs = function(*args)
    if isinstance(outputs, Tensor):
        ones = torch.ones_like(outputs)
        return lambda: torch.autograd.grad(function(*args), wanted, ones, allow_unused=True)
    where = next(k for k, t in enumerate(outputs) if t.requires_grad)
    ones = torch.ones_like(outputs[where])
    return lambda: torch.autograd.grad(function(*args)[where], wanted, ones, allow_unused=True)


def calls(device: str) -> Iterator[tuple[str, str, dict[str, Call]]]:
    """Rows: their name, mode and sides."""
    one = torch.ones(1, device=device)
    yield "launch", "inference", {"ours": one.neg_, "eager": one.neg_}
    for name, module, sample, sizes in ROWS:
        reference = import_module(f"seqmem_fast.reference.{module}")
        make = getattr(reference, "cell_sample_inputs" if "cell" in name else "sample_inputs")
        args = next(s.args for s in make(sizes=sizes) if s.name == sample)
        if name == "categorical_sample":
            args = args[:1]
        # torch has the cell itself.
        peer = torch.lstm_cell if name == "lstm_cell" else getattr(reference, name)
        functions = {"ours": getattr(ops, name), "eager": peer}
        for mode in ("inference", "training step"):
            given = moved(args, device, mode != "inference")
            sides: dict[str, Call] = {}
            for side, function in functions.items():
                sides[side] = (partial if mode == "inference" else step)(function, *given)
            yield f"{name} {', '.join(map(str, sizes))}", mode, sides


def host_us(call: Call, rounds: int, calls: int) -> float:
    """Of the host's time for a call; the median over rounds."""
    call()
    times = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return 1e6 * statistics.median(times)


def measured(device: str, *counts: int) -> Iterator[dict[str, Any]]:
    """A record for each row, by so many rounds and calls."""
    for name, mode, sides in calls(device):
        yield {"row": name, "mode": mode, **{s: host_us(c, *counts) for s, c in sides.items()}}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and keeps the JSON."""
    parser = report.parser("benchmarks.harness.gpu_host", __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="for each side")
    parser.add_argument("--calls", type=int, default=CALLS, help="of a round")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "gpu_host.json")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    here = {**machine.describe(), "gpu": describe()}
    console = report.console()
    console.print(f"{here['gpu']['name']}: host us a call, ours and eager")
    results: list[dict[str, Any]] = []
    for result in measured(
        args.device, args.rounds, args.calls
    ):  # a run that is stopped loses nothing
        results.append(result)
        content = {"schema": report.SCHEMA, "job": "gpu_host", "machine": here, "results": results}
        report.write_json(args.json, content)
        ours, eager = result["ours"], result["eager"]
        label = f"{result['row']} {result['mode'].split()[0]}"
        console.print(f"{label:50} {ours:8.1f} {eager:8.1f}  {eager / ours:5.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
