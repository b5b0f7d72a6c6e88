"""Triton attention on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from ahead_of_time import Kernel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import interpreter
from triton_attention_check import check_launchers, spread

import seqmem_fast
from seqmem_fast._triton import attention as launchers
from seqmem_fast._triton import attention_call, attention_split, common
from seqmem_fast.reference import attention as reference
from seqmem_fast.reference.common import ALPHAS, Sample

assert seqmem_fast.__version__
SIZES = (2, 18, 21, 5, 6)  # B, Tq, Tk, D, Dv: two blocks of each, no power of two in sight
SAMPLES = {s.name: s for s in reference.sample_inputs(sizes=SIZES)}
SMALL = launchers.Tiles(16, 16, 4)


def check(sample: Any, dtype: torch.dtype, given: tuple[bool, bool] = (True, True)) -> None:
    kwargs = sample.kwargs
    alpha = ALPHAS.get(kwargs.get("normalizer", "softmax"), kwargs.get("alpha"))
    options = kwargs.get("scale"), kwargs.get("is_causal", False), alpha
    both = launchers.attention, launchers.attention_backward
    check_launchers(both, attention, sample.args, dtype, given, options)


def attention(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, scale, is_causal, alpha = args
    options = {"scale": scale, "is_causal": is_causal, "alpha": alpha}
    return reference.attention(
        *tensors, **options, normalizer="softmax" if alpha == 1 else "entmax"
    )


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter would multiply their bit patterns."""
    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        with np.errstate(invalid="ignore"):
            return multiply(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(builder, "create_dot", create_dot)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "tiles", lambda *_: SMALL)
    monkeypatch.setattr(attention_split, "tiles", lambda *_: SMALL)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 is multiplied as it is, as on AMD; the interpreter has no TF32."""
    for module in (attention_call, attention_split):
        monkeypatch.setattr(module, "product_precision", lambda *_: "ieee")


@pytest.mark.parametrize("name", SAMPLES)
def test_blocks(name: str, small: None) -> None:
    check(SAMPLES[name], torch.float32)


@pytest.mark.parametrize("name", SAMPLES)
def test_products_of_whole_float32(name: str, small: None, whole: None) -> None:
    check(SAMPLES[name], torch.float32)


def test_several_blocks_of_their_usual_size() -> None:
    samples = {s.name: s for s in reference.sample_inputs(sizes=(1, 70, 130, 20, 40))}
    check(samples["causal_masked"], torch.float32)
    check(samples["added_mask"], torch.float32)


def test_parts_of_float32_are_as_exact_as_it() -> None:
    q, k, v = torch.randn(100, 64), torch.randn(300, 64) * 4, torch.randn(300, 64)
    q, k, v = (t * torch.randn(t.shape).exp() for t in (q, k, v))  # of very different sizes
    right = attention(q.double(), k.double(), v.double(), None, None, False, 1)
    eager = attention(q, k, v, None, None, False, 1)
    ours = launchers.attention(q, k, v, None, None, False, 1)
    for a, b, c in zip(ours, eager, right, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm()


def test_infinities_stay_infinities() -> None:
    q, k, v = torch.ones(2, 4), torch.randn(5, 4), torch.randn(5, 3)
    v[3, 1], v[2, 2], k[4, 0] = float("inf"), float("-inf"), float("-inf")
    huge = torch.finfo(torch.float32).max
    v[1, 0] = huge
    expected = attention(q, k, v, None, None, False, 1)
    for a, b in zip(launchers.attention(q, k, v, None, None, False, 1), expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_one_block_and_each_gradient_alone() -> None:
    check(SAMPLES["masked"], torch.float32, (True, False))
    check(SAMPLES["added_mask"], torch.float32, (False, True))
    check(SAMPLES["causal_masked"], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_storage_of_16_bits(dtype: torch.dtype, small: None) -> None:
    check(SAMPLES["masked"], dtype)


@pytest.mark.parametrize("name", SAMPLES)
def test_torchs_products(name: str) -> None:
    check(SAMPLES[name], torch.float64)


def test_torchs_products_in_blocks_of_keys(monkeypatch: pytest.MonkeyPatch, whole: None) -> None:
    monkeypatch.setattr(launchers, "_SCORES", 16)
    monkeypatch.setattr(launchers, "_MANY", 0)
    check(SAMPLES["causal_masked"], torch.float32)
    check(SAMPLES["added_mask"], torch.float32, (True, False))
    check(SAMPLES["masked"], torch.float32, (False, True))


def test_many_scores_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_MANY_OF_16_BITS", 0)
    check(SAMPLES["masked"], torch.bfloat16)
    check(SAMPLES["added_mask"], torch.float16, (True, False))


def test_products_on_a_gpu_stay_wide() -> None:
    with FakeTensorMode():  # there is no GPU
        a = torch.empty(2, 3, 4, device="cuda", dtype=torch.bfloat16)
        product = common.wide_product(a, a.mT)
    assert product.is_cuda and product.dtype == torch.float32 and product.shape == (2, 3, 3)


def test_more_leading_dimensions_and_strides() -> None:
    q, v = torch.randn(2, 1, 3, 4, 5), torch.randn(1, 3, 9, 2)
    k = torch.randn(2, 2, 1, 9, 10)[..., ::2]
    mask = torch.rand(9) < 0.5
    sample = Sample("leads", (q, k, v, mask))
    check(sample, torch.float32)


def test_offsets_past_32_bits(small: None) -> None:
    q, k, v = torch.randn(1, 2, 4), torch.randn(1, 3, 4), torch.randn(1, 3, 5)
    mask, seeds = torch.randn(1, 2, 3), (torch.randn(1, 2, 5), torch.randn(1, 2, 3))
    near = (q, k, v, mask)
    far = (q, spread(k, 1), spread(v, 1), spread(mask.mT, 1).mT)
    right = launchers.attention(*near, None, False, 1)
    ours = launchers.attention(*far, None, False, 1)
    far_seeds = seeds[0], spread(seeds[1].mT, 1).mT
    tail = right[1], None, False, 1, [True] * 4
    ours += launchers.attention_backward(*far_seeds, *far, *tail)
    right += launchers.attention_backward(*seeds, *near, *tail)
    assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


def test_nothing_leaves_its_row(small: None) -> None:
    q, k, v, _ = SAMPLES["plain"].args
    clean = launchers.attention(q, k, v, None, None, False, 1)
    q = q.clone()
    q[0, 3] = float("nan")
    for causal in (False, True):
        clean = launchers.attention(*SAMPLES["plain"].args, None, causal, 1)
        for a, b in zip(launchers.attention(q, k, v, None, None, causal, 1), clean, strict=True):
            assert a[0, 3].isnan().all()
            a[0, 3] = b[0, 3]
            assert torch.equal(a, b)


def test_nothing_to_do() -> None:
    q, k, v = torch.randn(2, 3, 4), torch.randn(2, 0, 4), torch.randn(2, 0, 5)
    output, weights = launchers.attention(q, k, v, None, None, False, 1)
    assert output.shape == (2, 3, 5) and not output.any() and weights.shape == (2, 3, 0)
    grads = launchers.attention_backward(
        output, None, q, k, v, None, weights, None, False, 1, [True] * 4
    )
    assert [tuple(g.shape) for g in grads] == [(2, 3, 4), (2, 0, 4), (2, 0, 5), (0,)]
    assert not grads[0].any()
    with pytest.raises(ValueError, match="expected key of shape"):
        launchers.attention(q, k[..., 1:], v, None, None, False, 1)


# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(3, 5, 7, 4, 6), (2, 256, 256, 64, 64), (2, 64, 320, 128, 128)]


def kernels() -> list[Kernel]:
    file, between = "attention_kernels", "attention_softmax_kernels"
    rows = ("q_t", "k_t", "v_t", "m_i", "g_i", "keys", "width", "value_width")
    found = []
    for storage, (block_m, block_n, warps) in {"bf16": (64, 64, 4), "fp32": (32, 32, 8)}.items():
        tile = {"BM": block_m, "BN": block_n, "BD": 64, "BV": 64, "m_j": 1, "g_j": 1}
        names: dict[str, dict[str, Any]] = {
            "attention_forward": {"CAUSAL": False, "ONE_BLOCK": False},
            "attention_backward_rows": {"grad_scores_ptr": None},
            "attention_backward_columns": {"CAUSAL": False},
        }
        for name, options in names.items():
            pointers = {"mask_ptr": "*u8", "delta_ptr": "*fp32"}
            constants = {**tile, **options}
            found.append(Kernel(file, name, storage, warps, constants, pointers, rows))
    split, bf16 = "attention_split_kernels", dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16")
    parts = {f"{name}_parts_ptr": "*bf16" for name in "qkv"}
    tile = {"BM": 64, "BN": 64, "BD": 64, "BV": 64}
    options = {**tile, "CAUSAL": False, "ONE_BLOCK": False, "STAGES": 2, "m_j": 1}
    pointers = {**bf16, "mask_ptr": "*u8"}
    widths = ("width", "value_width", "q_t", "k_t", "v_t")
    found.append(Kernel(split, "attention_parts", "fp32", 4, tile, parts, widths))
    found.append(Kernel(split, "attention_split", "fp32", 4, options, pointers, rows, ["sm_90"]))
    options = {**options, "BN": 32}
    targets = ["sm_80", "sm_100"]
    found.append(Kernel(split, "attention_split", "fp32", 4, options, pointers, rows, targets))
    for storage in ("bf16", "fp32"):
        row = {"BM": 2, "BN": 2048, "m_j": 1, "g_j": 1, "ONE_BLOCK": True}
        wide = dict.fromkeys(("scores_ptr", "p_ptr"), "*fp32") | {"mask_ptr": "*u8"}
        for name, options in (
            ("attention_softmax", {"CAUSAL": False}),
            ("attention_softmax_backward", {}),
        ):
            constants = {**row, **options}
            found.append(Kernel(between, name, storage, 8, constants, wide, rows))
    return found
