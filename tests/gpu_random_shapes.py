"""Every op on the GPU at random shapes, all its options, forward and backward, against float64.

    python tests/gpu_random_shapes.py [--seconds 100] [--jobs 12] [--op lstm]
                                      [--json PATH] [--device cpu]

A case is an op, a dtype and sizes drawn around those of the reference's samples. Every sample is
run on the GPU and by the reference in float64 on the CPU. Where the reference in the sample's own
dtype misses the bound as well, the sample is ill-conditioned and decides nothing. Each job draws
cases of its own seeds until the time is up, in a process of its own: what a kernel does to one of
them (a compiler's refusal, an access out of bounds, a crash) does not end the others.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the package beside the tests

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

OPS = sorted({file.stem for file in HERE.parent.glob("csrc/ops/*.cpp")})
# Relative to the norm: values, and 10 times it gradients.
BOUNDS = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 6e-2, "float16": 8e-3}
GROWTH = 2.0**8  # the product of a case's sizes over that of the reference's own
DIED = 3  # exit status of a job after which the GPU must be opened anew

Record = dict[str, Any]


def cases(chosen: list[str], seed: int) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Ops in turn; dtypes and sizes at random."""
    rng = random.Random(seed)
    ops = rng.sample(chosen, len(chosen))
    while True:
        for op in ops:
            reference = importlib.import_module(f"seqmem_fast.reference.{op}")
            usual = inspect.signature(reference.sample_inputs).parameters["sizes"].default
            while True:
                factors = [2 ** rng.uniform(-2, 6) for _ in usual]
                sizes = tuple(max(1, round(n * f)) for n, f in zip(usual, factors, strict=True))
                product = 1.0
                for n, size in zip(usual, sizes, strict=True):
                    product *= size / n
                if product <= GROWTH:
                    break
            yield op, rng.choice(list(BOUNDS)), sizes, rng.randrange(2**31)


def prepared(a: Any, device: str, wide: bool) -> Any:
    """A tensor there, a floating one as a leaf; what is no tensor as it is."""
    if not isinstance(a, Tensor):
        return a
    if a.is_floating_point():
        dtype = torch.float64 if wide else a.dtype
        return a.detach().to(device, dtype, copy=True).requires_grad_()
    return a.to(device)


def run(function: Any, args: Any, kwargs: Any, device: str, wide: bool) -> list[Any]:
    """Outputs, then gradients of all floating arguments, each with whether it is a gradient."""
    args, kwargs = tree_map(lambda a: prepared(a, device, wide), (args, kwargs))
    if isinstance(kwargs.get("batch_sizes"), Tensor):  # stays where PackedSequence holds it
        kwargs["batch_sizes"] = kwargs["batch_sizes"].cpu()
    leaves = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor) and a.requires_grad]
    found = tree_leaves(function(*args, **kwargs))
    # Where the reference has nothing to give an op may say None.
    outputs = [a for a in found if isinstance(a, Tensor) and a.numel() > 0]
    grown = [a for a in outputs if a.requires_grad]
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(a.shape, generator=generator, dtype=torch.float64) for a in grown]
    if grown:
        pairs = zip(grown, seeds, strict=True)
        torch.autograd.backward(grown, [s.to(device, a.dtype) for a, s in pairs])
    return [*((False, a) for a in outputs), *((True, a.grad) for a in leaves)]


def worst(ours: list[Any], right: list[Any]) -> tuple[float, float]:
    """The largest relative error of outputs, and of gradients; NaN counts as infinite."""
    found = [0.0, 0.0]
    for (is_grad, mine), (_, exact) in zip(ours, right, strict=True):
        if mine is None or exact is None:
            given = [a for a in (mine, exact) if a is not None]
            assert not any(a.any() for a in given), "one side gives a gradient, the other none"
            continue
        a, b = mine.detach().cpu().double(), exact.detach().double()
        assert a.shape == b.shape, f"shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        error = float((a - b).norm() / b.norm().clamp_min(1e-2 * max(b.numel(), 1) ** 0.5))
        found[is_grad] = max(found[is_grad], error if error == error else float("inf"))
    return found[0], found[1]


def near(error: float, grad_error: float, dtype: str) -> bool:
    """Whether both are within their bounds."""
    return error <= BOUNDS[dtype] and grad_error <= 10 * BOUNDS[dtype]


def refused(function: Any, sample: Any, failure: Exception) -> bool:
    """Whether the CPU too refuses these sizes, in the same words."""
    try:
        function(*sample.args, **sample.kwargs)
    except ValueError as refusal:
        return str(refusal) == str(failure)
    return False


