"""LSTM rows: nn.LSTM, ONNX Runtime, JAX and this package side by side.

python -m benchmarks.bench_lstm [--threads 2] [--malloc D|M] [--rows TEXT] [--json PATH]
pytest benchmarks/bench_lstm.py          the same contenders under pytest-benchmark
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import lstm_rivals as rivals
from benchmarks import machine, report
from benchmarks.lstm_sides import MODES, OURS, TORCH, Contender, Sample, our_side, torch_side
from benchmarks.report import Result
from benchmarks.timing import Budget, Side, Timing, compare, rounds

RIVALS = (rivals.ONNX, rivals.JAX)
NAMES = {"cell": "LSTMCell", "layer": "LSTM", "rollout": "LSTM resets", "lengths": "LSTM lengths"}
POOL_BYTES = 1 << 25  # fresh inputs enough to leave the last-level cache, within reason


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

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def shape(self) -> str:
        return (
            f"B {self.b}, I {self.i}, H {self.h}"
            if self.kind == "cell"
            else (f"{self.t}, {self.b}, {self.i}, {self.h}")
        )

    @property
    def name(self) -> str:
        return f"{NAMES[self.kind]} {self.shape}"

    @property
    def op(self) -> str:
        return "lstm_cell" if self.kind == "cell" else "lstm"


ROWS = (
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


def pool(row: Row, mode: str) -> list[Sample]:
    """Several samples, so that no side meets the same input twice in a row."""
    size = row.t * row.b * row.i * row.dtype.itemsize
    return [sample(row, mode, seed) for seed in range(max(2, min(16, POOL_BYTES // size)))]


def weights(row: Row) -> nn.LSTM:
    """The seeded nn.LSTM every side takes its weights from."""
    torch.manual_seed(0)
    return nn.LSTM(row.i, row.h, dtype=row.dtype)


def absent(name: str, row: Row, mode: str) -> str | None:
    """Why a rival does not stand in a row; None if it does."""
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


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error |a - b| / |b| among outputs, or among gradients."""
    pairs = zip(found, exact, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def predicted_s(row: Row, mode: str) -> float:
    """How long one of torch's calls will take, judged by a tenth of the sequence."""
    short = replace(row, t=max(1, row.t // 10))
    side, given = contender(next(iter(TORCH[row.kind])), short, mode), sample(short, mode, 0)
    start = time.perf_counter()
    side.call(given)
    return (time.perf_counter() - start) * row.t / short.t


def too_long(row: Row, mode: str, budget: Budget, left_s: float) -> str | None:
    """Why a row cannot be measured in the seconds left; None if it can."""
    if left_s <= 0:
        return "out of time"
    call_s = predicted_s(row, mode)
    calls = 2 + rounds(call_s, budget) if call_s < budget.cap_s else 1
    # ours, the float64 check and the other peers are assumed to take as long again
    if 2 * calls * call_s > left_s:
        return f"one call of torch's takes about {call_s:.0f} s, and {left_s:.0f} s are left"
    return None


def goal(name: str, row: Row, mode: str) -> float | None:
    """The ratio this project asks of itself against that peer."""
    if name in TORCH[row.kind]:
        return row.goals[list(MODES).index(mode)]
    return row.onnx_goal if name == rivals.ONNX else None


def measure(row: Row, mode: str, budget: Budget) -> list[Result]:
    """Times a row in one mode; one result for the faster of torch's ways and for each rival.

    Each rival is timed in a round of its own beside ours: its idle threads may spin for a while
    after its turn and would take a core from whoever comes next.
    """
    samples = pool(row, mode)
    sides = {
        side.name: Side(side.name, side.call, [side.prepare(s) for s in samples], side.values)
        for side in (contender(name, row, mode) for name in names(row, mode))
    }
    exact = truth(row, mode, samples[0])
    ways = TORCH[row.kind]
    timings = compare([sides[name] for name in (*ways, OURS)], budget)
    best = min(ways, key=lambda name: timings[name].median_s)
    results = [_result(row, mode, best, timings, exact)]
    for rival in (name for name in sides if name in RIVALS):
        pair = compare([sides[rival], sides[OURS]], budget)
        results.append(_result(row, mode, rival, pair, exact))
    return results


def _result(
    row: Row, mode: str, peer: str, timings: dict[str, Timing], exact: Sequence[Tensor]
) -> Result:
    theirs, ours = timings[peer], timings[OURS]
    return Result(
        row=row.name,
        op=row.op,
        shape=row.shape,
        dtype=row.dtype_name,
        mode=mode,
        peer=peer,
        peer_s=theirs.median_s,
        ours_s=ours.median_s,
        ratio=theirs.median_s / ours.median_s,
        goal=goal(peer, row, mode),
        peer_first_s=theirs.first_s,
        ours_first_s=ours.first_s,
        peer_error=error(theirs.first_values, exact),
        ours_error=error(ours.first_values, exact),
        peer_samples=len(theirs.samples),
        ours_samples=len(ours.samples),
        peer_calls=theirs.calls,
        ours_calls=ours.calls,
        peer_faults=theirs.faults_per_call,
        ours_faults=ours.faults_per_call,
        peer_spread=theirs.spread,
        ours_spread=ours.spread,
        threads=torch.get_num_threads(),
        malloc=machine.malloc_regime(),
    )


def run(
    rows: Sequence[Row], budget: Budget, console: Console, limit_s: float | None = None
) -> tuple[list[Result], list[str]]:
    """All rows in both modes; a row that would not end within `limit_s` is left out by name."""
    start = time.perf_counter()
    results: list[Result] = []
    left_out: list[str] = []
    work = [(row, mode) for row in rows for mode in MODES]
    with report.progress_bar(console) as bar:
        task = bar.add_task("", total=len(work))
        for row, mode in work:
            bar.update(task, description=f"{row.name} {row.dtype_name} {mode}")
            left = None if limit_s is None else limit_s - (time.perf_counter() - start)
            reason = None if left is None else too_long(row, mode, budget, left)
            if reason:
                left_out.append(f"{row.name} {row.dtype_name} {mode}: {reason}")
            else:
                results += measure(row, mode, budget)
            bar.advance(task)
    return results, left_out + missing_packages(rows)


def missing_packages(rows: Sequence[Row]) -> list[str]:
    """One line for each rival that is not installed."""
    reasons = (absent(name, row, "inference") for name in RIVALS for row in rows)
    return sorted({reason for reason in reasons if reason and "not installed" in reason})


# pytest-benchmark: one group for each row and mode, one test for each contender in it


def pytest_generate_tests(metafunc: Any) -> None:
    """Every row, mode and contender; those that cannot run are not generated."""
    cases = [(row, mode, name) for row in ROWS for mode in MODES for name in names(row, mode)]
    ids = [f"{row.name}-{row.dtype_name}-{mode}-{name}" for row, mode, name in cases]
    metafunc.parametrize(("row", "mode", "name"), cases, ids=ids)


def test_row(benchmark: Any, row: Row, mode: str, name: str) -> None:
    """Times one contender; its values must agree with float64."""
    side = contender(name, row, mode)
    samples = pool(row, mode)
    inputs = itertools.cycle([side.prepare(s) for s in samples])
    start = time.perf_counter()
    found = side.values(next(inputs))
    repeats = rounds(time.perf_counter() - start, Budget())
    benchmark.group = f"{row.name} {row.dtype_name} {mode}"
    benchmark.pedantic(side.call, setup=lambda: ((next(inputs),), {}), rounds=repeats)
    tolerance = 1e-4 if row.dtype == torch.float32 else 0.1
    assert error(found, truth(row, mode, samples[0])) < tolerance


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table and keeps the JSON."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.bench_lstm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--malloc", choices=("D", "M"), default="D")
    parser.add_argument("--rows", default="", help="only rows whose name holds this text")
    parser.add_argument("--seconds", type=float, default=2.0, help="for one side of one row")
    parser.add_argument("--limit", type=float, help="leave out rows that would end after this")
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "lstm.json")
    args = parser.parse_args(argv)
    machine.ensure_process("benchmarks.bench_lstm", args.malloc, args.threads)

    console = report.console()
    torch.set_num_threads(args.threads)
    rows = [row for row in ROWS if args.rows in f"{row.name} {row.dtype_name}"]
    results, left_out = run(rows, Budget(args.seconds, 12 * args.seconds), console, args.limit)
    here = machine.describe()
    report.write_json(args.json, report.document("lstm", here, results, left_out))
    report.print_table(console, results, left_out, machine.one_line(here))
    return 0


if __name__ == "__main__":
    sys.exit(main())
