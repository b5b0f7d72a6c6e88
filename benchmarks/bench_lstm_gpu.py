"""LSTM rows on a GPU: nn.LSTM on cuDNN, the plain PyTorch reference and this package.

python -m benchmarks.bench_lstm_gpu [--rows TEXT] [--samples 50] [--tf32] [--json PATH]

Times are medians between CUDA events around one call, the GPU idle before each, so that the
launches from Python count as they do for a user who waits for the result.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import gpu
from benchmarks.bench_lstm import Row, sample, truth, weights
from benchmarks.lstm_sides import (
    MODES,
    TORCH,
    Forward,
    Outputs,
    Sample,
    our_side,
    torch_side,
)
from benchmarks.rows import Contender
from seqmem_fast.reference import lstm as reference

REFERENCE = "reference"
REFERENCE_STEPS = 128  # longer sequences say nothing new about a loop over steps

HALF = torch.bfloat16
ROWS = (
    Row("cell", 1, 1, 64, 64),
    Row("cell", 1, 256, 256, 256),
    Row("cell", 1, 4096, 512, 512),
    # weights on chip, one row a program
    Row("layer", 1, 1, 64, 64),
    Row("layer", 100, 1, 64, 64),
    Row("layer", 100, 32, 64, 64),
    Row("layer", 1000, 64, 32, 32),
    Row("layer", 100, 1024, 64, 64),
    Row("layer", 100, 64, 64, 64, HALF),
    # weights on chip, tensor cores
    Row("layer", 100, 2048, 64, 64, HALF),
    Row("layer", 100, 64, 128, 128, HALF),
    # step by step: cuDNN's home ground
    Row("layer", 100, 64, 128, 128),
    Row("layer", 100, 32, 256, 256),
    Row("layer", 100, 64, 512, 512),
    Row("layer", 100, 64, 1024, 1024, HALF),
    # what cuDNN has no call for
    Row("rollout", 256, 64, 64, 64),
    Row("rollout", 256, 16, 64, 128),
    Row("lengths", 100, 64, 64, 64),
    Row("lengths", 100, 32, 256, 256),
)


def by_reference(module: nn.Module, s: Sample) -> Outputs:
    """The package's plain PyTorch, with the module's weights."""
    given = list(module.parameters())
    output, state = reference.lstm(s.x, None, *given, lengths=s.lengths, reset=s.reset)
    return output, *state


def sides(row: Row) -> dict[str, tuple[nn.Module, Forward]]:
    """Every way to do the row's work, on the GPU, with the same weights."""
    found = [torch_side(name, row.kind, weights(row)) for name in TORCH[row.kind]]
    found.append(our_side(row.kind, weights(row)))
    if row.kind != "cell" and row.t <= REFERENCE_STEPS:
        found.append((REFERENCE, weights(row), by_reference))
    return {name: (module.cuda(), forward) for name, module, forward in found}


def on_gpu(given: Sample) -> Sample:
    """The sample on the GPU; packing wants its lengths on the CPU, and ours takes them there."""
    x = given.x.detach().cuda().requires_grad_(given.x.requires_grad)
    state = given.state and (given.state[0].cuda(), given.state[1].cuda())
    return replace(
        given, x=x, state=state, reset=None if given.reset is None else given.reset.cuda()
    )


def measure(row: Row, mode: str, samples: int) -> list[dict[str, Any]]:
    """One record for each side."""
    given = on_gpu(sample(row, mode, 0))
    exact = truth(row, mode, sample(row, mode, 0))
    contenders: dict[str, Contender] = {
        name: MODES[mode](name, module, forward) for name, (module, forward) in sides(row).items()
    }
    labels = {
        "row": row.name,
        "shape": [row.t, row.b, row.i, row.h],
        "dtype": row.dtype_name,
        "mode": mode,
    }
    return [{**labels, **found} for found in gpu.turns(contenders, given, exact, samples)]


def job(row: Row, mode: str) -> gpu.Job:
    """A row in one mode, to be measured when its turn comes."""
    return gpu.Job(f"{row.name} {row.dtype_name}", mode, partial(measure, row, mode))


if __name__ == "__main__":
    sys.exit(gpu.main("lstm_gpu", __doc__, [job(row, mode) for row in ROWS for mode in MODES]))
