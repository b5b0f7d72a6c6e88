"""The benchmarks' own machinery, on shapes too small to take time."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import itertools
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import seqmem_fast

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks" / "__main__.py").is_file():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)
sys.path.append(str(ROOT))  # last, so that an installed seqmem_fast stays the one tested

from benchmarks import __main__ as main_job  # noqa: E402
from benchmarks import (  # noqa: E402
    bench_additive_attention,
    bench_attention,
    bench_dynamic_memory,
    bench_hard_attention,
    bench_lrua,
    bench_lstm,
    bench_ntm,
)
from benchmarks.harness import (  # noqa: E402
    chart,
    gpu,
    gpu_host,
    machine,
    markdown,
    measure,
    memory,
    report,
    rows,
    timing,
)
from benchmarks.peers import lstm as peers  # noqa: E402
from benchmarks.studies import (  # noqa: E402
    attention_small_calls,
    charlm,
    gates,
    lengths,
    random_shapes,
)

TINY = timing.Budget(side_s=0.002, cap_s=10.0, few=2, most=3)
SHAPES = [
    bench_lstm.Shape("cell", 1, 2, 4, 8, goals=(2.0, 2.0)),
    bench_lstm.Shape("layer", 5, 2, 4, 8),
    bench_lstm.Shape("rollout", 9, 3, 4, 8),
    bench_lstm.Shape("lengths", 7, 3, 4, 8),
    bench_lstm.Shape("layer", 5, 2, 4, 8, torch.bfloat16),
]
IDS = [f"{shape.kind}-{shape.dtype_name}" for shape in SHAPES]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed here need not be right, so no turn waits for idle threads."""
    monkeypatch.setattr(timing, "SPIN_LIMIT_S", 0.0)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160)


# timing


def test_sides_take_turns_and_inputs_come_round() -> None:
    seen: list[tuple[str, int]] = []

    def side(name: str) -> timing.Side:
        def call(number: int) -> int:
            time.sleep(0.06)  # above LEAD_IN_S: no untimed call before a sample
            seen.append((name, number))
            return number

        return timing.Side(name, call, [0, 1, 2], call)

    found = timing.compare([side("a"), side("b")], timing.Budget(0.2, 1.0, few=2, most=2))
    assert [name for name, _ in seen] == ["a", "a", "b", "b", "a", "b", "a", "b"]
    assert [number for name, number in seen if name == "a"] == [0, 1, 2, 0]
    assert found["a"].first_values == 0
    assert [len(found[name].samples) for name in "ab"] == [2, 2]
    assert all(0.06 <= sample < 1 for sample in found["a"].samples)


def test_another_clock_times_the_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = itertools.count()
    monkeypatch.setitem(timing.CLOCKS, "processor", lambda: float(next(reads)))
    side = timing.Side("a", lambda number: number, [0], lambda number: number)
    found = timing.compare([side], timing.Budget(2.0, 9.0, few=2, clock="processor"))
    assert found["a"].first_s == 1 and found["a"].samples == [1, 1]


def test_a_call_longer_than_the_cap_is_made_once() -> None:
    calls = []

    def slow(number: int) -> None:
        calls.append(number)
        time.sleep(0.5)

    def fast(number: int) -> None:
        time.sleep(0.01)

    sides = [timing.Side("slow", slow, [1, 2], slow), timing.Side("fast", fast, [1, 2], fast)]
    found = timing.compare(sides, timing.Budget(0.02, 0.4, few=2))
    assert calls == [1]
    assert len(found["slow"].samples) == found["slow"].calls == 1
    assert len(found["fast"].samples) >= 2


def test_the_turn_passes_when_the_other_s_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SPIN_LIMIT_S", 5.0)
    ended: list[float] = []
    gaps: list[float] = []

    def spin(until: float) -> None:
        while time.perf_counter() < until:
            pass
        ended.append(until)

    def leaves_a_thread_spinning(_: int) -> None:
        threading.Thread(target=spin, args=(time.perf_counter() + 0.05,)).start()

    def plain(_: int) -> None:
        gaps.append(time.perf_counter() - max(ended))

    sides = [
        timing.Side("a", leaves_a_thread_spinning, [0], leaves_a_thread_spinning, pool="a"),
        timing.Side("b", plain, [0], plain, pool="b"),
    ]
    timing.compare(sides, timing.Budget(0.01, 1.0, few=1, most=1))
    assert gaps and min(gaps) > 0


