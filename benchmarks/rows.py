"""Rows of a benchmark table, whatever the op: a file declares them, the rest is done here.

benchmarks/bench_<op>.py in full, with LETTERS naming the sizes of a shape:

    def work(b: int, t: int, d: int) -> rows.Work:
        def sample(rng: torch.Generator) -> tuple[Any, ...]:
            return tuple(torch.randn(b, t, d, generator=rng) for _ in range(3))

        return rows.Work(sample, ours=ops.attention, peers={"eager": reference.attention})

    LETTERS = "B, T, d"
    ROWS = rows.pair("attention", "8, 512, 64", partial(work, 8, 512, 64), goals={"eager": (6, 3)})

    def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
        b, t, d = (round(math.exp(rng.uniform(0, math.log(most)))) for most in (16, 512, 128))
        return rows.pair("attention", f"{b}, {t}, {d}", partial(work, b, t, d))

    pytest_generate_tests = rows.generator(ROWS)  # pytest benchmarks/bench_attention.py
    test_row = rows.test_row

    if __name__ == "__main__":
        sys.exit(rows.main("attention", ROWS, LETTERS))

Sides are functions or modules called with a sample's arguments. In a training step every floating
tensor among the arguments, and every parameter of a module, receives a gradient from `loss`. All
values, outputs or gradients, are compared with the first peer's (or `exact`'s) in float64.
`make bench` finds the file by its name, `random_shapes --op <op>` its random_rows (None: the draw
is too large, draw again). `others` take peers that are not torch, or torch.compile (`compiled`);
pair() makes a row for each mode.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks import machine, report
from benchmarks.report import Result
from benchmarks.timing import TORCH_POOL, Budget, Side, Timing, compare, rounds

INFERENCE, TRAINING = MODES = ("inference", "training step")
OURS = "ours"
COMPILED = "torch.compile"
POOL_BYTES = 1 << 25  # fresh inputs enough to leave the last-level cache, within reason


@dataclass(frozen=True)
class Contender:
    """A way to do a row's work: `prepare` is not timed, `call` is, `values` are checked."""

    name: str
    prepare: Callable[[Any], Any]
    call: Callable[[Any], Any]
    values: Callable[[Any], list[Tensor]]  # outputs, or gradients of inputs and weights
    pool: str = TORCH_POOL  # whose threads it uses
    compiles: bool = False  # its first call does: made before all timing, its seconds told apart


@dataclass(frozen=True)
class Bench:
    """What a row compares; samples and contenders are made when they are asked for."""

    sample: Callable[[int], Any]  # seed -> the arguments of one call
    contenders: Mapping[str, Callable[[], Contender]]  # ours and the peers, the main peer first
    exact: Callable[[Any], list[Tensor]] | None = None  # a sample's values in float64
    one_of: Collection[str] = ()  # peers of which only the fastest is reported
    missing: Sequence[str] = ()  # peers that are not installed, with the reason

    @property
    def peers(self) -> list[str]:
        return [name for name in self.contenders if name != OURS]


@dataclass(frozen=True)
class Row:
    """One line of the table: an op at one shape, dtype and mode; `build` must cost little."""

    op: str
    shape: str
    mode: str
    build: Callable[[], Bench]
    dtype: str = "float32"
    goals: Mapping[str, float] = field(default_factory=dict)  # peer -> ratio asked for
    name: str = ""  # where the op's name says too little
    predicted_s: Callable[[], float] | None = None  # a peer's call, if it may take long

    @property
    def label(self) -> str:
        return f"{self.name or self.op} {self.shape}"

    def __str__(self) -> str:
        return f"{self.label} {self.dtype} {self.mode}"


def first_sum(outputs: Sequence[Tensor]) -> Tensor:
    """The loss of a training step unless another is given: the first output's sum."""
    return outputs[0].sum()


def sum_all(outputs: Sequence[Tensor]) -> Tensor:
    """A loss through every floating output."""
    return torch.stack([output.sum() for output in outputs if output.is_floating_point()]).sum()


@dataclass(frozen=True)
class Work:
    """One shape's work: fresh arguments, and who does it with them."""

    sample: Callable[[torch.Generator], tuple[Any, ...]]
    ours: Callable[..., Any]
    peers: Mapping[str, Callable[..., Any]]  # the first one is the main peer
    exact: Callable[..., Any] | None = None  # what float64 is computed by; the first peer if None
    loss: Callable[[Sequence[Tensor]], Tensor] = first_sum
    others: Mapping[str, Callable[[str], Contender]] = field(default_factory=dict)  # from the mode
    one_of: Collection[str] = ()
    missing: Sequence[str] = ()
    checked: bool = True  # False where sides draw random numbers of their own


def pair(
    op: str,
    shape: str,
    work: Callable[[], Work],
    *,
    goals: Mapping[str, tuple[float | None, float | None]] | None = None,
    modes: Collection[str] = MODES,
    dtype: str = "float32",
    name: str = "",
) -> list[Row]:
    """A row for each mode; goals: peer -> the ratios asked of inference and training."""
    out = []
    for place, mode in enumerate(MODES):
        asked = {peer: ratio[place] for peer, ratio in (goals or {}).items()}
        wanted = {peer: ratio for peer, ratio in asked.items() if ratio is not None}
        if mode in modes:
            out.append(Row(op, shape, mode, partial(bench, work, mode), dtype, wanted, name))
    return out


