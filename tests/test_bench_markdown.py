"""Results as Markdown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks" / "harness" / "markdown.py").is_file():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)
sys.path.append(str(ROOT))  # last, so that an installed seqmem_fast stays the one tested

from benchmarks.harness import markdown  # noqa: E402


def result(**changed: Any) -> dict[str, Any]:
    out = {"row": "LSTM 1, 1, 64, 64", "dtype": "float32", "mode": "inference", "peer": "nn.LSTM"}
    return {**out, "peer_s": 12e-6, "ours_s": 3e-6, "ratio": 4.0, "goal": 7.0, **changed}


def test_a_line_holds_both_modes_of_a_row_and_peer() -> None:
    results = [
        result(),
        result(mode="training step", ratio=2.5, goal=None),
        result(peer="ONNX Runtime", goal=None),
        result(dtype="bfloat16"),
    ]
    lines = markdown.table("T, B, I, H", results).splitlines()
    assert lines[0] == "| row (T, B, I, H) | against | inference | training step |"
    first = "12.0 µs → 3.00 µs, **4.00** (goal 7) | 12.0 µs → 3.00 µs, **2.50** |"
    assert lines[2] == f"| LSTM 1, 1, 64, 64 | nn.LSTM | {first}"
    assert lines[3] == "| LSTM 1, 1, 64, 64 | ONNX Runtime | 12.0 µs → 3.00 µs, **4.00** |  |"
    assert lines[4].startswith("| LSTM 1, 1, 64, 64 bf16 | nn.LSTM | ")
    assert len(lines) == 5


def test_only_the_op_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = [
        {"job": job, "letters": "T", "results": [result(row=f"row of {job}")]}
        for job in ("lstm", "ntm")
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"tables": tables}))
    assert markdown.main([str(path), "--op", "ntm"]) == 0
    printed = capsys.readouterr().out
    assert "row of ntm" in printed and "row of lstm" not in printed
    assert markdown.main([str(path)]) == 0
    assert "row of lstm" in capsys.readouterr().out


def test_rows_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = {"op": "lstm", "row": "LSTM 2, 3", "dtype": "bfloat16", "failed": None}
    ours = {**labels, "side": "ours", "median_s": 2e-3, "ratio": 1.0}
    peer = {**labels, "side": "nn.LSTM", "median_s": 5e-3, "ratio": 2.5}
    slow = {**labels, "side": "slow", "failed": "out of memory"}
    results = [{**r, "mode": "inference"} for r in (ours, peer, slow)]
    results += [{**ours, "mode": "training step", "median_s": 3e-6}]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"job": "gpu", "results": results}))
    assert markdown.main([str(path), "--op", "lstm"]) == 0
    head, _, line = capsys.readouterr().out.splitlines()
    assert head == "| row | inference | training step |"
    assert line == "| LSTM 2, 3 bf16 | 2.00 ms; nn.LSTM **2.50** | 3.00 µs |"

    ours |= {"replay_s": 1e-3, "replay_ratio": 1.0}
    peer |= {"replay_s": 4e-3, "replay_ratio": 4.0}
    results = [{**r, "mode": "inference"} for r in (ours, peer)]
    assert "| 2.00 ms [1.00 ms]; nn.LSTM **2.50** [4.00] |" in markdown.gpu_table(results)
