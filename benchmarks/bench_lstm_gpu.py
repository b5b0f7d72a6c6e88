"""LSTM rows on a GPU: nn.LSTM on cuDNN, the plain PyTorch reference and this package.

python -m benchmarks.bench_lstm_gpu [--rows TEXT] [--samples 50] [--tf32] [--json PATH]

Times are medians between CUDA events around one call, the GPU idle before each, so that the
launches from Python count as they do for a user who waits for the result.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import machine, report
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
from benchmarks.rows import OURS, Contender, error
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


def event_s(call: Callable[[Any], Any], given: Any) -> float:
    """One call between two events, from an idle GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call(given)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def measure(row: Row, mode: str, samples: int, limit_s: float = 20.0) -> list[dict[str, Any]]:
    """One record for each side, the sides taking turns; first calls (compilation) apart."""
    given = on_gpu(sample(row, mode, 0))
    exact = truth(row, mode, sample(row, mode, 0))
    contenders: dict[str, Contender] = {
        name: MODES[mode](name, module, forward) for name, (module, forward) in sides(row).items()
    }
    first, errors = {}, {}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for name, side in contenders.items():
        start = time.perf_counter()
        values = side.values(given)
        torch.cuda.synchronize()
        first[name] = time.perf_counter() - start
        errors[name] = error([value.cpu() for value in values], exact)
        for _ in range(3):
            side.call(given)
    start = time.perf_counter()
    for _ in range(samples):
        for name, side in contenders.items():
            times[name].append(event_s(side.call, given))
        if time.perf_counter() - start > limit_s and len(times[OURS]) >= 5:
            break
    ours = statistics.median(times[OURS])
    return [
        {
            "row": row.name,
            "shape": [row.t, row.b, row.i, row.h],
            "dtype": row.dtype_name,
            "mode": mode,
            "side": name,
            "median_s": statistics.median(values),
            "ratio": statistics.median(values) / ours,
            "first_s": first[name],
            "error": errors[name],
            "samples": len(values),
        }
        for name, values in times.items()
    ]


def gpu() -> dict[str, Any]:
    """The GPU and the libraries that a number depends on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def table(results: Sequence[dict[str, Any]], title: str) -> Table:
    """Times, and how many times slower than ours."""
    out = Table(title=title, title_justify="left")
    for name in ("row", "mode", "side", "median", "ratio", "first call", "error"):
        out.add_column(name, justify="left" if name in ("row", "mode", "side") else "right")
    for r in results:
        if r["side"] == OURS and out.row_count:
            out.add_section()
        label = f"{r['row']} {report.SHORT_DTYPE.get(r['dtype'], r['dtype'])}"
        times = (report.duration(r["median_s"]), f"{r['ratio']:.2f}", report.duration(r["first_s"]))
        out.add_row(label, r["mode"], r["side"], *times, f"{r['error']:.0e}")
    return out


def run(rows: Sequence[Row], samples: int, console: Console) -> list[dict[str, Any]]:
    """All rows in both modes."""
    results: list[dict[str, Any]] = []
    work = [(row, mode) for row in rows for mode in MODES]
    with report.progress_bar(console) as bar:
        task = bar.add_task("", total=len(work))
        for row, mode in work:
            bar.update(task, description=f"{row.name} {row.dtype_name} {mode}")
            found = measure(row, mode, samples)
            results += sorted(found, key=lambda r: str(r["side"]) != OURS)
            bar.advance(task)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table and keeps the JSON."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.bench_lstm_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", default="", help="only rows whose name holds this text")
    parser.add_argument("--samples", type=int, default=50, help="of each side of a row")
    parser.add_argument("--tf32", action="store_true", help="let both sides round float32 to TF32")
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "lstm_gpu.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")

    # cuDNN takes TF32 unless told not to, and matrix products do not unless told to.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    console = report.console()
    rows = [row for row in ROWS if args.rows in f"{row.name} {row.dtype_name}"]
    results = run(rows, args.samples, console)
    here = {**machine.describe(), "gpu": gpu()}
    content = {"schema": report.SCHEMA, "job": "lstm_gpu", "machine": here, "results": results}
    report.write_json(args.json, content)
    console.print(table(results, here["gpu"]["name"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
