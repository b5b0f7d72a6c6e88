"""LSTM rows: nn.LSTM, ONNX Runtime, JAX and this package side by side.

python -m benchmarks.bench_lstm [--threads 2] [--malloc D|M] [--rows TEXT] [--json PATH]
pytest benchmarks/bench_lstm.py          the same contenders under pytest-benchmark
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from benchmarks import lstm_rivals as rivals
from benchmarks import rows
from benchmarks.lstm_sides import MODES, TORCH, Sample, our_side, torch_side
from benchmarks.rows import OURS, Bench, Contender

RIVALS = (rivals.ONNX, rivals.JAX)
NAMES = {"cell": "LSTMCell", "layer": "LSTM", "rollout": "LSTM resets", "lengths": "LSTM lengths"}
LETTERS = "T, B, I, H"
RANDOM = {"t": 512, "b": 128, "i": 1024, "h": 1024}
# Random shapes: billions of multiply-adds of a forward pass at most, so that a call of nn.LSTM
# stays within seconds; where the processor has no bf16, nn.LSTM trains it some 50 times slower.
CAPS = {"float32": 15.0, "bfloat16": 15.0}
CAP_EMULATED = 1.0


@dataclass(frozen=True)
class Row:
    """One shape; the goals are the ratios over torch asked for inference and training."""

    kind: str  # "cell", "layer", "rollout" or "lengths"
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
    def shape(self) -> str:
        if self.kind == "cell":
            return f"B {self.b}, I {self.i}, H {self.h}"
        sizes = f"{self.t}, {self.b}, {self.i}, {self.h}"
        return sizes if self.layers == 1 else f"{sizes}, {self.layers} layers"

    @property
    def name(self) -> str:
        return f"{NAMES[self.kind]} {self.shape}"

    @property
    def op(self) -> str:
        return "lstm_cell" if self.kind == "cell" else "lstm"

    @property
    def gmacs(self) -> float:
        """Billions of multiply-adds of one forward pass."""
        widths = [self.i] + [self.h] * (self.layers - 1)
        return self.t * self.b * 4 * self.h * sum(width + self.h for width in widths) / 1e9


SHAPES = (
    Row("cell", 1, 1, 64, 64, goals=(2.4, 2.0)),
    Row("cell", 1, 32, 64, 128, goals=(1.3, 1.3)),
    Row("layer", 1, 1, 64, 64, goals=(7, 3.5)),
    Row("layer", 100, 1, 64, 64, goals=(4, 3), onnx_goal=1.5),
    Row("layer", 512, 1, 256, 256, goals=(1.6, 1.5), onnx_goal=1.5),
    Row("rollout", 256, 16, 64, 128, goals=(4, 4)),
    Row("layer", 100, 32, 256, 256, goals=(1.12, 1.3)),
    Row("lengths", 100, 32, 256, 256, goals=(1.5, 1.5)),
    Row("layer", 100, 64, 512, 512, goals=(1.1, 1.2)),
    Row("layer", 100, 32, 256, 256, torch.bfloat16, goals=(1.4, 2.5)),
    Row("layer", 100, 64, 512, 512, torch.bfloat16, goals=(1.15, 1.3)),
)


def sample(row: Row, mode: str, seed: int) -> Sample:
    """Random arguments of a row; a rollout's episodes end every 32 steps on average."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(row.dtype)

    if row.kind == "cell":
        x, state = normal(row.b, row.i), (normal(row.b, row.h), normal(row.b, row.h))
        return Sample(x.requires_grad_(mode != "inference"), state)
    x = normal(row.t, row.b, row.i).requires_grad_(mode != "inference")
    if row.kind == "lengths":
        return Sample(x, lengths=torch.randint(1, row.t + 1, (row.b,), generator=rng))
    if row.kind == "rollout":
        return Sample(x, reset=torch.rand(row.t, row.b, generator=rng) < 1 / 32)
    return Sample(x)


def weights(row: Row) -> nn.LSTM:
    """The seeded nn.LSTM every side takes its weights from."""
    torch.manual_seed(0)
    return nn.LSTM(row.i, row.h, row.layers, dtype=row.dtype)


