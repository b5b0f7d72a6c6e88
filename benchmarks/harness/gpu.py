"""Rows on a GPU: every bench_<op>.py's GPU_ROWS, ours beside torch's, compiled too where declared.

    python -m benchmarks.harness.gpu [--op lstm ntm] [--rows TEXT] [--tf32] [--compiled]
                                     [--graphs] [--samples 50] [--limit-s 600] [--jobs 8]
                                     [--json PATH]
                                     [--device cpu]      rehearses all of it without a GPU

First all sides of all rows are called once, `--jobs` rows at a time: that compiles the kernels and
compares the values with float64. A side that fails is reported and left out. Then the rows are
timed one after another. Times are medians between CUDA events around one call, the GPU idle before
each, so that the launches count as they do for a user who waits for the result. The JSON is written
anew after each row: a run that is stopped loses nothing.

With --graphs, each call is also captured into a CUDA graph, whose replay is timed: the GPU's own
time, without the host's. A side that cannot be captured has no such time.

With --compiled, torch.compile is the only peer, since it takes longest to start.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import machine, report
from benchmarks.harness.rows import COMPILED, OURS, Contender, Row, error

Record = dict[str, Any]  # of one side of a row
ROW_S = 0.8  # of timing, all sides of a row together; five samples of each at least
REPLAY_S = 0.3  # the same of replayed graphs, which vary less


def event_s(call: Callable[[Any], Any], given: Any) -> float:
    """One call between two events, from an idle GPU; by the clock where there is none."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        call(given)
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call(given)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def set_precision(tf32: bool) -> None:
    """For all sides: cuDNN takes TF32 unless told not to, matrix products not unless told to."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


def start_worker(tf32: bool) -> None:
    """One of several processes, so with one CPU thread."""
    torch.set_num_threads(1)
    set_precision(tf32)


def sides(
    row: Row, device: str, compiled: bool
) -> tuple[Any, Callable[[Any], list[Tensor]] | None, dict[str, Callable[[], Contender]]]:
    """A row's sample, what float64 makes of it, and its sides: ours first."""
    built = row.build(device)
    names = [name for name in built.contenders if (name == COMPILED) == compiled and name != OURS]
    return built.sample(0), built.exact, {n: built.contenders[n] for n in (OURS, *names)}


def first_calls(row: Row, device: str = "cuda", compiled: bool = False) -> list[Record]:
    """One record for each side: the seconds and the error of its first call, or why it failed."""
    given, exact, makers = sides(row, device, compiled)
    right = exact(given) if exact else None
    labels = {"op": row.op, "row": row.label, "dtype": row.dtype, "mode": row.mode}
    records = []
    for name, make in makers.items():
        record: Record = {**labels, "side": name, "failed": None, "error": None, "first_s": None}
        start = time.perf_counter()
        try:
            side = make()
            values = [value.cpu() for value in side.values(side.prepare(given))]  # waits
            record["error"] = None if right is None else error(values, [r.cpu() for r in right])
        except Exception as failure:  # whatever a compiler or a kernel may say
            record["failed"] = f"{type(failure).__name__}: {failure}".strip()[:2000]
        record["first_s"] = time.perf_counter() - start
        records.append(record)
    gc.collect()
    if device == "cuda" and not any(record["failed"] for record in records):
        torch.cuda.empty_cache()
    return records


def captured(side: Contender, given: Any) -> Callable[[Any], None] | None:
    """A call as the replay of a CUDA graph; None where it cannot be captured."""
    if not torch.cuda.is_available():
        return None
    graph = torch.cuda.CUDAGraph()
    beside = torch.cuda.Stream()
    try:
        with torch.cuda.stream(beside):  # what a capture must not meet for the first time
            side.call(given)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            side.call(given)
    except Exception:  # whatever a peer or an op may say: then there is no such time
        torch.cuda.synchronize()
        return None
    return lambda _: graph.replay()


def time_row(
    row: Row,
    records: Sequence[Record],
    samples: int,
    device: str = "cuda",
    compiled: bool = False,
    graphs: bool = False,
) -> None:
    """Adds the times of a row's sides, taking turns, to the records of their first calls."""
    given, _, makers = sides(row, device, compiled)
    working = [r for r in records if not r["failed"]]
    ready = {r["side"]: (side := makers[r["side"]](), side.prepare(given)) for r in working}
    calls = {name: (side.call, prepared) for name, (side, prepared) in ready.items()}
    medians = in_turns(calls, samples, ROW_S)
    for record in working:
        median, count = medians[record["side"]]
        record |= {"median_s": median, "samples": count}
    replays: dict[str, tuple[Callable[[Any], Any], Any]] = {}
    for name, (side, prepared) in ready.items() if graphs else ():
        replay = captured(side, prepared)
        if replay is not None:
            replays[name] = (replay, None)
    replayed = in_turns(replays, samples, REPLAY_S)
    for record in working:
        record["replay_s"] = replayed.get(record["side"], (None, 0))[0]
    for key in ("median_s", "replay_s"):
        ours = next((r.get(key) for r in working if r["side"] == OURS), None)
        for record in working:
            theirs = record.get(key)
            ratio = theirs / ours if ours and theirs else None
            record["ratio" if key == "median_s" else "replay_ratio"] = ratio


