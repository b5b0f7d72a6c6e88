"""A results file's tables as Markdown, as the README shows them.

python -m benchmarks.harness.markdown benchmarks/results/bench.json [--op lstm]

Of a file that benchmarks.harness.gpu wrote, the rows on a GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import chart, gpu, report
from benchmarks.harness.report import SHORT_DTYPE, compiling, duration
from benchmarks.harness.rows import MODES

Results = Sequence[Mapping[str, Any]]


def cell(result: Mapping[str, Any] | None) -> str:
    """ "12 ms → 3.1 ms, **3.9** (goal 3)", or nothing."""
    if result is None:
        return ""
    times = f"{duration(result['peer_s'])} → {duration(result['ours_s'])}"
    goal = f" (goal {result['goal']:g})" if result["goal"] else ""
    compile_s = result.get("peer_compile_s")
    compiled = f"; {compiling(compile_s)}" if compile_s else ""
    return f"{times}, **{result['ratio']:.2f}**{goal}{compiled}"


def table(letters: str, results: Results) -> str:
    """One line for each shape and peer, one column for each mode."""
    lines: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for r in results:
        row = r["row"] if r["dtype"] == "float32" else f"{r['row']} {SHORT_DTYPE[r['dtype']]}"
        lines.setdefault((row, r["peer"]), {})[r["mode"]] = r
    out = [f"| row ({letters}) | against | {' | '.join(MODES)} |", "|---|---|---|---|"]
    for (row, peer), by_mode in lines.items():
        cells = [cell(by_mode.get(mode)) for mode in MODES]
        out.append(f"| {row} | {peer} | {' | '.join(cells)} |")
    return "\n".join(out).replace(" us", " µs")


def gpu_cell(ours: Mapping[str, Any] | None, peers: Results) -> str:
    """ "1.6 ms [1.2 ms]; eager **48.0** [3.1]": our time, and how many times that each peer takes.

    In brackets: of the replayed graphs, where they were timed.
    """
    if ours is None or ours.get("median_s") is None:
        return ""

    def bracket(text: str | None) -> str:
        return f" [{text}]" if text else ""

    def replayed(ratio: float | None) -> str:
        return bracket(None if ratio is None else f"{ratio:.2f}")

    own = duration(ours["median_s"])
    if ours.get("replay_s"):
        own += bracket(duration(ours["replay_s"]))
    ratios = [
        f"{r['side']} **{r['ratio']:.2f}**{replayed(r.get('replay_ratio'))}"
        for r in peers
        if r.get("ratio") is not None
    ]
    return "; ".join([own, *ratios])


def gpu_table(results: Results) -> str:
    """One line for each row, one column for each mode."""
    lines: dict[str, dict[str, str]] = {}
    for ours, peers in gpu.by_row(results):
        row = f"{ours['row']} {SHORT_DTYPE.get(ours['dtype'], ours['dtype'])}"
        lines.setdefault(row, {})[ours["mode"]] = gpu_cell(ours, peers)
    out = [f"| row | {' | '.join(MODES)} |", "|---|---|---|"]
    out += [f"| {row} | {' | '.join(c.get(m, '') for m in MODES)} |" for row, c in lines.items()]
    return "\n".join(out).replace(" us", " µs")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables, the first of each op."""
    parser = report.parser("benchmarks.harness.markdown", main.__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--op", help="this op's table alone")
    args = parser.parse_args(argv)
    content = json.loads(args.results.read_text())
    if content.get("job") == "gpu":
        print(gpu_table([r for r in content["results"] if args.op in (None, r["op"])]))
        return 0
    tables = chart.first_tables(content)
    wanted = [t for t in tables if args.op in (None, t["job"])]
    print("\n\n".join(table(t["letters"], t["results"]) for t in wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
