"""Measures rows: the command line of bench_<op>.py, and its rows under pytest-benchmark."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.harness import machine, report
from benchmarks.harness.report import Result
from benchmarks.harness.rows import OURS, Row, error
from benchmarks.harness.timing import CLOCKS, TORCH_POOL, Budget, Side, Timing, compare, rounds

POOL_BYTES = 1 << 25  # fresh inputs enough to leave the last-level cache, within reason


def pool(sample: Any, most: int = 16) -> list[Any]:
    """Several samples, so that no side meets the same input twice in a row."""
    first = sample(0)
    tensors = [t for t in tree_leaves(first) if isinstance(t, Tensor)]
    size = sum(t.numel() * t.element_size() for t in tensors) or 1
    return [first, *map(sample, range(1, max(2, min(most, POOL_BYTES // size))))]


def measure(row: Row, budget: Budget, only: Collection[str] | None = None) -> list[Result]:
    """Times a row; one result for each peer (of `only`), the fastest standing for `one_of`.

    Sides on torch's threads take turns in one round. A peer with threads of its own is timed in a
    round beside ours alone, each turn waiting until the other's idle threads have stopped spinning.
    """
    built = row.build()
    samples = pool(built.sample)
    chosen = [name for name in built.peers if only is None or name in only]
    made = {name: built.contenders[name]() for name in (*chosen, OURS)}
    sides = {
        name: Side(name, c.call, [c.prepare(s) for s in samples], c.values, c.pool)
        for name, c in made.items()
    }
    exact = built.exact(samples[0]) if built.exact else None
    compile_s = {name: _first_call(sides[name]) for name in chosen if made[name].compiles}
    together = [name for name in chosen if made[name].pool == TORCH_POOL]
    results = []
    # Who compiles anew, or falls back to eager, while timed ends the measurement with an error.
    with torch.compiler.set_stance("fail_on_recompile") if compile_s else nullcontext():
        if together:
            timings = compare([sides[name] for name in (*together, OURS)], budget)
            rivals = [name for name in together if name in built.one_of]
            slower = set(rivals) - set(sorted(rivals, key=lambda name: timings[name].median_s)[:1])
            for name in together:
                if name not in slower:
                    results.append(_result(row, name, timings, exact, compile_s.get(name)))
        for name in chosen:
            if name not in together:
                timings = compare([sides[name], sides[OURS]], budget)
                results.append(_result(row, name, timings, exact, compile_s.get(name)))
    return results


def _first_call(side: Side) -> float:
    start = time.perf_counter()
    side.call(side.inputs[0])
    return time.perf_counter() - start


def _result(
    row: Row,
    peer: str,
    timings: Mapping[str, Timing],
    exact: Sequence[Tensor] | None,
    compile_s: float | None = None,
) -> Result:
    theirs, ours = timings[peer], timings[OURS]
    return Result(
        row=row.label,
        op=row.op,
        shape=row.shape,
        dtype=row.dtype,
        mode=row.mode,
        peer=peer,
        peer_s=theirs.median_s,
        ours_s=ours.median_s,
        ratio=theirs.median_s / ours.median_s,
        goal=row.goals.get(peer),
        peer_first_s=theirs.first_s,
        ours_first_s=ours.first_s,
        peer_error=None if exact is None else error(theirs.first_values, exact),
        ours_error=None if exact is None else error(ours.first_values, exact),
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
        peer_compile_s=compile_s,
    )


def too_long(row: Row, budget: Budget, left_s: float) -> str | None:
    """Why a row cannot be measured in the seconds left; None if it can."""
    if left_s <= 0:
        return "out of time"
    if row.predicted_s is None:
        return None
    call_s = row.predicted_s()
    calls = 2 + rounds(call_s, budget) if call_s < budget.cap_s else 1
    # ours, the float64 check and the other peers are assumed to take as long again
    if 2 * calls * call_s > left_s:
        return f"one call of torch's takes about {call_s:.0f} s, and {left_s:.0f} s are left"
    return None


def run(
    rows: Sequence[Row], budget: Budget, console: Console, limit_s: float | None = None
) -> tuple[list[Result], list[str]]:
    """All rows; what would not end within `limit_s`, or is not installed, is left out by name."""
    start = time.perf_counter()
    results: list[Result] = []
    left_out: list[str] = []
    with report.progress_bar(console) as bar:
        task = bar.add_task("", total=len(rows))
        for row in rows:
            bar.update(task, description=str(row))
            left = None if limit_s is None else limit_s - (time.perf_counter() - start)
            reason = None if left is None else too_long(row, budget, left)
            if reason:
                left_out.append(f"{row}: {reason}")
            else:
                results += measure(row, budget)
            bar.advance(task)
    return results, left_out + sorted({line for row in rows for line in row.build().missing})


def test_row(benchmark: Any, row: Row, name: str) -> None:
    """Times one contender of a row under pytest-benchmark; its values must agree with float64.

    A bench_<op>.py takes this test over by name; benchmarks/conftest.py gives it the file's ROWS,
    one group for each row and one test for each contender in it.
    """
    built = row.build()
    side = built.contenders[name]()
    samples = pool(built.sample)
    inputs = itertools.cycle([side.prepare(s) for s in samples])
    start = time.perf_counter()
    found = side.values(next(inputs))
    repeats = rounds(time.perf_counter() - start, Budget())
    benchmark.group = str(row)
    benchmark.pedantic(side.call, setup=lambda: ((next(inputs),), {}), rounds=repeats)
    if built.exact and error(found, built.exact(samples[0])) > (
        1e-3 if row.dtype in ("float32", "float64") else 0.1
    ):
        raise ArithmeticError(f"{row}: {name} computes something else than float64 does")


def main(op: str, rows: Sequence[Row], letters: str, argv: Sequence[str] | None = None) -> int:
    """The command line of bench_<op>: measures, prints the table and keeps the JSON."""
    parser = report.parser(f"benchmarks.bench_{op}", f"Rows of {op}: ours and its peers in turns.")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--malloc", choices=("D", "M"), default="D")
    parser.add_argument("--rows", default="", help="only rows whose name holds this text")
    parser.add_argument("--seconds", type=float, default=2.0, help="for one side of one row")
    parser.add_argument("--limit", type=float, help="leave out rows that would end after this")
    parser.add_argument("--json", type=Path, default=machine.RESULTS / f"{op}.json")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args(argv)
    machine.ensure_process(f"benchmarks.bench_{op}", args.malloc, args.threads)

    console = report.console()
    torch.set_num_threads(args.threads)
    chosen = [row for row in rows if args.rows in str(row)]
    budget = Budget(args.seconds, 12 * args.seconds, clock=args.clock)
    results, left_out = run(chosen, budget, console, args.limit)
    here = machine.describe() | {"clock": args.clock}
    report.write_json(args.json, report.document(op, here, results, left_out, letters))
    report.print_table(console, results, left_out, machine.one_line(here), letters)
    return 0
