"""What the GPU itself allows: launches, copies and matrix products, to read other times by.

    python -m benchmarks.harness.gpu_floors [--json PATH] [--device cpu]

Microseconds of an empty launch (by the host, and in a replayed graph), TB/s of a large copy
(bytes read and written), TFLOP/s of a large matrix product, and microseconds of the small product
of one LSTM step, [B, H] by [H, 4H], in a replayed graph.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.table import Table

from benchmarks.harness import gpu, machine, report

STEPS = ((1, 64), (16, 128), (16, 256), (16, 768), (64, 512), (64, 1024))  # B, H


def seconds(call: Callable[[], object], repeats: int) -> float:
    """On the GPU for one of `repeats` calls in a row."""
    call()
    return gpu.event_s(lambda _: [call() for _ in range(repeats)], None) / repeats


def in_graph(call: Callable[[], object], repeats: int) -> float:
    """The same without the host: all calls are one graph."""
    if not torch.cuda.is_available():
        return seconds(call, repeats)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    graph.replay()
    return gpu.event_s(lambda _: graph.replay(), None) / repeats


def host(call: Callable[[], object], repeats: int) -> float:
    """Of the host's time, the GPU being left behind."""
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def copied(count: int, device: str) -> float:
    """TB/s of copying so many floats."""
    big = torch.randn(count, device=device)
    target = torch.empty_like(big)
    return 2 * 4 * count / seconds(lambda: target.copy_(big), 5) / 1e12


def measured(device: str) -> dict[str, float]:
    """Every floor by its name, which ends in its unit."""
    on_gpu = device == "cuda"
    one = torch.randn(1, device=device)
    found = {
        "launch from torch, host us": 1e6 * host(one.neg_, 200),
        "launch from torch, GPU us": 1e6 * seconds(one.neg_, 200),
        "launch in a graph, us": 1e6 * in_graph(one.neg_, 200),
    }
    found["copy, TB/s"] = copied(2 ** (28 if on_gpu else 20), device)
    size = 8192 if on_gpu else 256
    for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        spent = seconds(lambda a=a, b=b: torch.mm(a, b), 3)  # type: ignore[misc]
        kind = "tf32" if tf32 else report.SHORT_DTYPE[str(dtype).removeprefix("torch.")]
        found[f"product {kind}, TFLOP/s"] = 2 * size**3 / spent / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype in (torch.float32, torch.bfloat16):
        for batch, hidden in STEPS:
            h = torch.randn(batch, hidden, device=device, dtype=dtype)
            w = torch.randn(4 * hidden, hidden, device=device, dtype=dtype)
            z = torch.randn(batch, 4 * hidden, device=device, dtype=dtype)
            spent = in_graph(lambda z=z, h=h, w=w: z.addmm_(h, w.t()), 50)  # type: ignore[misc]
            kind = report.SHORT_DTYPE[str(dtype).removeprefix("torch.")]
            found[f"step {batch}, {hidden} {kind}, us"] = 1e6 * spent
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and keeps the JSON."""
    parser = report.parser("benchmarks.harness.gpu_floors", __doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "gpu_floors.json")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    found = measured(args.device)
    here = {**machine.describe(), "gpu": gpu.describe()}
    content = {"schema": report.SCHEMA, "job": "gpu_floors", "machine": here, "results": found}
    report.write_json(args.json, content)
    out = Table(title=here["gpu"]["name"], title_justify="left", box=None, pad_edge=False)
    out.add_column("floor")
    out.add_column("", justify="right")
    for name, value in found.items():
        out.add_row(name, f"{value:.3g}")
    report.console().print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
