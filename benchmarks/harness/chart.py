"""The ratios of a results file as a chart, one panel for each op.

python -m benchmarks.harness.chart benchmarks/results/bench.json docs/images/speed.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import machine, report
from benchmarks.harness.report import SHORT_DTYPE

COLOURS = {"inference": "#2a6f97", "training step": "#e07a3f"}
FINE = (0.2, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30)
COARSE = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
MARKS = {"ONNX Runtime": "o", "JAX lax.scan": "^"}
OTHER = "D"


def ratios(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """row -> mode -> peer -> ratio, rows in the order measured."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for r in results:
        row = f"{r['row']}  {SHORT_DTYPE.get(r['dtype'], r['dtype'])}"
        out.setdefault(row, {}).setdefault(r["mode"], {})[r["peer"]] = r["ratio"]
    return out


def first_tables(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One table for each op; of several the first, which is the default regime's."""
    found: dict[str, Mapping[str, Any]] = {}
    for table in document.get("tables", [document]):
        if table["results"]:
            found.setdefault(table["job"], table)
    return list(found.values())


def draw(tables: Sequence[Mapping[str, Any]]) -> Any:
    """A matplotlib Figure: bars against the main peers, marks against others, a line at 1."""
    from matplotlib.figure import Figure

    counts = [len(ratios(table["results"])) for table in tables]
    height = 1.2 + sum(0.46 * count + 0.7 for count in counts)
    figure = Figure(figsize=(9, height), layout="constrained")
    panels = figure.subplots(len(tables), squeeze=False, height_ratios=[n + 0.5 for n in counts])
    for axes, table in zip(panels[:, 0], tables, strict=True):
        _panel(axes, table)
    panels[-1, 0].set_xlabel(
        "their time / ours (log scale; right of the line: seqmem_fast is faster)"
    )
    figure.suptitle(
        machine.one_line(tables[0]["machine"]), fontsize=8, color="#555555", x=0.01, ha="left"
    )
    _legend(figure, tables)
    return figure


def _panel(axes: Any, table: Mapping[str, Any]) -> None:
    rows = ratios(table["results"])
    height = 0.38
    for place, by_mode in enumerate(rows.values()):
        for mode, by_peer in by_mode.items():
            y = place + (height / 2 if mode == "training step" else -height / 2)
            main = next((peer for peer in by_peer if peer not in MARKS), None)
            for peer, ratio in by_peer.items():
                if peer != main:
                    mark = MARKS.get(peer, OTHER)
                    axes.plot(ratio, y, mark, mfc="white", mec="#333333", ms=6, zorder=4)
                    continue
                axes.barh(y, ratio - 1, height, left=1, color=COLOURS[mode], zorder=2)
                text = axes.annotate(
                    f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}",
                    (ratio, y),
                    xytext=(4 if ratio >= 1 else -4, 0),
                    fontsize=8,
                    va="center",
                    textcoords="offset points",
                    zorder=5,
                    ha="left" if ratio >= 1 else "right",
                )
                text.set_bbox({"fc": "white", "ec": "none", "pad": 0.6, "alpha": 0.8})
    axes.axvline(1, color="#333333", lw=1.2, zorder=3)
    _style(axes, list(rows))
    axes.set_title(f"{table['job']} ({table['letters']})", loc="left", fontweight="bold")


def _style(axes: Any, names: list[str]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.85), high * 1.25)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (FINE if high / low < 30 else COARSE) if low <= tick <= high]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd", lw=0.7, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _legend(figure: Any, tables: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colour, label=mode) for mode, colour in COLOURS.items()]
    peers = {row["peer"] for table in tables for row in table["results"]}
    marks = {mark: f"against {peer}" for peer, mark in MARKS.items() if peer in peers}
    if any(
        len(peers.keys() - MARKS.keys()) > 1
        for table in tables
        for modes in ratios(table["results"]).values()
        for peers in modes.values()
    ):
        marks[OTHER] = "against a second peer"
    handles += [
        Line2D([], [], marker=mark, ls="", mfc="white", mec="#333333", label=label)
        for mark, label in marks.items()
    ]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=5, frameon=False)


def save(tables: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws into a file; its suffix names the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(tables).savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """A chart from a results file."""
    parser = report.parser("benchmarks.harness.chart", __doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--op", help="its panel alone")
    args = parser.parse_args(argv)
    tables = first_tables(json.loads(args.results.read_text()))
    chosen = [table for table in tables if args.op in (None, table["job"])]
    if not chosen:
        parser.error(f"no row of {args.op or 'any op'} in {args.results}")
    save(chosen, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
