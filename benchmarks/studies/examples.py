"""Runs the programs under examples/ and keeps the figures that README quotes of them.

python -m benchmarks.studies.examples [dates glimpse babi] [--json PATH]
"""

from __future__ import annotations

import runpy
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine, report

FOLDER = machine.ROOT / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
WAYS: dict[str, tuple[list[str], ...]] = {"babi": ([], ["--model", "dnc"])}  # other than as it is


def run(name: str, options: Sequence[str]) -> dict[str, Any]:
    """What an example's main returns, with its own defaults; the picture is thrown away."""
    start, cpu_start = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        program = runpy.run_path(str(FOLDER / f"{name}.py"))
        figures = program["main"]([*options, "--out", str(Path(folder) / "picture.png")])
    seconds = round(time.perf_counter() - start, 1)
    cpu = round(time.process_time() - cpu_start, 1)
    named = {"example": name, "options": list(options)}
    return {**named, "figures": figures, "seconds": seconds, "cpu_s": cpu}


def main(argv: Sequence[str] | None = None) -> int:
    """One after the other; the JSON is rewritten after each."""
    parser = report.parser("benchmarks.studies.examples", __doc__)
    parser.add_argument("names", nargs="*", metavar="example", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "examples.json")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"no example is called {', '.join(sorted(unknown))}")
    content: dict[str, Any] = {"job": "examples", "machine": machine.describe(), "results": []}
    for name in args.names or NAMES:
        for options in WAYS.get(name, ([],)):
            torch.manual_seed(0)
            content["results"].append(run(name, options))
            report.write_json(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
