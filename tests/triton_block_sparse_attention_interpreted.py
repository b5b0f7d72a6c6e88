"""Triton block-sparse attention on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from ahead_of_time import Kernel
from triton_attention_check import assert_near

import seqmem_fast
from seqmem_fast._triton import block_sparse_attention as launchers
from seqmem_fast.reference import block_sparse_attention as reference
from seqmem_fast.reference.common import ALPHAS, Sample

assert seqmem_fast.__version__
SIZES = (2, 1, 50, 60, 5, 6)  # B, Hk, Tq, Tk, D, Dv: blocks of 16 by 20, the last ones short
SAMPLES = {s.name: s for s in reference.sample_inputs(sizes=SIZES)}
# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(2, 1, 96, 120, 20, 32)]
OPTIONS: dict[str, Any] = {
    "is_causal": False,
    "key_end": None,
    "scale": None,
    "normalizer": "softmax",
    "alpha": 1.5,
    "dropout": 0.0,
    "seed": None,
}
ALL = (True, True)


def check(sample: Sample, dtype: torch.dtype, given: tuple[bool, ...] = ALL) -> None:
    """Forward and backward beside the reference in float64; given: which gradients come in."""
    *tensors, blocks, block = sample.args
    operands = [t.to(dtype) for t in tensors]
    *options, normalizer, alpha, dropout, seed = {**OPTIONS, **sample.kwargs}.values()
    pattern = (blocks, *block, *options, ALPHAS.get(normalizer, alpha), dropout, seed)
    exact = [t.double().requires_grad_() for t in operands]
    right_ones = launchers._plain(*exact, *pattern)
    found = launchers.block_sparse_attention(*operands, *pattern, True)
    seeds: list[Any] = []
    for ours, theirs, is_given in zip(found, right_ones, given, strict=True):
        assert_near(ours, theirs.detach(), dtype)
        seeds.append(torch.randn(theirs.shape).to(dtype) if is_given else None)
    pairs = zip(right_ones, seeds, strict=True)
    loss = sum((a * s.double()).sum() for a, s in pairs if s is not None)
    expected = torch.autograd.grad(loss, exact, materialize_grads=True)
    saved = right_ones[1].detach().to(dtype)
    backward = launchers.block_sparse_attention_backward
    grads = backward(*seeds, *operands, *pattern, saved, [True] * 3)
    for ours, theirs in zip(grads, expected, strict=True):
        assert_near(ours, theirs, dtype, 10)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_BLOCK", 16)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_option(name: str) -> None:
    check(SAMPLES[name], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check(SAMPLES["causal"], dtype)


def test_wide_heads_in_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "fits_heads", lambda *_: False)
    check(SAMPLES["causal"], torch.float32)


def test_each_gradient_alone() -> None:
    check(SAMPLES["shared"], torch.float32, (True, False))
    check(SAMPLES["shared"], torch.float32, (False, True))


def test_without_weights_without_rows_and_wrong_shapes() -> None:
    q, k, v, blocks, block = SAMPLES["shared"].args
    tail = (*block, False, None, None, 1.0, 0.0, None)
    run = launchers.block_sparse_attention
    output, _ = run(q, k, v, blocks, *tail, True)
    alone, none = run(q, k, v, blocks, *tail, False)
    assert torch.equal(alone, output) and none.numel() == 0
    no_blocks = torch.full((1, 1, 2, 2), -1)
    for part in ((q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0]), (q[:0], k[:0], v[:0])):
        output, weights = run(*part, no_blocks, *tail, True)
        assert output.shape == (*part[0].shape[:3], v.shape[3]) and not output.any()
        grads = launchers.block_sparse_attention_backward(
            output, None, *part, no_blocks, *tail, weights, [True] * 3
        )
        assert [g.shape for g in grads] == [t.shape for t in part] and not grads[1].any()
    with pytest.raises(ValueError, match="expected k of shape"):
        run(q, k[:1], v, blocks, *tail, True)


def test_blocks_that_do_not_exist_hold_none() -> None:
    """As on a GPU, whose lists are not read by the checks."""
    q, k, v, blocks, block = SAMPLES["shared"].args
    call = partial(launchers.block_sparse_attention.__wrapped__, q, k, v)  # type: ignore[attr-defined]
    tail = (*block, False, None, None, 1.0, 0.0, None, True)
    output, weights = call(blocks, *tail)
    more = torch.tensor([[2**40, 0], [9, 9]])[None, None]
    again, more_weights = call(torch.cat((blocks, more), 2), *tail)
    assert torch.equal(again, output) and not more_weights[:, :, -2:].any()
    torch.testing.assert_close(more_weights[:, :, :-2], weights)


def kernels() -> list[Kernel]:
    file = "block_sparse_attention_kernels"
    rows = ("q_0", "q_1", "q_t", "k_0", "k_1", "k_t", "v_0", "v_1", "v_t", "width", "value_width")
    found = []
    for storage, warps in {"bf16": 4, "fp32": 8}.items():
        dropout = {"BELOW": 0, "FACTOR": 1.0} if warps == 4 else {"BELOW": 9, "FACTOR": 1.5}
        tile = {"BM": 32, "BN": 32, "BD": 64, "BV": 64, "SCALE": 0.125, **dropout}
        for name, options in (
            ("forward", {"CAUSAL": True, "EACH_END": True}),
            ("backward_rows", {"BN": 32 if storage == "bf16" else 16}),
            ("backward_columns", {}),
        ):
            integers = ("blocks_ptr", "rows_ptr", "by_key_ptr", "columns_ptr", "end_ptr")
            pointers = {**dict.fromkeys((*integers, "seed_ptr"), "*i64"), "delta_ptr": "*fp32"}
            kernel = f"block_sparse_attention_{name}"
            constants = {**tile, **options}
            found.append(Kernel(file, kernel, storage, warps, constants, pointers, rows))
    return found
