"""The LSTM's CUDA C++: it compiles for every GPU we name, and its arithmetic and loops are right.

Two checks need no GPU: nvcc's own report for each architecture, and the same sources compiled by
the C++ compiler against a stand-in for CUDA (tests/cuda_on_cpu), the cluster kernels excepted.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cuda_stand_in import ARCHITECTURES, compile_with_nvcc, needs_nvcc, sources_on_cpu
from lstm_cell_check import CELLS, TOLERANCES, assert_near, check_cell, widened

from seqmem_fast.reference import lstm as reference

pytestmark = pytest.mark.slow  # the sources are compiled first
TYPES = {"ff": "float", "dd": "double", "6__halfS3_": "half", "13__nv_bfloat16S3_": "bfloat16"}
TYPES |= {"6__halff": "half, c float", "13__nv_bfloat16f": "bfloat16, c float"}
SIZES = [(5, torch.float32), *((8, dtype) for dtype in TOLERANCES)]  # single units, vectors


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    kernels = compile_with_nvcc("lstm", arch)
    label = re.compile(r"\S*?(forward|backward)_kernelI(\S*?)Li(\d)EEEv")
    found = [(match, kernel) for kernel in kernels if (match := label.match(kernel.symbol))]
    assert len(found) == 24  # 2 directions, 6 pairs of types, vectors and single elements
    with capsys.disabled():
        print(f"\nsm_{arch}: registers / spilled bytes")
        for match, kernel in found:
            name, types, width = match.groups()
            label_of = f"{name}<{TYPES[types]}> x{width}"
            print(f"  {label_of:32} {kernel.registers:>4} / {kernel.spilled}")
    assert all(kernel.stack == kernel.spilled == 0 for kernel in kernels)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_small_cell_compiles_without_spills(arch: str) -> None:
    kernels = compile_with_nvcc("lstm_cell", arch)
    assert len(kernels) == 24  # 4 types, vectors and single elements: 1 row, 8 rows, products
    assert all(kernel.stack == kernel.spilled == 0 for kernel in kernels)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "stem, number",
    # 4 hidden sizes, 3 tiles; then, in 2 directions: 2 types, 4 hidden sizes; 3 types, 2 hidden
    # sizes, plain steps or not
    [
        ("lstm_cluster_forward", 12),
        ("lstm_cluster_backward", 12),
        ("lstm_cluster_16", 16),
        ("lstm_block", 24),
    ],
)
def test_clusters_compile_without_spills(
    stem: str, number: int, arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = compile_with_nvcc(stem, arch)
    assert len(kernels) == number
    with capsys.disabled():
        print(f"\nsm_{arch}: registers")
        for kernel in kernels:
            name, variant = re.findall(r"\d+([a-z]+_kernel)I(\S+?)EEv", kernel.symbol)[0]
            print(f"  {name} {variant}: {kernel.registers}")
    assert all(kernel.stack == kernel.spilled == 0 for kernel in kernels)


ops = sources_on_cpu("lstm")


@pytest.mark.parametrize("hidden, dtype", SIZES)
@pytest.mark.parametrize("name", CELLS)
def test_cell(ops: Any, name: str, hidden: int, dtype: torch.dtype) -> None:
    check_cell(ops.lstm_cell, ops.lstm_cell_backward, name, dtype, hidden)


@pytest.mark.parametrize("batch, hidden", [(1, 8), (13, 72), (9, 364)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_cell_of_other_batches(ops: Any, batch: int, hidden: int, dtype: torch.dtype) -> None:
    """One row, two groups of rows, and one more than the small cell's kernels take."""
    check_cell(ops.lstm_cell, ops.lstm_cell_backward, "plain", dtype, hidden, batch)


def test_cell_computes_what_is_asked_for(ops: Any) -> None:
    x, state, *weights = next(iter(reference.cell_sample_inputs())).args
    hy, cy, gates = ops.lstm_cell(x, *state, *weights, True)
    ones = torch.ones_like(hy)
    fixed = (x, *state, *weights[:2], gates, cy, True)
    whole = ops.lstm_cell_backward(ones, None, None, *fixed, [True] * 3)
    owner = (0, 1, 1, 2, 2, 2)
    for wanted in range(3):
        mask = [k == wanted for k in range(3)]
        part = ops.lstm_cell_backward(ones, None, None, *fixed, mask)
        for k, (a, b) in enumerate(zip(part, whole, strict=True)):
            assert torch.equal(a, b) if owner[k] == wanted else a.shape == (0,)