@pytest.mark.parametrize(
    ("call_s", "samples"), [(1e-6, 200), (0.1, 10), (0.4, 3), (5.0, 2), (11.0, 1), (20.0, 1)]
)
def test_samples_fit_the_budget(call_s: float, samples: int) -> None:
    assert timing.rounds(call_s, timing.Budget(1.0, 12.0, few=3)) == samples


def test_short_calls_are_timed_several_at_once() -> None:
    found = timing.compare([timing.Side("a", abs, [1], abs)], TINY)["a"]
    assert found.calls > len(found.samples)
    assert found.median_s < 1e-4


def test_page_faults_are_counted() -> None:
    def touch(_: int) -> None:  # fresh pages, whatever malloc keeps in this process
        with mmap.mmap(-1, 1 << 23) as pages:
            pages.madvise(mmap.MADV_NOHUGEPAGE)
            for place in range(0, len(pages), mmap.PAGESIZE):
                pages[place] = 1

    found = timing.compare([timing.Side("a", touch, [0], touch)], TINY)["a"]
    assert found.faults_per_call > 1000


# rows


@pytest.mark.slow
@pytest.mark.parametrize("mode", rows.MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_every_contender_computes_the_same(shape: bench_lstm.Shape, mode: str) -> None:
    """Torch's ways, the reference, ours, and ONNX Runtime and JAX where they can."""
    built = rows.bench(bench_lstm.work(shape, reference=shape.kind != "cell"), mode)
    given = built.sample(0)
    assert built.exact is not None
    exact = built.exact(given)
    assert len(exact) == (5 if mode == rows.TRAINING else 2 if shape.kind == "cell" else 3)
    for name, make in built.contenders.items():
        side = make()
        found = side.values(side.prepare(given))
        assert rows.error(found, exact) < TOLERANCE[shape.dtype], name


def test_resets_do_something() -> None:
    built = rows.bench(bench_lstm.work(SHAPES[2]), rows.INFERENCE)
    x, reset = built.sample(0)
    assert built.exact is not None
    side = built.contenders[rows.OURS]()
    other = side.values(side.prepare((x, ~reset)))
    assert rows.error(other, built.exact((x, reset))) > 0.01


def test_constants_take_no_gradient() -> None:
    """A cell's state; x and the four weights do."""
    built = rows.bench(bench_lstm.work(SHAPES[0]), rows.TRAINING)
    assert [t.requires_grad for t in built.sample(0)] == [True, False, False]


def table_rows(shapes: list[bench_lstm.Shape]) -> list[rows.Row]:
    return [row for shape in shapes for row in bench_lstm.shape_rows(shape)]


@pytest.fixture(scope="module")
def measured() -> Any:
    """The results of three rows and what was left out; JAX's compiling makes this slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SPIN_LIMIT_S", 0.0)
        return measure.run(table_rows(SHAPES[:3]), TINY, quiet())


@pytest.mark.slow
def test_a_run_gives_one_result_for_each_peer(measured: Any) -> None:
    results, left_out = measured
    rivals = {peers.ONNX, peers.JAX}
    against_torch = [result for result in results if result.peer not in rivals]
    assert [(r.row, r.mode) for r in against_torch] == [
        (row.label, row.mode) for row in table_rows(SHAPES[:3])
    ]
    assert against_torch[-1].peer.startswith("loop over ")
    assert against_torch[0].goal == 2.0
    for result in results:
        assert result.ratio == pytest.approx(result.peer_s / result.ours_s)
        assert max(result.ours_error, result.peer_error) < 1e-5
    assert all("not installed" in line for line in left_out)


def test_rows_that_do_not_fit_are_named() -> None:
    results, left_out = measure.run(table_rows(SHAPES[1:2]), TINY, quiet(), limit_s=0.0)
    assert not results
    assert left_out[:2] == [
        "LSTM 5, 2, 4, 8 float32 inference: out of time",
        "LSTM 5, 2, 4, 8 float32 training step: out of time",
    ]


def test_a_missing_rival_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "jax"):
        monkeypatch.setitem(sys.modules, package, None)
    built = rows.bench(bench_lstm.work(SHAPES[1]), rows.INFERENCE)
    assert [*built.contenders] == ["nn.LSTM", rows.OURS]
    assert [line.split(" is ")[0] for line in built.missing] == ["ONNX Runtime", "JAX"]


def squares(x: Tensor, weight: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    return (x * weight)[places], (x * x).sum(-1)


def work(**options: Any) -> rows.Work:
    """Elementwise work, and a peer that is wrong by a tenth."""

    def sample(rng: torch.Generator) -> tuple[Tensor, ...]:
        x, weight = torch.randn(4, 3, generator=rng), torch.randn(3, generator=rng)
        return x, weight, torch.tensor([2, 0])

    def wrong(*args: Tensor) -> tuple[Tensor, Tensor]:
        first, second = squares(*args)
        return 1.1 * first, second

    return rows.Work(sample, ours=squares, peers={"eager": squares, "wrong": wrong}, **options)


@pytest.mark.parametrize("loss", [rows.first_sum, rows.sum_all])
def test_declared_rows_are_measured_and_checked(loss: Any) -> None:
    table = rows.pair(
        "squares", "4, 3", functools.partial(work, loss=loss), goals={"eager": (2, None)}
    )
    results, left_out = measure.run(table, TINY, quiet())
    assert not left_out
    assert [(r.mode, r.peer, r.goal) for r in results] == [
        ("inference", "eager", 2),
        ("inference", "wrong", None),
        ("training step", "eager", None),
        ("training step", "wrong", None),
    ]
    for result in results:
        assert result.ours_error is not None and result.ours_error < 1e-6
        assert result.peer_error == pytest.approx(0.1 * (result.peer == "wrong"), abs=1e-3)


@pytest.mark.slow
def test_compiling_is_told_apart() -> None:
    make = functools.partial(work, compile_with={"backend": "eager"})
    table = rows.pair("squares", "4, 3", make, modes=rows.MODES)
    for row in table:
        *eager, result = measure.measure(row, TINY)
        assert result.peer == "torch.compile" and result.peer_error < 1e-6
        assert result.peer_compile_s > result.peer_first_s > 0
        assert all(other.peer_compile_s is None for other in eager)
        told, console = report.compiling(result.peer_compile_s), quiet()
        report.print_table(console, [result], [], "title", "a, b")
        assert f"torch.compile ({told})" in console.file.getvalue()
        assert f"; {told}" in markdown.cell(vars(result))


def test_compiling_while_timed_is_an_error() -> None:
    """Here since every sample has a shape of its own."""

    def sample(rng: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(int(torch.randint(2, 10**6, (), generator=rng))),)

    options = {"backend": "eager", "dynamic": False}
    grown = rows.Work(sample, torch.sin, {"eager": torch.sin}, compile_with=options, checked=False)
    (row,) = rows.pair("sine", "n", lambda: grown, modes=[rows.INFERENCE])
    with pytest.raises(RuntimeError, match="recompile"):
        measure.measure(row, TINY)


def test_a_training_step_gives_every_gradient_and_leaves_none() -> None:
    side = rows.contender("ours", squares, rows.TRAINING)
    args = rows.bench(work(), rows.TRAINING).sample(0)
    x, weight, places = args
    grads = side.values(side.prepare(args))
    assert torch.equal(grads[1], x[places].sum(0).detach())
    assert len(grads) == 2 and x.grad is None and weight.grad is None


def test_modules_are_trained_and_checked_in_float64() -> None:
    linear, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(linear.state_dict())
    module_work = rows.Work(
        lambda rng: (torch.randn(5, 3, generator=rng),), ours=linear, peers={"nn.Linear": other}
    )
    for row in rows.pair("linear", "5, 3", lambda: module_work):
        [result] = measure.measure(row, TINY)
        assert result.ours_error is not None and 0 < result.ours_error < 1e-6
    assert linear.weight.grad is None and other.weight.dtype == torch.float32


def test_of_one_of_only_the_fastest_is_reported() -> None:
    def slow(*args: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(0.01)
        return squares(*args)

    def make() -> rows.Work:
        found = work(one_of=("eager", "slow"), checked=False)
        return dataclasses.replace(found, peers={"slow": slow, **found.peers})

    [row, _] = rows.pair("squares", "4, 3", make)
    results = measure.measure(row, TINY)
    assert [result.peer for result in results] == ["eager", "wrong"]
    assert results[0].ours_error is None
    [only] = measure.measure(row, TINY, only=["slow"])
    assert only.peer == "slow" and only.ratio > 5


def test_every_table_is_found_and_declares_what_the_job_needs() -> None:
    assert machine.ops()[0] == "lstm" and not any("gpu" in op for op in machine.ops())
    for op in machine.ops():
        bench_op = importlib.import_module(f"benchmarks.bench_{op}")
        assert bench_op.LETTERS and bench_op.ROWS
        named = {(str(row), *row.build().peers) for row in bench_op.ROWS}
        assert len(named) == len(bench_op.ROWS)
        drawn, _ = random_shapes.draw(bench_op.random_rows, 2, 0)
        assert all(row.mode in rows.MODES for shape in drawn for row in shape)


GPU_ROWS = [
    *bench_lstm.gpu_rows(bench_lstm.Shape("rollout", 5, 2, 4, 8)),
    *bench_lstm.gpu_rows(bench_lstm.Shape("lengths", 5, 2, 4, 8)),
    *bench_attention.row(2, 5, 6, 4, on_gpu=True),
    *bench_additive_attention.shape_rows(2, 3, 4, 5, masked=True, on_gpu=True),
    bench_hard_attention.step_row(3, 4, 5, 6),
    *bench_hard_attention.loss_rows(4, 3, on_gpu=True),
    *bench_dynamic_memory.shape_rows(2, 5, 4, on_gpu=True),
    *bench_lrua.sequence_rows(3, 2, 5, 4, 6, 2),
    *bench_ntm.sequence_rows(3, 2, 5, 4, 6),
    *bench_ntm.step_rows("ntm_addressing", 2, 5, 4, on_gpu=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("row", GPU_ROWS, ids=str)
def test_the_gpu_s_sides_agree(row: rows.Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with nothing compiled."""
    monkeypatch.setattr(torch, "compile", lambda side: side)
    no_others = dataclasses.replace(row, work=lambda: dataclasses.replace(row.work(), others={}))
    for compiled in (False, True):
        found = gpu.first_calls(no_others, "cpu", compiled)
        gpu.time_row(no_others, found, 2, "cpu", compiled, graphs=True)
        peers = [r["side"] for r in found[1:]]
        assert found[0]["side"] == rows.OURS
        if compiled:
            assert peers == [rows.COMPILED] * (row.work().compile_with is not None)
        else:
            assert peers and rows.COMPILED not in peers
        assert all(r["samples"] == 2 and r["mode"] == row.mode for r in found)
        assert not any(r["failed"] for r in found) and found[0]["ratio"] == 1.0
        assert all(r["replay_s"] is None and r["replay_ratio"] is None for r in found)  # no GPU
        if row.work().checked:
            assert all(r["error"] < 1e-4 for r in found)
        assert gpu.table(found, "").row_count == 1


def test_a_side_that_fails_on_the_gpu_is_named_and_left_out() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of registers")

    def sample(rng: torch.Generator) -> tuple[torch.Tensor]:
        return (torch.randn(3, generator=rng),)

    for sides in ({"ours": broken, "peer": torch.sin}, {"ours": torch.sin, "peer": broken}):
        work = rows.Work(sample, sides["ours"], {"peer": sides["peer"]}, exact=torch.sin)
        row = rows.Row("sin", "3", rows.INFERENCE, lambda work=work: work)  # type: ignore[misc]
        found = gpu.first_calls(row, "cpu")
        gpu.time_row(row, found, 2, "cpu")
        for record in found:
            failed = sides[record["side"]] is broken
            assert (record["failed"] == "RuntimeError: out of registers") == failed
            assert ("median_s" in record) != failed
        console = Console(width=200, record=True)
        console.print(gpu.table(found, ""))
        assert "FAILED: RuntimeError: out of registers" in console.export_text()


@pytest.mark.slow
def test_the_gpu_check_goes_through_all_stages_on_the_cpu(tmp_path: Path) -> None:
    command = ["benchmarks/gpu_check.sh", "--no-build", "--rehearse", "--seconds", "1200"]
    environment = {**os.environ, "OUT": str(tmp_path)}
    done = subprocess.run(
        [*command, sys.executable],
        cwd=machine.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    stages = [
        line for line in (tmp_path / "log.txt").read_text().splitlines() if " s  status " in line
    ]
    assert done.returncode == 0 and len(stages) == 8
    assert all(line.endswith("status 0") for line in stages)
    found = json.loads((tmp_path / "times.json").read_text())["results"]
    assert {r["mode"] for r in found} == set(rows.MODES) and len([*tmp_path.iterdir()]) <= 8


def test_on_another_device_arguments_and_modules_are_moved() -> None:
    """To the meta device, which has no values; what stays on the host stays."""
    linear = nn.Linear(3, 2)
    made = rows.Work(
        lambda rng: (torch.randn(5, 3, generator=rng), torch.arange(5)),
        ours=lambda x, places: linear(x),
        peers={"nn.Linear": linear},
        on_host=(1,),
        others={"elsewhere": lambda mode: rows.contender("elsewhere", torch.sin, mode)},
    )
    built = rows.bench(made, rows.TRAINING, "meta")
    assert built.peers == ["nn.Linear"]
    side = built.contenders["nn.Linear"]()
    (x, places), leaves = side.prepare(built.sample(0))
    assert x.is_meta and x.requires_grad and places.device.type == "cpu"
    assert linear.weight.is_meta and leaves[0] is x and len(leaves) == 3


def test_host_times_of_small_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_host, "ROWS", gpu_host.ROWS[:1] + gpu_host.ROWS[-2:])
    path = tmp_path / "host.json"
    assert (
        gpu_host.main(["--device", "cpu", "--rounds", "1", "--calls", "2", "--json", str(path)])
        == 0
    )
    found = json.loads(path.read_text())["results"]
    assert [r["mode"].split()[0] for r in found] == ["inference", *["inference", "training"] * 3]
    assert all(r["ours"] > 0 and r["eager"] > 0 for r in found)


@pytest.mark.slow
def test_every_gpu_row_has_a_name_of_its_own() -> None:
    for op in machine.ops():
        declared = importlib.import_module(f"benchmarks.bench_{op}").GPU_ROWS
        names = {(str(row), *row.work().peers) for row in declared}
        has_kernels = (machine.ROOT / f"csrc/ops/{op}.cpp").is_file()
        assert bool(declared) == has_kernels and len(names) == len(declared)


def test_without_a_gpu_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        gpu.main([])
    assert caught.value.code == 2
    assert "no CUDA device here" in capsys.readouterr().err


# records


@pytest.fixture(scope="module")
def document(measured: Any) -> dict[str, Any]:
    """What a run of three rows leaves behind."""
    results, left_out = measured
    return report.document("lstm", machine.describe(), results, left_out, bench_lstm.LETTERS)


@pytest.mark.slow
def test_json_says_what_was_measured_and_where(tmp_path: Path, document: dict[str, Any]) -> None:
    path = tmp_path / "folder" / "lstm.json"
    report.write_json(path, document)
    assert [file.name for file in path.parent.iterdir()] == ["lstm.json"]
    kept = json.loads(path.read_text())
    assert kept["schema"] == report.SCHEMA
    assert {"cpu", "torch_isa", "threads", "malloc", "info", "date"} <= set(kept["machine"])
    assert kept["machine"]["info"]["compiler"]
    fields = {field.name for field in dataclasses.fields(report.Result)}
    assert kept["results"] and all(set(row) == fields for row in kept["results"])


def test_a_nan_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        report.write_json(tmp_path / "x.json", {"ratio": float("nan")})


@pytest.mark.slow
def test_a_table_that_fails_does_not_lose_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rows_of(op: str, *_: Any) -> dict[str, Any]:
        if op == "ntm":
            raise subprocess.CalledProcessError(3, [op])
        return {"op": op}

    for name in ("train", "copy_task"):
        monkeypatch.setattr(main_job, name, lambda *_: {})
    monkeypatch.setattr(main_job, "peak_memory", lambda *_: [])
    monkeypatch.setattr(main_job, "rows", rows_of)
    monkeypatch.setattr(main_job.machine, "ops", lambda: ["lstm", "ntm", "entmax"])
    monkeypatch.setattr(main_job.machine, "RESULTS", tmp_path)
    monkeypatch.setattr(main_job.chart, "first_tables", lambda _: [])
    assert main_job.main([]) == 1
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept["tables"] == [{"op": "lstm"}, {"op": "entmax"}]


@pytest.mark.slow
def test_the_table_names_rows_peers_and_what_was_left_out(document: dict[str, Any]) -> None:
    console = quiet()
    results = [report.Result(**row) for row in document["results"]]
    report.print_table(console, results, ["a row: no time"], "title", "T, B, I, H")
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for piece in ("LSTM 5, 2, 4, 8  fp32", "LSTM resets", "nn.LSTM", "left out: a row: no time"):
        assert piece in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.14e-6, "3.14 us"), (0.0423, "42.3 ms"), (0.5, "500 ms"), (2, "2.00 s")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