def try_case(
    op: str, dtype: str, sizes: tuple[int, ...], seed: int, device: str
) -> Iterator[Record]:
    """A record for each sample of the case."""
    functions = importlib.import_module(f"seqmem_fast.ops.{op}")
    reference = importlib.import_module(f"seqmem_fast.reference.{op}")
    kind = getattr(torch, dtype)
    for sample in reference.sample_inputs(dtype=kind, sizes=sizes, seed=seed):
        name = sample.function or op
        record: Record = {"op": op, "function": name, "sample": sample.name, "dtype": dtype}
        record |= {"sizes": sizes, "seed": seed, "failed": None}
        start = time.perf_counter()
        try:
            given = (sample.args, sample.kwargs)
            right = run(getattr(reference, name), *given, "cpu", wide=True)
            ours = run(getattr(functions, name), *given, device, wide=False)
            record["error"], record["grad_error"] = worst(ours, right)
            if not near(record["error"], record["grad_error"], dtype):
                plain = worst(run(getattr(reference, name), *given, "cpu", wide=False), right)
                record["ill"] = not near(*plain, dtype)
                record["failed"] = None if record["ill"] else "inexact"
        except Exception as failure:  # whatever a compiler or a kernel may say
            if refused(getattr(functions, name), sample, failure):
                continue
            record["failed"] = f"{type(failure).__name__}: {failure}"[:1500]
        record["seconds"] = time.perf_counter() - start
        yield record


def work(args: argparse.Namespace) -> int:
    """One job: cases until the time is up, each sample's record a line of the file."""
    torch.set_num_threads(1)
    end = time.monotonic() + args.seconds
    with args.lines.open("a") as file:
        for op, dtype, sizes, number in cases(args.op, args.work):
            for record in try_case(op, dtype, sizes, number, args.device):
                print(json.dumps(record), file=file, flush=True)
                if record["failed"] and "CUDA error" in record["failed"]:
                    return DIED
                if time.monotonic() > end:
                    return 0
    return 0


def campaign(args: argparse.Namespace, folder: Path) -> list[Record]:
    """All jobs, each started anew with another seed where it dies."""
    end = time.monotonic() + args.seconds
    running: dict[int, subprocess.Popen[bytes]] = {}
    records: list[Record] = []
    deaths = 0

    def start(job: int) -> None:
        left = str(max(end - time.monotonic(), 1.0))
        command = [sys.executable, __file__, "--work", str(args.seed + job + args.jobs * deaths)]
        command += ["--seconds", left, "--lines", str(folder / f"{job}.jsonl")]
        command += ["--device", args.device, "--op", *args.op]
        running[job] = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})

    for job in range(args.jobs):
        start(job)
    while running and time.monotonic() < end + 30:
        time.sleep(0.2)
        for job, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[job]
            if process.returncode != 0 and time.monotonic() < end:
                deaths += 1
                start(job)
    for process in running.values():
        process.kill()
    for file in sorted(folder.glob("*.jsonl")):
        records += [json.loads(line) for line in file.read_text().splitlines()]
    return records


def summary(records: list[Record]) -> str:
    """A line for each op and dtype, then one for each kind of failure, with its first case."""
    lines, groups = [], defaultdict(list)
    for r in records:
        groups[r["op"], r["dtype"]].append(r)
    for (op, dtype), found in sorted(groups.items()):
        ill = sum(r.get("ill", False) for r in found)
        exact = [r for r in found if "error" in r and not r.get("ill")]
        bad = sum(bool(r["failed"]) for r in found)
        worst_of = [max((r[key] for r in exact), default=0.0) for key in ("error", "grad_error")]
        lines.append(
            f"{op:20} {dtype:9} {len(found):4} samples {bad:3} failed   largest error "
            f"{worst_of[0]:.1e}, of gradients {worst_of[1]:.1e}"
            + (f"; {ill} ill-conditioned" if ill else "")
        )
    kinds = defaultdict(list)
    for r in records:
        if r["failed"]:
            kinds[r["op"], r["function"], r["dtype"], r["failed"][:80]].append(r)
    for (op, function, dtype, failed), found in sorted(kinds.items()):
        r = found[0]
        errors = f"{r.get('error', 0):.1e} {r.get('grad_error', 0):.1e}" if "error" in r else ""
        lines.append(
            f"FAILED {len(found)}x {op}.{function} {dtype} {r['sample']} {r['sizes']} seed "
            f"{r['seed']}: {failed} {errors}".replace("\n", " ")
        )
    return "\n".join(lines)


def main() -> int:
    """The campaign, or one job of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--op", nargs="+", default=OPS, choices=OPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda", help="cpu rehearses the campaign")
    parser.add_argument("--json", type=Path, help="all records are kept here")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        return work(args)
    with tempfile.TemporaryDirectory() as folder:
        records = campaign(args, Path(folder))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(records) + "\n")
    print(summary(records))
    return int(not records or any(r["failed"] for r in records))


if __name__ == "__main__":
    sys.exit(main())