def in_turns(
    calls: Mapping[str, tuple[Callable[[Any], Any], Any]], samples: int, limit_s: float
) -> dict[str, tuple[float, int]]:
    """The median of each call and how many were timed, calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call, given in calls.values():
        for _ in range(3):
            call(given)
    start = time.perf_counter()
    for count in range(samples):
        if count >= 5 and time.perf_counter() - start > limit_s:
            break
        for name, (call, given) in calls.items():
            times[name].append(event_s(call, given))
    return {name: (statistics.median(found), len(found)) for name, found in times.items()}


def describe() -> dict[str, Any]:
    """The GPU and the libraries that a number depends on."""
    if not torch.cuda.is_available():
        return {"name": "no GPU: a rehearsal on the CPU"}
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


def by_row(
    results: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Each row's record of ours, and those of its peers."""
    peers: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for r in results:
        peers.setdefault((r["row"], r["dtype"], r["mode"], r["op"]), []).append(r)
    for found in peers.values():
        ours = [r for r in found if r["side"] == OURS]
        yield from ((each, [r for r in found if r is not each]) for each in ours[:1])


def table(results: Sequence[Record], title: str) -> Table:
    """A line for each row: our time and error, and how many times slower each peer is.

    In brackets: of the replayed graphs.
    """
    out = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("row", "mode", "ours", "error", "first", "peers: times ours (error)"):
        out.add_column(name, justify="right" if name in ("ours", "error", "first") else "left")
    for ours, peers in by_row(results):
        shown = []
        for r in peers:
            if r["failed"]:
                shown.append(f"{r['side']} FAILED: {r['failed'].splitlines()[0][:60]}")
            elif r.get("ratio") is not None:
                wrong = f" ({r['error']:.0e})" if r["error"] is not None else ""
                alone = r.get("replay_ratio")
                on_gpu = "" if alone is None else f" [{alone:.2f}]"
                shown.append(f"{r['side']} {r['ratio']:.2f}{on_gpu}{wrong}")
        took = "" if ours.get("median_s") is None else report.duration(ours["median_s"])
        if ours.get("replay_s") is not None:
            took += f" [{report.duration(ours['replay_s'])}]"
        if ours["failed"]:
            took = "FAILED: " + ours["failed"].splitlines()[0][:100]
        out.add_row(
            f"{ours['row']} {report.SHORT_DTYPE.get(ours['dtype'], ours['dtype'])}",
            ours["mode"].split()[0],
            took,
            report.scale_of(ours["error"]),
            report.duration(ours["first_s"]),
            "; ".join(shown),
        )
    return out


def died(row: Row, reason: Exception) -> list[Record]:
    """The record of a row whose process ended before it could answer."""
    labels = {"op": row.op, "row": row.label, "dtype": row.dtype, "mode": row.mode}
    nothing = {"error": None, "first_s": 0.0}
    return [{**labels, "side": OURS, "failed": f"its process died: {reason}", **nothing}]


def run(
    rows: Sequence[Row], args: Any, console: Console, keep: Callable[[list[Record]], None]
) -> list[Record]:
    """All rows: first calls side by side, then times one after another until the limit."""
    end = time.perf_counter() + args.limit_s
    found: list[list[Record]] = []
    context = multiprocessing.get_context("spawn")
    with (
        report.progress_bar(console) as bar,
        ProcessPoolExecutor(args.jobs, context, start_worker, (args.tf32,)) as pool,
    ):
        task = bar.add_task("first calls", total=len(rows))
        for row, first in [
            (row, pool.submit(first_calls, row, args.device, args.compiled)) for row in rows
        ]:
            try:
                found.append(first.result())
            except BrokenProcessPool as reason:
                found.append(died(row, reason))
            bar.advance(task)
            keep([record for records in found for record in records])
    results = [record for records in found for record in records]
    with report.progress_bar(console) as bar:
        task = bar.add_task("", total=len(rows))
        for row, records in zip(rows, found, strict=True):
            bar.update(task, description=str(row))
            if time.perf_counter() < end:
                time_row(row, records, args.samples, args.device, args.compiled, args.graphs)
                keep(results)
            bar.advance(task)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table and keeps the JSON; 1 if a side of ours failed."""
    parser = report.parser("benchmarks.harness.gpu", __doc__)
    parser.add_argument("--op", nargs="+", default=machine.ops(), choices=machine.ops())
    parser.add_argument("--rows", default="", help="only rows whose name holds this text")
    parser.add_argument("--samples", type=int, default=50, help="of each side of a row")
    parser.add_argument("--tf32", action="store_true", help="let all sides round float32 to TF32")
    parser.add_argument("--compiled", action="store_true", help="beside torch.compile alone")
    parser.add_argument("--graphs", action="store_true", help="time replayed graphs as well")
    parser.add_argument("--limit-s", type=float, default=600.0, help="no row is timed after it")
    parser.add_argument("--jobs", type=int, default=8, help="processes that make first calls")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "gpu.json")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")

    set_precision(args.tf32)
    console = report.console()
    declared = [row for op in args.op for row in import_module(f"benchmarks.bench_{op}").GPU_ROWS]
    rows = [row for row in declared if args.rows in str(row)]
    if args.compiled:
        rows = [row for row in rows if row.work().compile_with is not None]
    here = {**machine.describe(), "gpu": describe()}

    def keep(results: Sequence[Mapping[str, Any]]) -> None:
        content = {"schema": report.SCHEMA, "job": "gpu", "machine": here, "results": results}
        report.write_json(args.json, content)

    results = run(rows, args, console, keep)
    console.print(table(results, here["gpu"]["name"]))
    return int(any(r["failed"] for r in results if r["side"] == OURS))


if __name__ == "__main__":
    sys.exit(main())