@pytest.mark.slow
def test_the_chart_has_a_bar_for_each_ratio_against_torch(document: dict[str, Any]) -> None:
    axes = chart.draw([document]).axes[0]
    ratios = [row["ratio"] for row in document["results"] if row["peer"] not in chart.MARKS]
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == pytest.approx(ratios)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [
        "LSTMCell B 2, I 4, H 8  fp32",
        "LSTM 5, 2, 4, 8  fp32",
        "LSTM resets 9, 3, 4, 8  fp32",
    ]


def test_the_malloc_regime_is_read_from_the_environment() -> None:
    assert machine.malloc_regime({}) == "D"
    assert machine.malloc_regime(machine.KEEPING) == "M"
    assert machine.malloc_regime({"MALLOC_ARENA_MAX": "1"}) == "other"
    assert machine.malloc_regime({"LD_PRELOAD": "x.so"}) == "other"


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (2.4, False), (2.6, True)])
def test_a_busy_machine_is_named(
    load: float, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    report.console()
    assert ("will be wrong" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("regime", ["D", "M"])
def test_children_start_under_the_regime_asked_for(
    regime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    env = machine.child_environment(regime, 2)
    assert machine.malloc_regime(env) == regime
    assert env["OMP_NUM_THREADS"] == env["NPROC"] == "2"
    assert env["PATH"] == os.environ["PATH"]


# random shapes and memory


def test_random_shapes_are_the_same_for_a_seed_and_under_the_cap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_lstm, "CAPS", {"float32": 1.0, "bfloat16": 0.01})
    shapes, over = random_shapes.draw(bench_lstm.random_shape, 60, 0)
    assert (shapes, over) == random_shapes.draw(bench_lstm.random_shape, 60, 0)
    assert len(shapes) == 60 and over > 0
    assert all(shape.gmacs <= bench_lstm.CAPS[shape.dtype_name] for shape in shapes)
    for name, most in bench_lstm.RANDOM.items():
        assert all(1 <= getattr(shape, name) <= most for shape in shapes)
    assert {(shape.layers, shape.dtype) for shape in shapes} == {
        (layers, dtype) for layers in (1, 2) for dtype in (torch.float32, torch.bfloat16)
    }


def test_random_loops_over_a_cell_compare_the_same_weights() -> None:
    shapes, _ = random_shapes.draw(bench_lstm.random_cell_rows, 2, 0)
    assert [shape[0].dtype for shape in shapes] == ["float32", "bfloat16"]
    work = bench_lstm.work(bench_lstm.Shape("steps", 3, 2, 16, 17))
    given = work.sample(torch.Generator().manual_seed(0))
    [theirs] = [side(*given) for side in work.peers.values()]
    for a, b in zip(theirs, work.ours(*given), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_a_generator_that_only_refuses_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="refused"):
        random_shapes.draw(lambda rng, place: None, 1, 0)


def test_multiply_adds_of_two_layers() -> None:
    shape = bench_lstm.Shape("layer", 10, 2, 3, 4, layers=2)
    assert shape.gmacs == pytest.approx(10 * 2 * 16 * ((3 + 4) + (4 + 4)) / 1e9)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_lstm, "CAPS", {"float32": 1e-5, "bfloat16": 1e-5})
    monkeypatch.setattr(machine, "ensure_process", lambda *_: None)
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    monkeypatch.setattr(report, "console", quiet)
    path = tmp_path / "shapes.json"
    options = ["--seconds", "0.001", "--threads", "1", "--json", str(path)]
    assert random_shapes.main(["--count", "1", *options]) == 0
    first = json.loads(path.read_text())["results"]
    assert [*first[0]["modes"]] == list(rows.MODES)
    assert {mode["peer"] for mode in first[0]["modes"].values()} == {"nn.LSTM"}
    assert random_shapes.main(["--count", "2", *options]) == 0
    assert json.loads(path.read_text())["results"][0] == first[0]
    assert random_shapes.main(["--count", "1", "--seed", "1", *options]) == 0
    assert json.loads(path.read_text())["results"] != first


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells peaks")
def test_memory_growth_is_that_of_one_call() -> None:
    found = memory.measure("additive_attention", rows.INFERENCE, 1)
    pairs = 8 * 256 * 256 * 4 / 1024  # KiB of the weights; eager holds the 64 tanh of each as well
    growth = found["growth_kib"]
    assert pairs < growth[rows.OURS] < 8 * pairs
    assert growth["eager"] > 64 * pairs
    assert bench_additive_attention.MEMORY.label == found["row"]


# character model


def corpus() -> charlm.Corpus:
    return charlm.Corpus.of("the cat sat on the mat. " * 800)


def test_the_text_is_long_and_english() -> None:
    text = charlm.english()
    assert len(text) > 300_000
    assert text.count("the ") > 1000


def test_batches_follow_the_text() -> None:
    tokens = torch.arange(101)
    found = list(charlm.batches(tokens, length=4, batch=5))
    assert len(found) == 5
    assert torch.equal(torch.cat([x for x, _ in found]), torch.arange(100).view(5, 20).t())
    assert all(torch.equal(y, x + 1) for x, y in found)


def test_both_trainings_agree_and_learn() -> None:
    text = corpus()
    theirs, ours = charlm.train_both(text, 25, quiet(), length=8, batch=4, hidden=16)
    found = charlm.summary(theirs, ours, text)
    charlm.check_losses(found)
    assert found["training_steps"] == 25
    assert found["final_loss"][1] < found["first_loss"][1]
    assert found["ratio"] > 0


@pytest.mark.parametrize("name", charlm.TOLERANCES)
@pytest.mark.parametrize("ours", [1.1, float("nan")])
def test_losses_that_differ_are_an_error(name: str, ours: float) -> None:
    measured: dict[str, Any] = {key: [1.0, 1.0] for key in charlm.TOLERANCES}
    charlm.check_losses(measured)
    with pytest.raises(charlm.LossesDisagree, match=name):
        charlm.check_losses({**measured, name: [1.0, ours]})


@pytest.mark.slow
def test_a_kept_model_comes_back_and_draws_its_gates(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = corpus()
    training = charlm.Training.start("x", nn.LSTM, text, hidden=16)
    charlm.save(tmp_path / "model.pt", training.model, text.alphabet)
    model, alphabet = charlm.load(tmp_path / "model.pt")
    assert alphabet == text.alphabet and isinstance(model.lstm, seqmem_fast.LSTM)
    assert charlm.write(model, alphabet, "the", 5).startswith("the")
    out = tmp_path / "gates.png"
    assert gates.main(["--checkpoint", str(tmp_path / "model.pt"), "--text", "a cat", "--out",
                       str(out)]) == 0  # fmt: skip
    assert out.read_bytes().startswith(b"\x89PNG")


# the main job


@pytest.mark.slow
def test_a_pass_runs_in_a_process_of_its_regime() -> None:
    found = main_job.rows("lstm", 1, "M", ["--rows", "LSTMCell B 1,", "--seconds", "0.01"])
    assert (found["machine"]["malloc"], found["machine"]["threads"]) == ("M", 1)
    assert {row["row"] for row in found["results"]} == {"LSTMCell B 1, I 64, H 64"}
    assert all((row["malloc"], row["threads"]) == ("M", 1) for row in found["results"])


@pytest.fixture
def short_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, document: dict[str, Any]
) -> list[tuple[Any, ...]]:
    """The main job with little text, a small model, and its passes noted instead of run."""
    passes: list[tuple[Any, ...]] = []

    def one_pass(op: str, threads: int, regime: str, options: list[str]) -> dict[str, Any]:
        passes.append((op, threads, regime, options))
        return {**document, "job": op}

    small = functools.partial(charlm.train_both, length=8, batch=4, hidden=16)
    monkeypatch.setattr(charlm, "english", lambda: "The cat sat on the mat. " * 800)
    monkeypatch.setattr(charlm, "steps_within", lambda *_: 10)
    monkeypatch.setattr(charlm, "train_both", small)
    monkeypatch.setattr(gates, "CHECKPOINT", tmp_path / "charlm.pt")
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "console", quiet)
    monkeypatch.setattr(main_job, "peak_memory", lambda *_: [{"growth_kib": {}}])
    monkeypatch.setattr(main_job, "rows", one_pass)
    monkeypatch.setattr(main_job, "copy_task", lambda console, seconds: {"seconds": seconds})
    monkeypatch.setattr(machine, "ops", lambda: ["lstm", "other"])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return passes


