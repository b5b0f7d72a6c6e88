"""Attention in bf16 on tiles or dot products, real or emulated: accuracy, bits, rows.

test_isa.py runs these in builds that emulate them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_suite import check_same_bits_at_any_thread_count, error
from test_attention import plain_case
from torch import Tensor

from seqmem_fast import _C, ops
from seqmem_fast.reference import attention as reference

BF16 = torch.bfloat16
in_bf16 = pytest.mark.skipif(_C.bf16_in_use() == "float32", reason="no bf16 products here")

# (B, Tq, Tk, D, Dv): around the 24 or 32 rows of a block, panels of 64 keys or features, blocks of
# 32; the last one's weights are written past the caches.
SIZES = [
    *((2, queries, 40, 32, 32) for queries in (24, 31, 32, 33, 48, 49, 70)),
    *((2, 30, keys, 32, 32) for keys in (1, 15, 31, 32, 33, 63, 64, 65, 130, 1000)),
    *((2, 30, 40, width, 40) for width in (24, 31, 33, 64, 65, 100)),
    *((2, 30, 40, 32, width) for width in (24, 31, 33, 64, 65, 130)),
    (5, 1000, 1024, 24, 24),
]
MASKS = ["no mask", "allowed", "added", "causal"]


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> list[Tensor]:
    """Products and softmax as separate ops."""
    scores = q @ k.mT / math.sqrt(q.size(-1))
    if mask is not None:
        added = mask if mask.is_floating_point() else torch.where(mask, 0.0, -1e9)
        scores = scores + added.to(scores.dtype)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    weights = torch.softmax(scores, -1)
    return [weights @ v, weights]


def tensors(sizes: tuple[int, ...]) -> list[Tensor]:
    batch, queries, keys, width, value_width = sizes
    shapes = (queries, width), (keys, width), (keys, value_width)
    return [torch.randn(batch, *shape).to(BF16) for shape in shapes]


def mask_of(name: str, sizes: tuple[int, ...]) -> Tensor | None:
    batch, queries, keys, *_ = sizes
    if name == "allowed":
        return torch.rand(batch, queries, keys) < 0.7
    return torch.randn(queries, keys).to(BF16) if name == "added" else None


@in_bf16
@pytest.mark.sanitize
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_as_exact_as_eager(sizes: tuple[int, ...], name: str) -> None:
    """Both outputs and the gradients of all that are floating-point."""
    given, mask, causal = tensors(sizes), mask_of(name, sizes), name == "causal"
    seeds = [torch.randn(*sizes[:2], n).to(BF16) for n in (sizes[4], sizes[2])]

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [
            t if t is None or t.dtype == torch.bool else t.to(dtype).requires_grad_()
            for t in (*given, mask)
        ]
        outputs = list(function(*leaves, causal))
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        return [*outputs, *torch.autograd.grad(outputs, wanted, [t.to(dtype) for t in seeds])]

    def fused(*arguments: Any) -> Any:
        return ops.attention(*arguments[:4], is_causal=arguments[4])

    runs = run(fused, BF16), run(eager, BF16), run(eager, torch.float64)
    for k, (mine, theirs, right) in enumerate(zip(*runs, strict=True)):
        assert mine.dtype == BF16
        assert error(mine, right) <= 1.3 * error(theirs, right) + 2e-3, f"value {k}"


@in_bf16
@pytest.mark.parametrize("name", MASKS)
def test_strides_do_not_matter(name: str) -> None:
    sizes = (3, 50, 70, 40, 36)
    given, mask, causal = tensors(sizes), mask_of(name, sizes), name == "causal"
    wide = [torch.randn(3, t.size(2), t.size(1), 2).to(BF16) for t in given]
    strided = [w[..., 1].transpose(1, 2).copy_(t) for w, t in zip(wide, given, strict=True)]
    expected = ops.attention(*given, mask, is_causal=causal)
    for a, b in zip(ops.attention(*strided, mask, is_causal=causal), expected, strict=True):
        assert torch.equal(a, b)


@in_bf16
@pytest.mark.parametrize("name", [s.name for s in reference.sample_inputs() if not s.kwargs])
def test_same_bits_however_the_work_is_shared(name: str, restored_threads: None) -> None:
    check_same_bits_at_any_thread_count(plain_case(3, 200, 130, 40, 40, BF16, name))


@in_bf16
@pytest.mark.sanitize
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_query_stays_in_its_row(bad: float) -> None:
    given = tensors((2, 60, 90, 32, 32))
    clean = ops.attention(*given)
    given[0][1, 37, 5] = bad
    for found, before in zip(ops.attention(*given), clean, strict=True):
        assert found[1, 37].isnan().all()
        kept = torch.ones(2, 60, dtype=torch.bool)
        kept[1, 37] = False
        assert torch.equal(found[kept], before[kept])


@in_bf16
def test_far_scores_and_masked_rows() -> None:
    """Scores of 1e4 beside each other; rows in which nothing is allowed weigh all keys alike."""
    q, k, v = tensors((1, 40, 50, 32, 32))
    mask = torch.rand(40, 50) < 0.5
    mask[7] = False
    _, weights = ops.attention(q * 300, k * 300, v, mask)
    assert weights.isfinite().all() and (weights[:, :7][..., ~mask[:7]] == 0).all()
    torch.testing.assert_close(weights[0, 7], torch.full((50,), 0.02, dtype=BF16))
    options: dict[str, Any] = {"scale": 0.3}
    found, exact = (
        ops.attention(*(t.to(kind) for t in (q, k, v)), **options) for kind in (BF16, torch.float64)
    )
    assert error(found[1], exact[1]) < 4e-3
