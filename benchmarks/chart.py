"""The ratios of a results file as a chart.

python -m benchmarks.chart benchmarks/results/bench.json docs/images/lstm_speed.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.report import SHORT_DTYPE

COLOURS = {"inference": "#2a6f97", "training step": "#e07a3f"}
FINE = (0.2, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30)
COARSE = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
MARKS = {"ONNX Runtime": "o", "JAX lax.scan": "^"}


def ratios(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """row -> mode -> peer -> ratio, rows in the order measured."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for r in results:
        row = f"{r['row']}  {SHORT_DTYPE.get(r['dtype'], r['dtype'])}"
        out.setdefault(row, {}).setdefault(r["mode"], {})[r["peer"]] = r["ratio"]
    return out


def first_table(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table to draw: of a main job's several the first, which is the default regime's."""
    tables: Sequence[Mapping[str, Any]] = document.get("tables", [document])
    return tables[0]


def draw(document: Mapping[str, Any]) -> Any:
    """A matplotlib Figure: bars against torch, marks against the other peers, a line at 1."""
    from matplotlib.figure import Figure

    rows = ratios(document["results"])
    figure = Figure(figsize=(9, 1.6 + 0.46 * len(rows)), layout="constrained")
    axes = figure.subplots()
    height = 0.38
    for place, by_mode in enumerate(rows.values()):
        for mode, by_peer in by_mode.items():
            y = place + (height / 2 if mode == "training step" else -height / 2)
            for peer, ratio in by_peer.items():
                if peer in MARKS:
                    axes.plot(ratio, y, MARKS[peer], mfc="white", mec="#333333", ms=6, zorder=4)
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
    _style(axes, list(rows), document["machine"])
    return figure


def _style(axes: Any, names: list[str], here: Mapping[str, Any]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
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
    axes.set_xlabel("their time / ours (log scale; right of the line: seqmem_fast is faster)")
    axes.set_title("LSTM (T, B, I, H): speed against torch\n", loc="left", fontweight="bold")
    axes.text(
        0, 1.015, machine.one_line(here), transform=axes.transAxes, fontsize=8, color="#555555"
    )
    handles: list[Any] = [Patch(color=colour, label=mode) for mode, colour in COLOURS.items()]
    handles += [
        Line2D([], [], marker=mark, ls="", mfc="white", mec="#333333", label=f"against {peer}")
        for peer, mark in MARKS.items()
    ]
    axes.figure.legend(
        handles=handles, fontsize=8, loc="outside lower center", ncols=4, frameon=False
    )


def save(document: Mapping[str, Any], path: Path) -> None:
    """Draws into a file; its suffix names the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(document).savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """A chart from a results file."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.chart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args(argv)
    save(first_table(json.loads(args.results.read_text())), args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
