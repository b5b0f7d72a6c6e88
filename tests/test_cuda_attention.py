"""Attention's CUDA C++: it compiles without spills, and its arithmetic is right.

As in test_cuda_lstm.py, neither needs a GPU.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from cuda_stand_in import (
    TOLERANCES,
    assert_near,
    check_each_alone,
    sources_on_cpu,
    spills,
)

from seqmem_fast.reference import attention as reference
from seqmem_fast.reference.common import Sample

pytestmark = pytest.mark.slow  # the sources are compiled first
SIZES = {  # (B, Tq, Tk, D, Dv)
    "odd": (3, 5, 7, 4, 6),
    "tiles": (1, 33, 70, 8, 72),
    "wide": (1, 17, 33, 96, 80),
    "one": (2, 1, 1, 1, 1),
}


# 3 kernels, 4 types, vectors and single elements
test_compiles_without_spills = spills("attention", 24)
ops = sources_on_cpu("attention")


def check(ops: Any, sample: Sample) -> None:
    """A call and its gradients, for each of the two outputs alone and for both."""
    query, key, value, mask = sample.args
    scale, causal = sample.kwargs.get("scale"), sample.kwargs.get("is_causal", False)
    floating = mask is not None and mask.is_floating_point()
    leaves = [t.double().requires_grad_() for t in (query, key, value)]
    leaves += [mask.double().requires_grad_()] if floating else []
    wide_mask = leaves[3] if floating else mask
    right = reference.attention(*leaves[:3], wide_mask, scale, causal)
    ours = ops.attention(query, key, value, mask, scale, causal, 1)
    for a, b in zip(ours, right, strict=True):
        assert_near(a, b, sample.name)
    seeds = [torch.randn_like(a) for a in ours]
    saved = right[1].detach().to(query.dtype)
    for given in ([True, True], [True, False], [False, True]):
        pairs = zip(right, seeds, given, strict=True)
        loss = sum((a * seed.double()).sum() for a, seed, used in pairs if used)
        grads = torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
        gradients = [seed if used else None for seed, used in zip(seeds, given, strict=True)]
        args = (*gradients, query, key, value, mask, saved, scale, causal, 1)
        found = ops.attention_backward(*args, [True] * 4)
        assert floating or found[3].shape == (0,)
        for k, (a, b) in enumerate(zip(found, grads, strict=False)):
            assert_near(a, b, f"{sample.name}, gradient {k}", 6)
    check_each_alone(partial(ops.attention_backward, *args), found, len(leaves))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", SIZES)
def test_agrees_with_the_reference(ops: Any, sizes: str, dtype: torch.dtype) -> None:
    for sample in reference.sample_inputs(dtype=dtype, sizes=SIZES[sizes]):
        if sample.args[0].dim() <= 4 and "normalizer" not in sample.kwargs:
            check(ops, sample)


def test_the_widest_heads(ops: Any) -> None:
    for sample in reference.sample_inputs(sizes=(1, 3, 9, 128, 128)):
        if "normalizer" not in sample.kwargs:
            check(ops, sample)


def test_strides_and_broadcasting(ops: Any) -> None:
    """Heads in the second dimension of the storage, keys of one batch for all, masks."""
    query = torch.randn(2, 9, 3, 8).transpose(1, 2)  # [2, 3, 9, 8]
    key, value = torch.randn(3, 12, 8), torch.randn(2, 1, 8, 12).mT
    mask = torch.rand(2, 1, 1, 12) < 0.7
    check(ops, Sample("heads", (query, key, value, mask)))
    check(ops, Sample("added", (query, key, value, torch.randn(9, 12))))
    check(ops, Sample("by key", (query, key, value, torch.randn(12))))


def test_masks_that_leave_nothing(ops: Any) -> None:
    query, key, value = torch.randn(2, 4, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    _, weights = ops.attention(query, key, value, torch.zeros(6, dtype=torch.bool), None, False, 1)
    assert torch.allclose(weights, torch.full_like(weights, 1 / 6))
    _, weights = ops.attention(query, key, value, torch.full((6,), -math.inf), None, False, 1)
    assert weights.isnan().all()


@pytest.mark.parametrize(
    "shape, keys", [((2, 3, 4, 5, 8), 5), ((1, 1, 129), 4), ((1, 2, 8), 800), ((1, 2, 8), 0)]
)
def test_other_calls_go_to_triton(ops: Any, shape: tuple[int, ...], keys: int) -> None:
    """More than two leading dimensions, wide heads, long rows of scores, no keys."""
    query = torch.randn(shape)
    key = torch.randn(*shape[:-2], keys, shape[-1])
    with pytest.raises(RuntimeError, match="attention_triton"):
        ops.attention(query, key, key, None, None, False, 1)
    weights = torch.randn(*shape[:-1], keys)
    with pytest.raises(RuntimeError, match="attention_backward_triton"):
        args = (None, weights, query, key, key, None, weights, None, False, 1)
        ops.attention_backward(*args, [True] * 4)