def bench(make: Callable[[], Work], mode: str) -> Bench:
    """A work's contenders in one mode."""
    work = make()
    sides = {**work.peers, OURS: work.ours}
    reference = work.exact or next(iter(work.peers.values()))

    def sample(seed: int) -> tuple[Any, ...]:
        args = work.sample(torch.Generator().manual_seed(seed))
        return tree_map(partial(_leaf, mode=mode), args)

    def exact(args: tuple[Any, ...]) -> list[Tensor]:
        exact_function = reference
        if isinstance(reference, nn.Module):
            exact_function = copy.deepcopy(reference).double()
        side = contender("float64", exact_function, mode, work.loss)
        return side.values(side.prepare(tree_map(_double, args)))

    contenders: dict[str, Callable[[], Contender]] = {
        name: partial(contender, name, function, mode, work.loss)
        for name, function in sides.items()
    }
    contenders |= {name: partial(other, mode) for name, other in work.others.items()}
    return Bench(
        sample, contenders, exact if work.checked else None, work.one_of, tuple(work.missing)
    )


def _leaf(value: Any, mode: str) -> Any:
    differentiable = isinstance(value, Tensor) and value.is_floating_point() and mode == TRAINING
    return value.detach().requires_grad_() if differentiable else value


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _outputs(found: Any) -> Sequence[Tensor]:
    """The tensors found; a plain tuple of them as it is, since this is part of what is timed."""
    if type(found) is tuple and all(isinstance(each, Tensor) for each in found):
        return found
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def contender(
    name: str,
    function: Callable[..., Any],
    mode: str,
    loss: Callable[[Sequence[Tensor]], Tensor] = first_sum,
) -> Contender:
    """A torch side: inference under no_grad, or forward, loss, backward and gradients cleared."""
    weights = list(function.parameters()) if isinstance(function, nn.Module) else []
    if isinstance(function, nn.Module):
        function.train(mode == TRAINING)

    def prepare(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
        leaves = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad]
        return args, leaves + weights

    def infer(given: Any) -> Any:
        with torch.no_grad():
            return function(*given[0])

    def train(given: Any) -> None:
        args, leaves = given
        loss(_outputs(function(*args))).backward()
        for leaf in leaves:
            leaf.grad = None

    def outputs(given: Any) -> list[Tensor]:
        return [t for t in _outputs(infer(given)) if t.is_floating_point()]

    def gradients(given: Any) -> list[Tensor]:
        args, leaves = given
        loss(_outputs(function(*args))).backward()
        found = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
        for leaf in leaves:
            leaf.grad = None
        return found

    if mode == INFERENCE:
        return Contender(name, prepare, infer, outputs)
    return Contender(name, prepare, train, gradients)


def compiled(
    function: Callable[..., Any],
    mode: str,
    loss: Callable[[Sequence[Tensor]], Tensor] = first_sum,
    **options: Any,
) -> Contender:
    """A torch side under torch.compile; what was compiled before, in another mode, is forgotten."""
    torch.compiler.reset()  # graphs of one function count against a limit, beyond which it is eager
    return replace(
        contender(COMPILED, torch.compile(function, **options), mode, loss), compiles=True
    )


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest |a - b| / |b| among outputs, or among gradients; |a| where b is zero."""
    worst = 0.0
    for a, b in zip(found, exact, strict=True):
        size = float(b.norm())
        worst = max(worst, float((a.double() - b).norm()) / (size or 1.0))
    return worst


def pool(sample: Callable[[int], Any], most: int = 16) -> list[Any]:
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


# pytest-benchmark: one group for each row, one test for each contender in it


def generator(rows: Sequence[Row]) -> Callable[[Any], None]:
    """A module's pytest_generate_tests: every row with every contender."""

    def pytest_generate_tests(metafunc: Any) -> None:
        cases = [(row, name) for row in rows for name in row.build().contenders]
        ids = [f"{row}-{name}".replace(" ", "-") for row, name in cases]
        metafunc.parametrize(("row", "name"), cases, ids=ids)

    return pytest_generate_tests


def test_row(benchmark: Any, row: Row, name: str) -> None:
    """Times one contender; its values must agree with float64."""
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
    parser = argparse.ArgumentParser(
        prog=f"benchmarks.bench_{op}", description=f"Rows of {op}: ours and its peers in turns."
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--malloc", choices=("D", "M"), default="D")
    parser.add_argument("--rows", default="", help="only rows whose name holds this text")
    parser.add_argument("--seconds", type=float, default=2.0, help="for one side of one row")
    parser.add_argument("--limit", type=float, help="leave out rows that would end after this")
    parser.add_argument("--json", type=Path, default=machine.RESULTS / f"{op}.json")
    args = parser.parse_args(argv)
    machine.ensure_process(f"benchmarks.bench_{op}", args.malloc, args.threads)

    console = report.console()
    torch.set_num_threads(args.threads)
    chosen = [row for row in rows if args.rows in str(row)]
    results, left_out = run(chosen, Budget(args.seconds, 12 * args.seconds), console, args.limit)
    here = machine.describe()
    report.write_json(args.json, report.document(op, here, results, left_out, letters))
    report.print_table(console, results, left_out, machine.one_line(here), letters)
    return 0
