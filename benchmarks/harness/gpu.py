"""Rows on a GPU: every bench_<op>.py's GPU_ROWS, ours beside torch's, compiled too where declared.

    python -m benchmarks.harness.gpu [--op lstm ntm] [--rows TEXT] [--samples 50] [--tf32]

The work of a row is moved to the GPU; errors are against float64 on the CPU. Times are medians
between CUDA events around one call, the GPU idle before each, so that the launches from Python
count as they do for a user who waits for the result.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import machine, report
from benchmarks.harness.rows import OURS, Contender, Row, error

Record = dict[str, Any]  # of one side of a row


def event_s(call: Callable[[Any], Any], given: Any) -> float:
    """One call between two events, from an idle GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call(given)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def turns(
    contenders: Mapping[str, Contender],
    given: Any,
    exact: Sequence[Tensor] | None,
    samples: int,
    limit_s: float = 20.0,
) -> list[Record]:
    """One record for each side, the sides taking turns; first calls (compilation) separate."""
    first, errors = {}, {}
    prepared = {name: side.prepare(given) for name, side in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for name, side in contenders.items():
        start = time.perf_counter()
        values = [value.cpu() for value in side.values(prepared[name])]  # waits for the GPU
        first[name] = time.perf_counter() - start
        errors[name] = None if exact is None else error(values, exact)
        for _ in range(3):
            side.call(prepared[name])
    start = time.perf_counter()
    for _ in range(samples):
        for name, side in contenders.items():
            times[name].append(event_s(side.call, prepared[name]))
        if time.perf_counter() - start > limit_s and len(times[OURS]) >= 5:
            break
    ours = statistics.median(times[OURS])
    return [
        {
            "side": name,
            "median_s": statistics.median(values),
            "ratio": statistics.median(values) / ours,
            "first_s": first[name],
            "error": errors[name],
            "samples": len(values),
        }
        for name, values in times.items()
    ]


def describe() -> dict[str, Any]:
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


def table(results: Sequence[Record], title: str) -> Table:
    """Times, and how many times slower than ours."""
    out = Table(title=title, title_justify="left")
    for name in ("row", "mode", "side", "median", "ratio", "first call", "error"):
        out.add_column(name, justify="left" if name in ("row", "mode", "side") else "right")
    for r in results:
        if r["side"] == OURS and out.row_count:
            out.add_section()
        label = f"{r['row']} {report.SHORT_DTYPE.get(r['dtype'], r['dtype'])}"
        times = (report.duration(r["median_s"]), f"{r['ratio']:.2f}", report.duration(r["first_s"]))
        wrong = "" if r["error"] is None else f"{r['error']:.0e}"
        out.add_row(label, r["mode"], r["side"], *times, wrong)
    return out


def measure(row: Row, samples: int, device: str = "cuda") -> list[Record]:
    """One record for each side, ours first."""
    built = row.build(device)
    given = built.sample(0)
    exact = built.exact(given) if built.exact else None  # before the modules leave the CPU
    sides = {name: make() for name, make in built.contenders.items()}
    labels = {"op": row.op, "row": row.label, "dtype": row.dtype, "mode": row.mode}
    found = [{**labels, **record} for record in turns(sides, given, exact, samples)]
    return sorted(found, key=lambda record: str(record["side"]) != OURS)


def run(rows: Sequence[Row], samples: int, console: Console) -> list[Record]:
    """All rows."""
    results: list[Record] = []
    with report.progress_bar(console) as bar:
        task = bar.add_task("", total=len(rows))
        for row in rows:
            bar.update(task, description=str(row))
            results += measure(row, samples)
            bar.advance(task)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table and keeps the JSON."""
    parser = report.parser("benchmarks.harness.gpu", __doc__)
    parser.add_argument("--op", nargs="+", default=machine.ops(), choices=machine.ops())
    parser.add_argument("--rows", default="", help="only rows whose name holds this text")
    parser.add_argument("--samples", type=int, default=50, help="of each side of a row")
    parser.add_argument("--tf32", action="store_true", help="let all sides round float32 to TF32")
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "gpu.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")

    # cuDNN takes TF32 unless told not to, and matrix products do not unless told to.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    console = report.console()
    declared = [row for op in args.op for row in import_module(f"benchmarks.bench_{op}").GPU_ROWS]
    results = run([row for row in declared if args.rows in str(row)], args.samples, console)
    here = {**machine.describe(), "gpu": describe()}
    content = {"schema": report.SCHEMA, "job": "gpu", "machine": here, "results": results}
    report.write_json(args.json, content)
    console.print(table(results, here["gpu"]["name"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
