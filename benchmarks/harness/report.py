"""One record per measured row, and its two faces: a table to read and JSON to keep."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.harness import machine

SCHEMA = 2
SHORT_DTYPE = {"float32": "fp32", "bfloat16": "bf16"}
WIDE = [
    "peer's error",
    "first call\npeer / ours",
    "page faults a call\npeer / ours",
    "spread\npeer / ours",
]


@dataclass(frozen=True)
class Result:
    """Ours against one peer; times are medians in seconds, `ratio` is theirs over ours."""

    row: str
    op: str
    shape: str
    dtype: str
    mode: str  # "inference" or "training step"
    peer: str
    peer_s: float
    ours_s: float
    ratio: float
    goal: float | None  # the ratio this project asks of itself; None where it only reports
    peer_first_s: float
    ours_first_s: float
    peer_error: float | None  # largest relative error against float64; None if not comparable
    ours_error: float | None
    peer_samples: int
    ours_samples: int
    peer_calls: int
    ours_calls: int
    peer_faults: float  # page faults per call
    ours_faults: float
    peer_spread: float  # interquartile range over the median
    ours_spread: float
    threads: int
    malloc: str
    peer_compile_s: float | None = None  # a compiled peer's first call, in none of the other times


def document(
    job: str,
    description: Mapping[str, Any],
    results: Sequence[Result],
    left_out: Sequence[str],
    letters: str,
) -> dict[str, Any]:
    """The JSON document of a job: schema number, machine, rows, what was left out and why.

    `letters` names the sizes of a shape: "T, B, I, H".
    """
    rows = [asdict(result) for result in results]
    return {
        "schema": SCHEMA,
        "job": job,
        "machine": dict(description),
        "letters": letters,
        "results": rows,
        "left_out": list(left_out),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes whole or not at all, so that an interrupted run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of `python -m program`, its description printed as it is written."""
    return argparse.ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def duration(seconds: float) -> str:
    """ "3.1 us", "42 ms" or "1.8 s"."""
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 1000 * scale:
            value = seconds / scale
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return f"{seconds:.2f} s"


def scale_of(value: float | None) -> str:
    """ "3e-07", or nothing."""
    return "" if value is None else f"{value:.0e}"


def compiling(seconds: float) -> str:
    """ "compiled in 42 s"."""
    return f"compiled in {seconds:.0f} s"


def verdict(result: Result) -> str:
    """The ratio, green where it meets its goal (or 1.0 where none is set), red where not."""
    colour = "green" if result.ratio >= (result.goal or 1.0) else "red"
    return f"[{colour}]{result.ratio:.2f}[/{colour}]"


def table(results: Sequence[Result], title: str, letters: str, wide: bool = False) -> Table:
    """One line for each result; `wide` adds what else was measured beside the times."""
    out = Table(
        title=f"{title}\nshape: {letters}",
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("op, shape, dtype", "mode"):
        out.add_column(name, no_wrap=True)
    out.add_column("peer", min_width=12)  # the one that gives way where room is short
    for name in ["peer's", "ours", "ratio", "goal", "error", "n", *(WIDE if wide else [])]:
        out.add_column(name, justify="right", no_wrap=True)
    last = ("", "")
    for r in results:
        here = (f"{r.row}  {SHORT_DTYPE.get(r.dtype, r.dtype)}", r.mode)
        if here[0] != last[0] and last[0]:
            out.add_section()
        cells = [
            "" if here[0] == last[0] else here[0],
            "" if here == last else r.mode,
            r.peer if r.peer_compile_s is None else f"{r.peer} ({compiling(r.peer_compile_s)})",
            duration(r.peer_s),
            duration(r.ours_s),
            verdict(r),
            f"{r.goal:g}" if r.goal else "",
            scale_of(r.ours_error),
            str(r.peer_samples),
        ]
        if wide:
            cells += [
                scale_of(r.peer_error),
                f"{duration(r.peer_first_s)} / {duration(r.ours_first_s)}",
                f"{r.peer_faults:.0f} / {r.ours_faults:.0f}",
                f"{r.peer_spread:.0%} / {r.ours_spread:.0%}",
            ]
        out.add_row(*cells)
        last = here
    return out


def print_table(
    console: Console, results: Sequence[Result], left_out: Sequence[str], title: str, letters: str
) -> None:
    """The table, how to read it, and every row that was left out, with the reason."""
    console.print(table(results, title, letters, wide=console.width >= 180))
    console.print(
        "times: medians of n samples; ratio: peer's time / ours, goal: what this project "
        "asks of it; error: ours against float64, the largest relative one",
        style="dim",
        highlight=False,
    )
    for line in left_out:
        console.print(f"left out: {line}", style="yellow", highlight=False)


def console() -> Console:
    """The terminal, or 120 columns where the output goes to a file; warns on a busy machine."""
    out = Console()
    out = out if out.is_terminal else Console(width=max(out.width, 120))
    warning = machine.busy()
    if warning:
        out.print(warning, style="bold yellow", highlight=False)
    return out


def progress_bar(console: Console) -> Progress:
    """Description, bar, count and time, gone when done."""
    return Progress(
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
