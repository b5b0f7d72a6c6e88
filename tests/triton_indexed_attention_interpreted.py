"""Triton indexed attention on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from ahead_of_time import Kernel
from sparse_attention_interpreted import SparseAttentionInterpreted, check_heads, kernels_of
from sparse_attentions import INDEXED

import seqmem_fast
from seqmem_fast._triton import indexed_attention as launchers
from seqmem_fast.reference import indexed_attention as reference
from seqmem_fast.reference.common import Sample

assert seqmem_fast.__version__
SIZES = (2, 1, 6, 9, 5, 6)  # B, Hk, Tq, Tk, D, Dv
SAMPLES = {s.name: s for s in reference.sample_inputs(sizes=SIZES)}
*_tensors, _index = SAMPLES["each"].args
_long = _index.repeat(1, 1, 1, 8)[..., :35]  # more places than a kernel takes at once
SAMPLES["long"] = Sample("long", (*_tensors, _long))
# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(2, 1, 40, 40, 20, 32)]
check = partial(check_heads, launchers, INDEXED)


class TestIndexedAttention(SparseAttentionInterpreted):
    op = INDEXED
    launchers = launchers
    samples = SAMPLES
    plain = "shared"
    rich = ("long",)

    def nothing(self, queries: int) -> tuple[torch.Tensor]:
        return (torch.full((1, 1, queries, 3), -1),)


def test_keys_that_do_not_exist_are_none() -> None:
    """As on a GPU, whose lists are not read by the checks."""
    run = launchers.indexed_attention.__wrapped__  # type: ignore[attr-defined]
    q, k, v, index = SAMPLES["shared"].args
    output, _ = run(q, k, v, index, None, 1.0, 0.0, None, True)
    more = torch.tensor([2**40, 9, -7]).expand(*index.shape[:3], -1)
    again, weights = run(q, k, v, torch.cat((index, more), -1), None, 1.0, 0.0, None, True)
    torch.testing.assert_close(again, output)
    assert not weights[..., -3:].any()


def test_the_highest_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_SCORES", 40)  # two queries at a time
    q, k, *_ = SAMPLES["by_head"].args
    for end in (None, torch.tensor([9, 4]), torch.randint(0, 10, (2, 6))):
        for causal in (False, True):
            found = launchers.top_k_keys(q, k, 4, causal, end, None)
            expected = reference.top_k_keys(q, k, 4, is_causal=causal, key_end=end)
            assert torch.equal(found, expected)
    assert launchers.top_k_keys(q[:, :, :0], k, 4, False, None, None).shape == (2, 2, 0, 4)


def kernels() -> list[Kernel]:
    launches = {name: {"BC": 32} for name in ("forward", "backward_rows", "backward_keys")}
    integers = ("index_ptr", "places_ptr", "begins_ptr")
    return kernels_of(INDEXED, integers, launches, {}, {"forward": {"warps": 4}})
