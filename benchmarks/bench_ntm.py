"""NTM rows: whole sequences and single functionals, beside vectorised eager PyTorch.

python -m benchmarks.bench_ntm [--threads 2] [--malloc D|M] [--rows TEXT]
"""

from __future__ import annotations

import random
import sys
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import measure, rows
from benchmarks.peers import ntm as peers
from benchmarks.peers.jax_scan import JAX, jax_scan
from seqmem_fast import NTM, NTMState, ops
from seqmem_fast.reference import ntm as sequence
from seqmem_fast.reference import ntm_addressing as steps

LETTERS = "T, B, N, M, C of a sequence; B, N, M of a single step"
INPUT = 9  # bits of the copy task, and its delimiter
MOST = (64, 64, 256, 64, 256)  # of a random sequence
CAP = 3e7  # values of all memories of a random sequence: eager keeps each several times
COMPILING_S = {rows.INFERENCE: 45.0, rows.TRAINING: 90.0}  # torch.compile, for five steps
STEPS = ("ntm_content_addressing", "ntm_addressing", "ntm_read", "ntm_write")
Goals = tuple[float | None, float | None]


def _seed(rng: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=rng))


def sequence_work(
    time: int,
    batch: int,
    slots: int,
    width: int,
    control: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> rows.Work:
    """The heads "wr" and one LSTM layer, weights drawn anew for each sample; JAX in float32."""

    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        sizes = (time, batch, INPUT, control, slots, width)
        return next(sequence.sample_inputs(dtype=dtype, sizes=sizes, seed=_seed(rng))).args

    ours, eager = ops.ntm, {"eager": sequence.ntm}
    if dtype != torch.float32:
        return rows.Work(sample, ours, eager)
    missing = rows.uninstalled("JAX", "jax")
    return rows.Work(
        sample,
        ours,
        eager,
        others={} if missing else {JAX: partial(jax_scan, peers.run)},
        missing=[missing] if missing else [],
    )


class EagerNTM(nn.Module):
    """A layer's machine by the reference, with weights of its own."""

    def __init__(self, ntm: NTM) -> None:
        super().__init__()
        self.ntm = deepcopy(ntm)

    def forward(self, input: Tensor) -> tuple[Tensor, NTMState]:
        ntm = self.ntm
        state = ntm.init_state(input.size(1))
        weights = ntm._controller(), ntm.head_weight, ntm.head_bias
        features, last = sequence.ntm(input, state, *weights)
        return ntm.output(features), last


def layer_work(time: int, batch: int, slots: int, width: int, control: int) -> rows.Work:
    """A layer with 8 outputs, its initial state learned."""
    torch.manual_seed(0)
    ours = NTM(INPUT, INPUT - 1, control, slots, width)

    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        return (torch.rand(time, batch, INPUT, generator=rng),)

    return rows.Work(sample, ours, {"eager": EagerNTM(ours)})


def layer_rows(*sizes: int, goals: Goals = (None, None)) -> list[rows.Row]:
    shape, make = ", ".join(map(str, sizes)), partial(layer_work, *sizes)
    return rows.pair("ntm", shape, make, goals={"eager": goals}, name="NTM layer")


def compiled_work(*sizes: int) -> rows.Work:
    """Few steps, since torch.compile unrolls them."""
    return replace(sequence_work(*sizes), compile_with={}, others={}, missing=[])


def compiled_rows(*sizes: int) -> list[rows.Row]:
    shape, make = ", ".join(map(str, sizes)), partial(compiled_work, *sizes)
    return rows.pair("ntm", shape, make, predicted_s=COMPILING_S.__getitem__)


def step_work(function: str, batch: int, slots: int, width: int, on_gpu: bool = False) -> rows.Work:
    """One functional with one head and a shift by at most one slot."""

    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        samples = steps.sample_inputs(sizes=(batch, slots, width, 1, 3), seed=_seed(rng))
        return next(s.args for s in samples if s.function == function)

    eager = getattr(steps, function)

    def listed(op: Any) -> Any:
        return lambda *tensors: (op(*tensors),)

    return rows.Work(
        sample,
        listed(getattr(ops, function)),
        {"eager": listed(eager)},
        loss=_weighed,
        compile_with={} if on_gpu else None,
    )


@cache
def _slope(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.linspace(0, 1, size, dtype=dtype, device=device)


def _weighed(outputs: Any) -> torch.Tensor:
    """Weightings sum to one, so that their plain sum has no gradient."""
    output = outputs[0]
    return torch.dot(output.flatten(), _slope(output.numel(), output.dtype, output.device))


def sequence_rows(
    *sizes: int,
    goals: Goals = (None, None),
    jax: Goals = (None, None),
    dtype: torch.dtype = torch.float32,
) -> list[rows.Row]:
    shape, work = ", ".join(map(str, sizes)), partial(sequence_work, *sizes, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    return rows.pair("ntm", shape, work, goals={"eager": goals, JAX: jax}, dtype=name)


def step_rows(
    function: str,
    batch: int,
    slots: int,
    width: int,
    goals: Goals = (None, None),
    on_gpu: bool = False,
) -> list[rows.Row]:
    make = partial(step_work, function, batch, slots, width, on_gpu)
    shape = f"{batch}, {slots}, {width}"
    return rows.pair("ntm", shape, make, goals={"eager": goals}, name=function)


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """A random sequence or, every second time, a random functional; None if too large."""
    time, batch, slots, width, control = rows.draw(rng, MOST)
    if time * batch * slots * width > CAP:
        return None
    if place % 2 == 0:
        return sequence_rows(time, batch, max(slots, 3), width, control)
    return step_rows(rng.choice(STEPS), batch, max(slots, 3), width)


ROWS = [
    *sequence_rows(41, 1, 128, 20, 100, goals=(60, 60), jax=(4, 6)),
    *sequence_rows(41, 16, 128, 20, 100, goals=(22, 27), jax=(8, 14)),
    *sequence_rows(41, 64, 128, 64, 256, goals=(6.5, 7), jax=(4, 6.5)),
    *sequence_rows(41, 64, 128, 64, 256, dtype=torch.bfloat16),
    *sequence_rows(400, 4, 128, 20, 100, goals=(35, 35)),
    *layer_rows(41, 1, 128, 20, 100, goals=(90, 100)),
    *step_rows("ntm_addressing", 16, 128, 20, goals=(8, 6)),
    *step_rows("ntm_content_addressing", 16, 128, 20),
    *step_rows("ntm_read", 16, 128, 20),
    *step_rows("ntm_write", 16, 128, 20),
    *compiled_rows(5, 16, 128, 20, 100),
]
GPU_ROWS = [  # torch.compile would take minutes for a sequence's loop over steps
    *sequence_rows(41, 1, 128, 20, 100),
    *sequence_rows(41, 16, 128, 20, 100),
    *sequence_rows(41, 256, 128, 20, 100),
    *sequence_rows(41, 64, 128, 64, 256),
    *(row for step in STEPS for row in step_rows(step, 16, 128, 20, on_gpu=True)),
    *(row for step in STEPS for row in step_rows(step, 256, 128, 64, on_gpu=True)),
]
test_row = measure.test_row

if __name__ == "__main__":
    sys.exit(measure.main("ntm", ROWS, LETTERS))