@pytest.mark.slow
def test_the_main_job_keeps_losses_tables_and_chart(
    short_job: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    assert main_job.main([]) == 0
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept["charlm"]["training_steps"] == 10
    assert set(charlm.TOLERANCES) <= set(kept["charlm"])
    assert kept["copy"] == {"seconds": main_job.COPY_S}
    assert [table["job"] for table in kept["tables"]] == ["lstm", "other"]
    assert len(kept["memory"]) == 1
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "charlm.pt").is_file()
    assert [(op, regime) for op, _, regime, _ in short_job] == [("lstm", "D"), ("other", "D")]
    limits = [float(options[options.index("--limit") + 1]) for *_, options in short_job]
    assert 0 < limits[0] < 0.8 * main_job.LIMIT_S and 0 < limits[1] < main_job.LIMIT_S


@pytest.mark.slow
def test_a_job_without_time_keeps_what_it_has(
    short_job: list[tuple[Any, ...]],
    tmp_path: Path,
    document: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(main_job, "LIMIT_S", 0.0)
    monkeypatch.setitem(document, "results", [])
    assert main_job.main([]) == 0
    assert (tmp_path / "bench.json").is_file() and not (tmp_path / "bench.png").exists()
    assert [options[-1] for *_, options in short_job] == [f"{main_job.LEAST_S:.0f}"] * 2


@pytest.mark.slow
def test_the_full_job_passes_over_threads_and_regimes(
    short_job: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert main_job.main(["--full"]) == 0
    passes = [(threads, regime) for op, threads, regime, _ in short_job if op == "other"]
    assert passes == [(2, "D"), (2, "M"), (1, "D"), (1, "M")]
    assert len(short_job) == 8
    assert (tmp_path / "bench_full.json").is_file()


@pytest.mark.slow
def test_the_main_job_fails_where_losses_differ(
    short_job: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(charlm.TOLERANCES, "final_loss", -1.0)
    assert main_job.main([]) == 1
    assert not short_job


@pytest.mark.slow
def test_pytest_collects_every_row_of_every_op() -> None:
    """`pytest benchmarks`, -k included."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--collect-only",
        "-q",
        "-k",
        "float32",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for op in machine.ops():
        for row in importlib.import_module(f"benchmarks.bench_{op}").ROWS:
            found = f"bench_{op}.py::test_row[{row}-{rows.OURS}]".replace(" ", "-")
            assert (found in done.stdout) == (row.dtype == "float32"), row


def test_lengths_of_a_window_are_measured_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_threads: None
) -> None:
    monkeypatch.setattr(lengths, "LENGTHS", (64, 128))
    path, picture = tmp_path / "lengths.json", tmp_path / "lengths.png"
    options = ["--threads", "1", "--seconds", "0", f"--json={path}", f"--out={picture}"]
    assert lengths.main(options) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    results = json.loads(path.read_text())["results"]
    assert len(results) == 8 and all(found["step_s"] > 0 for found in results)


def test_small_attentions_are_timed_no_longer_than_asked() -> None:
    made: list[str] = []

    def side(name: str) -> None:
        made.append(name)
        time.sleep(0.001)

    sides = [functools.partial(side, name) for name in ("torch", "ours")]
    found = attention_small_calls.smallest(sides, 0.0)
    assert made == ["torch", "ours"] * 3  # the first call of each, and two that count
    assert min(found) >= 0.001
    row = attention_small_calls.measured((1, 2, 16), 0.0)
    assert list(row["modes"]) == attention_small_calls.MODES
    assert all(mode["ratio"] > 0 for mode in row["modes"].values())
