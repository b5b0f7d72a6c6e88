"""LSTM rows: nn.LSTM, ONNX Runtime, JAX and this package side by side.

python -m benchmarks.bench_lstm [--threads 2] [--malloc D|M] [--rows TEXT] [--json PATH]
pytest benchmarks/bench_lstm.py          the same contenders under pytest-benchmark
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import measure, rows
from benchmarks.harness.memory import Memory
from benchmarks.peers import lstm as peers

NAMES = {
    "cell": "LSTMCell",
    "steps": "LSTMCell, steps",
    "layer": "LSTM",
    "rollout": "LSTM resets",
    "lengths": "LSTM lengths",
}
LETTERS = "T, B, I, H"
REFERENCE = "reference"
REFERENCE_STEPS = 128  # on a GPU, longer sequences say nothing new about a loop over steps
RANDOM = {"t": 512, "b": 128, "i": 1024, "h": 1024}
CELL_STEPS, LEAST_WIDTH = 20, 16  # of random loops over a cell
RANDOM_CELL = {"b": 128, "i": 2048, "h": 2048}
# Random shapes: billions of multiply-adds of a forward pass at most, so that a call of nn.LSTM
# stays within seconds; where the processor has no bf16, nn.LSTM trains it some 50 times slower.
CAPS = {"float32": 15.0, "bfloat16": 15.0}
CAP_EMULATED = 1.0


@dataclass(frozen=True)
class Shape:
    """A shape; the goals are the ratios over torch asked for inference and training."""

    kind: str  # "cell", "steps" of a cell, "layer", "rollout" or "lengths"
    t: int
    b: int
    i: int
    h: int
    dtype: torch.dtype = torch.float32
    goals: tuple[float | None, float | None] = (None, None)
    onnx_goal: float = 1.0
    layers: int = 1

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        if self.kind == "cell":
            return f"B {self.b}, I {self.i}, H {self.h}"
        sizes = f"{self.t}, {self.b}, {self.i}, {self.h}"
        return sizes if self.layers == 1 else f"{sizes}, {self.layers} layers"

    @property
    def gmacs(self) -> float:
        """Billions of multiply-adds of one forward pass."""
        widths = [self.i] + [self.h] * (self.layers - 1)
        return self.t * self.b * 4 * self.h * sum(width + self.h for width in widths) / 1e9


def arguments(shape: Shape, rng: torch.Generator) -> tuple[Any, ...]:
    """x alone, or beside it hx and cx, lengths, or the reset of episodes of 32 steps on average."""

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=rng).to(shape.dtype)

    if shape.kind == "cell":
        return normal(shape.b, shape.i), normal(shape.b, shape.h), normal(shape.b, shape.h)
    x = normal(shape.t, shape.b, shape.i)
    if shape.kind == "steps":
        return x, normal(shape.b, shape.h), normal(shape.b, shape.h)
    if shape.kind == "lengths":
        return x, torch.randint(1, shape.t + 1, (shape.b,), generator=rng)
    if shape.kind == "rollout":
        return x, torch.rand(shape.t, shape.b, generator=rng) < 1 / 32
    return (x,)


def work(shape: Shape, reference: bool = False) -> rows.Work:
    """Torch's ways, the faster of which counts, and the peers that are installed and can do it.

    All sides hold the weights of one seeded nn.LSTM. A cell's state is not trained.
    """
    torch.manual_seed(0)
    weights = nn.LSTM(shape.i, shape.h, shape.layers, dtype=shape.dtype)
    by_torch = peers.by_torch(shape.kind, weights)
    sides = dict(by_torch)
    if reference:
        sides[REFERENCE] = peers.Reference(weights)
    dtype = shape.dtype_name
    absent = peers.absent(shape.kind, dtype, shape.layers)
    return rows.Work(
        partial(arguments, shape),
        peers.ours(shape.kind, weights),
        sides,
        constants=(1, 2),
        on_host=(1,) if shape.kind == "lengths" else (),
        others=peers.others(shape.kind, weights, absent),
        infer_only=(peers.ONNX,),
        one_of=tuple(by_torch),
        missing=[reason for reason in absent.values() if "not installed" in reason],
    )


def predicted_s(shape: Shape, mode: str) -> float:
    """How long one of torch's calls will take, judged by a tenth of the sequence."""
    short = replace(shape, t=max(1, shape.t // 10))
    built = rows.bench(work(short), mode)
    side = built.contenders[built.peers[0]]()
    given = side.prepare(built.sample(0))
    start = time.perf_counter()
    side.call(given)
    return (time.perf_counter() - start) * shape.t / short.t


def shape_rows(shape: Shape, reference: bool = False) -> list[rows.Row]:
    """Both modes of one shape."""
    return rows.pair(
        "lstm_cell" if shape.kind == "cell" else "lstm",
        shape.label,
        partial(work, shape, reference),
        goals={**dict.fromkeys(peers.TORCH[shape.kind], shape.goals),
               peers.ONNX: (shape.onnx_goal, None)},
        dtype=shape.dtype_name,
        name=NAMES[shape.kind],
        predicted_s=partial(predicted_s, shape),
    )  # fmt: skip


def gpu_rows(shape: Shape) -> list[rows.Row]:
    """Beside cuDNN and, where the loop over steps is short, the plain PyTorch reference."""
    return shape_rows(shape, reference=shape.kind != "cell" and shape.t <= REFERENCE_STEPS)


def cap(shape: Shape) -> float:
    """Billions of multiply-adds that a random shape may take."""
    most, bf16 = CAPS[shape.dtype_name], shape.dtype == torch.bfloat16
    emulated = bf16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return min(most, CAP_EMULATED) if emulated else most


def random_shape(rng: random.Random, place: int) -> Shape | None:
    """fp32 and bf16 by turns, one and two layers by turns; None where it is over the cap."""
    t, b, i, h = rows.draw(rng, RANDOM.values())
    dtype = (torch.float32, torch.bfloat16)[place % 2]
    shape = Shape("layer", t, b, i, h, dtype, layers=1 + place // 2 % 2)
    return shape if shape.gmacs <= cap(shape) else None


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """A random shape in both modes."""
    shape = random_shape(rng, place)
    return shape_rows(shape) if shape else None


def random_cell_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """Twenty steps over one cell, fp32 and bf16 by turns, in both modes; None if too large."""
    b, i, h = rows.draw(rng, RANDOM_CELL.values())
    shape = Shape("steps", CELL_STEPS, b, i, h, (torch.float32, torch.bfloat16)[place % 2])
    return shape_rows(shape) if min(i, h) >= LEAST_WIDTH and shape.gmacs <= cap(shape) else None


SHAPES = (
    Shape("cell", 1, 1, 64, 64, goals=(2.4, 2.0)),
    Shape("cell", 1, 32, 64, 128, goals=(1.3, 1.3)),
    Shape("layer", 1, 1, 64, 64, goals=(7, 3.5)),
    Shape("layer", 100, 1, 64, 64, goals=(4, 3), onnx_goal=1.5),
    Shape("layer", 512, 1, 256, 256, goals=(1.6, 1.5), onnx_goal=1.5),
    Shape("rollout", 256, 16, 64, 128, goals=(4, 4)),
    Shape("layer", 100, 32, 256, 256, goals=(1.12, 1.3)),
    Shape("lengths", 100, 32, 256, 256, goals=(1.5, 1.5)),
    Shape("layer", 100, 64, 512, 512, goals=(1.1, 1.2)),
    # Goals of processors with tiles.
    Shape("layer", 100, 1, 64, 64, torch.bfloat16, goals=(5, 6)),
    Shape("layer", 37, 5, 30, 100, torch.bfloat16, goals=(4.5, 5)),
    Shape("layer", 512, 1, 256, 256, torch.bfloat16, goals=(1.9, 6)),
    Shape("layer", 200, 128, 32, 32, torch.bfloat16, goals=(2.2, 2.6)),
    Shape("layer", 100, 32, 256, 256, torch.bfloat16, goals=(1.7, 2.6)),
    Shape("layer", 100, 64, 512, 512, torch.bfloat16, goals=(1.35, 2.1)),
)
HALF = torch.bfloat16
GPU_SHAPES = (
    Shape("cell", 1, 1, 64, 64),
    Shape("cell", 1, 256, 256, 256),
    Shape("cell", 1, 4096, 512, 512),
    # weights on chip, one row a program
    Shape("layer", 1, 1, 64, 64),
    Shape("layer", 100, 1, 64, 64),
    Shape("layer", 100, 32, 64, 64),
    Shape("layer", 1000, 64, 32, 32),
    Shape("layer", 100, 1024, 64, 64),
    Shape("layer", 100, 64, 64, 64, HALF),
    # weights on chip, tensor cores
    Shape("layer", 100, 2048, 64, 64, HALF),
    Shape("layer", 100, 64, 128, 128, HALF),
    # weights shared out over a cluster
    Shape("layer", 100, 64, 128, 128),
    Shape("layer", 100, 32, 256, 256),
    # over the whole GPU
    Shape("layer", 100, 64, 512, 512),
    Shape("layer", 100, 16, 1024, 1024),
    Shape("layer", 100, 64, 1024, 1024, HALF),
    # a long sequence, as in FlashRNN's chart (H 768)
    Shape("layer", 1024, 16, 64, 64),
    Shape("layer", 1024, 16, 128, 128),
    Shape("layer", 1024, 16, 128, 128, HALF),
    Shape("layer", 1024, 16, 256, 256),
    Shape("layer", 1024, 16, 256, 256, HALF),
    Shape("layer", 1024, 16, 768, 768),
    Shape("layer", 1024, 16, 768, 768, HALF),
    # what cuDNN has no call for
    Shape("rollout", 256, 64, 64, 64),
    Shape("rollout", 256, 16, 64, 128),
    Shape("lengths", 100, 64, 64, 64),
    Shape("lengths", 100, 32, 256, 256),
)

ROWS = [row for shape in SHAPES for row in shape_rows(shape)]
GPU_ROWS = [row for shape in GPU_SHAPES for row in gpu_rows(shape)]
MEMORY = Memory(
    "LSTM 1000, 32, 256, 256",
    partial(work, Shape("layer", 1000, 32, 256, 256)),
    partial(work, Shape("layer", 2, 32, 256, 256)),
)
test_row = measure.test_row

if __name__ == "__main__":
    sys.exit(measure.main("lstm", ROWS, LETTERS))
