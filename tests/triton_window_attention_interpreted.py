"""Triton window attention on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead_of_time import Kernel
from triton_attention_check import assert_near

import seqmem_fast
from seqmem_fast._triton import window_attention as launchers
from seqmem_fast.reference import window_attention as reference
from seqmem_fast.reference.common import ALPHAS, Sample

assert seqmem_fast.__version__
SIZES = (2, 1, 17, 20, 5, 6)  # B, Hk, Tq, Tk, D, Dv: two blocks of each, no power of two in sight
SAMPLES = {s.name: s for s in reference.sample_inputs(sizes=SIZES)}
# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(2, 1, 40, 40, 20, 32)]
OPTIONS: dict[str, Any] = {
    "dilation": 1,
    "offset": 0,
    "key_start": None,
    "key_end": None,
    "global_keys": 0,
    "scale": None,
    "normalizer": "softmax",
    "alpha": 1.5,
    "dropout": 0.0,
    "seed": None,
}
ALL = (True, True, True)


def check(sample: Sample, dtype: torch.dtype, given: tuple[bool, ...] = ALL) -> None:
    """Forward and backward beside the reference in float64; given: which gradients come in."""
    *tensors, left, right = sample.args
    operands = [t.to(dtype) for t in tensors]
    *options, normalizer, alpha, dropout, seed = {**OPTIONS, **sample.kwargs}.values()
    window = (left, right, *options, ALPHAS.get(normalizer, alpha), dropout, seed)
    exact = [t.double().requires_grad_() for t in operands]
    right_ones = launchers._plain(*exact, *window)
    found = launchers.window_attention(*operands, *window, True)
    seeds: list[Any] = []
    for ours, theirs, is_given in zip(found, right_ones, given, strict=True):
        assert_near(ours, theirs.detach(), dtype)
        seeds.append(torch.randn(theirs.shape).to(dtype) if is_given else None)
    pairs = zip(right_ones, seeds, strict=True)
    loss = sum((a * s.double()).sum() for a, s in pairs if s is not None)
    expected = torch.autograd.grad(loss, exact, materialize_grads=True)
    saved = [t.detach().to(dtype) for t in right_ones[1:]]
    grads = launchers.window_attention_backward(*seeds, *operands, *window, *saved, list(ALL))
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
    check(SAMPLES["global"], dtype)


def test_wide_heads_in_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "fits_heads", lambda *_: False)
    check(SAMPLES["everything"], torch.float32)


def test_each_gradient_alone() -> None:
    for k in range(3):
        check(SAMPLES["ranges"], torch.float32, tuple(k == n for n in range(3)))


def test_without_weights_without_rows_and_wrong_shapes() -> None:
    q, k, v, *_ = SAMPLES["causal"].args
    tail = (3, 0, 1, 0, None, None, 0, None, 1.0, 0.0, None)
    output, *_ = launchers.window_attention(q, k, v, *tail, True)
    alone, *rest = launchers.window_attention(q, k, v, *tail, False)
    assert torch.equal(alone, output) and [t.numel() for t in rest] == [0, 0]
    for part in ((q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0]), (q[:0], k[:0], v[:0])):
        output, *saved = launchers.window_attention(*part, *tail, True)
        assert output.shape == (*part[0].shape[:3], v.shape[3]) and not output.any()
        grads = launchers.window_attention_backward(
            output, None, None, *part, *tail, *saved, list(ALL)
        )
        assert [g.shape for g in grads] == [t.shape for t in part] and not grads[1].any()
    with pytest.raises(ValueError, match="expected k of shape"):
        launchers.window_attention(q, k[:1], v, *tail, True)


def test_keys_that_nobody_sees_may_hold_anything() -> None:
    q, k, v, *_ = (t.clone() for t in SAMPLES["causal"].args[:3])
    tail = (3, 2, 1, 0, None, torch.tensor([20, 9]), 0, None, 1.0, 0.0, None)
    expected = launchers.window_attention(q, k, v, *tail, True)
    k[1, :, 9:], v[1, :, 9:] = torch.nan, torch.inf
    found = launchers.window_attention(q, k, v, *tail, True)
    assert all(map(torch.equal, found, expected))


def kernels() -> list[Kernel]:
    file = "window_attention_kernels"
    rows = ("q_0", "q_1", "q_t", "k_0", "k_1", "k_t", "v_0", "v_1", "v_t", "width", "value_width")
    found = []
    for storage, warps in {"bf16": 4, "fp32": 8}.items():
        dropout = {"BELOW": 0, "FACTOR": 1.0} if warps == 4 else {"BELOW": 9, "FACTOR": 1.5}
        keys = 32 if storage == "bf16" else 16  # with dropout in float32
        tile = {"BM": 32, "BN": keys, "BD": 64, "BV": 64, "SCALE": 0.125, **dropout}
        for name, options in (
            ("forward", {"EACH_START": False, "EACH_END": True}),
            ("backward_rows", {}),
            ("backward_columns", {"GLOBAL": False, "BM": keys}),
        ):
            pointers = {
                "start_ptr": "*i64",
                "end_ptr": "*i64",
                "seed_ptr": "*i64",
                "delta_ptr": "*fp32",
            }
            constants = {**tile, **options}
            kernel = f"window_attention_{name}"
            found.append(Kernel(file, kernel, storage, warps, constants, pointers, rows))
    return found