def absent(name: str, row: Row, mode: str) -> str | None:
    """Why a rival does not stand in a row; None if it does."""
    if row.layers > 1:
        return f"{name}'s rows have one layer"
    if name == rivals.ONNX:
        return rivals.onnx_missing(row.kind, row.dtype, mode)
    return rivals.jax_missing(row.kind, row.dtype)


def names(row: Row, mode: str) -> list[str]:
    """Ours, torch's ways, and the rivals that are installed and can do the row."""
    here = [name for name in RIVALS if absent(name, row, mode) is None]
    return [OURS, *TORCH[row.kind], *here]


def contender(name: str, row: Row, mode: str) -> Contender:
    """The contender of that name, built from the row's weights."""
    model = weights(row)
    if name == rivals.ONNX:
        return rivals.onnx_runtime(model, row.kind)
    if name == rivals.JAX:
        return rivals.jax_scan(model, mode)
    side = our_side(row.kind, model) if name == OURS else torch_side(name, row.kind, model)
    return MODES[mode](*side)


def truth(row: Row, mode: str, given: Sample) -> list[Tensor]:
    """The same numbers computed by torch in float64."""
    name, module, forward = torch_side(next(iter(TORCH[row.kind])), row.kind, weights(row))
    return MODES[mode](name, module.double(), forward).values(given.double())


def predicted_s(row: Row, mode: str) -> float:
    """How long one of torch's calls will take, judged by a tenth of the sequence."""
    short = replace(row, t=max(1, row.t // 10))
    side, given = contender(next(iter(TORCH[row.kind])), short, mode), sample(short, mode, 0)
    start = time.perf_counter()
    side.call(given)
    return (time.perf_counter() - start) * row.t / short.t


def goals(row: Row, mode: str) -> dict[str, float]:
    """The ratios this project asks of itself against each peer."""
    asked = row.goals[list(MODES).index(mode)]
    out = {} if asked is None else dict.fromkeys(TORCH[row.kind], asked)
    return {**out, rivals.ONNX: row.onnx_goal}


@cache
def missing_packages(row: Row) -> tuple[str, ...]:
    """One line for each rival that is not installed."""
    reasons = (absent(name, row, "inference") for name in RIVALS)
    return tuple(reason for reason in reasons if reason and "not installed" in reason)


def bench(row: Row, mode: str) -> Bench:
    """All who can do the row, the faster of torch's ways to be reported."""
    return Bench(
        partial(sample, row, mode),
        {name: partial(contender, name, row, mode) for name in names(row, mode)},
        partial(truth, row, mode),
        one_of=tuple(TORCH[row.kind]),
        missing=missing_packages(row),
    )


def table_rows(shapes: Sequence[Row]) -> list[rows.Row]:
    """Each shape in both modes."""
    return [
        rows.Row(
            row.op,
            row.shape,
            mode,
            partial(bench, row, mode),
            row.dtype_name,
            goals(row, mode),
            NAMES[row.kind],
            partial(predicted_s, row, mode),
        )
        for row in shapes
        for mode in MODES
    ]


def cap(dtype: torch.dtype) -> float:
    """The size up to which random shapes of that dtype are measured here."""
    emulated = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    most = CAPS[str(dtype).removeprefix("torch.")]
    return min(most, CAP_EMULATED) if emulated else most


def random_shape(rng: random.Random, place: int) -> Row | None:
    """fp32 and bf16 by turns, one and two layers by turns; None where it is over the cap."""
    t, b, i, h = (round(math.exp(rng.uniform(0, math.log(most)))) for most in RANDOM.values())
    dtype = (torch.float32, torch.bfloat16)[place % 2]
    row = Row("layer", t, b, i, h, dtype, layers=1 + place // 2 % 2)
    return row if row.gmacs <= cap(dtype) else None


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """A random shape in both modes."""
    row = random_shape(rng, place)
    return table_rows([row]) if row else None


ROWS = table_rows(SHAPES)
pytest_generate_tests = rows.generator(ROWS)
test_row = rows.test_row

if __name__ == "__main__":
    sys.exit(rows.main("lstm", ROWS, LETTERS))