def sequence(kind: str, batch_first: bool, reverse: bool, hidden: int, dtype: torch.dtype) -> Any:
    """Arguments of the reference and the (starts, sizes, row stride) of its rows."""
    steps, batch, width = 4, 3, 4
    samples = reference.sample_inputs(dtype=dtype, sizes=(steps, batch, width, hidden))
    x, state, *weights = next(s.args for s in samples if s.name == "plain")
    options: dict[str, Any] = {"reverse": reverse}
    starts, sizes, stride = [t * batch for t in range(steps)], [batch] * steps, 1
    if kind == "packed":
        options["batch_sizes"] = torch.tensor([3, 2, 2, 1])
        starts, sizes = [0, 3, 5, 7], [3, 2, 2, 1]
        x = x.flatten(0, 1)[:8]
    if "lengths" in kind:
        options["lengths"] = torch.tensor([2, 0, 4])
    if "reset" in kind:
        options["reset"] = torch.rand(steps, batch) < 0.5
    if batch_first:
        x, options["batch_first"] = x.transpose(0, 1).contiguous(), True
        starts, sizes, stride = list(range(steps)), [batch] * steps, steps
        if "reset" in kind:
            options["reset"] = options["reset"].t().contiguous()
    return (x, state, weights[:4]), options, (starts, sizes, stride)


@pytest.mark.parametrize("hidden, dtype", SIZES)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    "kind, batch_first",
    [
        ("plain", False),
        ("plain", True),
        ("lengths", False),
        ("reset", False),
        ("packed", False),
        ("lengths and reset", True),
    ],
)
def test_steps(
    ops: Any, kind: str, batch_first: bool, reverse: bool, hidden: int, dtype: torch.dtype
) -> None:
    (x, state, weights), options, layout = sequence(kind, batch_first, reverse, hidden, dtype)
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    wide_x, wide_h, wide_c = widened(x), widened(state[0]), widened(state[1])
    output, (hy, cy), gates, cells = reference.lstm_trace(
        wide_x, (wide_h, wide_c), *map(widened, weights), **options
    )

    lengths = torch.tensor([4, 3, 1]) if kind == "packed" else options.get("lengths")
    tail = (lengths, options.get("reset"), *layout, reverse)
    wide_c_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    z = x.flatten(0, -2) @ weight_ih.t()
    h, c = state[0].clone(), state[1].to(wide_c_dtype, copy=True)
    if not reverse and "reset" in kind:  # as the launcher does before the first step
        start = options["reset"][:, 0] if batch_first else options["reset"][0]
        ended = options["lengths"] == 0 if "lengths" in kind else torch.zeros(3, dtype=torch.bool)
        h[start & ~ended], c[start & ~ended] = 0, 0
    rows = (
        torch.empty(z.shape[0], hidden, dtype=dtype),
        torch.empty(z.shape[0], hidden, dtype=dtype),
    )
    ops.lstm_forward_steps_(z, h, c, *rows, True, False, weight_hh, bias_ih, bias_hh, *tail)
    for ours, right in zip(
        (rows[0], h, c, z, rows[1]), (output, hy, cy, gates, cells), strict=True
    ):
        assert_near(ours, right if right.dim() == 2 else right.flatten(0, 1), dtype)

    seeds = [torch.randn_like(a).to(dtype) for a in (output, hy, cy, gates, cells)]
    flat = [a if a.dim() == 2 else a.flatten(0, 1) for a in seeds]
    values = (output, hy, cy, gates, cells)
    loss = sum((a * b.double()).sum() for a, b in zip(values, seeds, strict=True))
    grad_x, grad_cx = torch.autograd.grad(loss, (wide_x, wide_c))
    dz, d_c = torch.empty_like(z), flat[2].to(wide_c_dtype, copy=True)
    saved = [a.detach().to(dtype).reshape(z.shape[0], -1) for a in (gates, cells)]
    ops.lstm_backward_steps_(
        dz, d_c, flat[0], flat[1], flat[3], flat[4], weight_hh, state[1], *saved, *tail
    )
    assert_near(dz.double() @ weight_ih.double(), grad_x.reshape(z.shape[0], -1), dtype, 5)
    assert_near(d_c, grad_cx, dtype, 5)


def test_many_blocks(ops: Any) -> None:
    """More rows and units than one block of threads takes."""
    x, weight_ih, weight_hh = torch.randn(67, 3), torch.randn(4 * 523, 3), torch.randn(4 * 523, 523)
    ours = ops.lstm_cell(x, None, None, weight_ih, weight_hh, None, None, False)
    right = reference.lstm_cell(x.double(), None, weight_ih.double(), weight_hh.double())
    for a, b in zip(ours[:2], right, strict=True):
        assert_near(a, b, torch.float32)
