"""Triton window attention on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from ahead_of_time import Kernel
from sparse_attention_interpreted import SparseAttentionInterpreted, check_heads, kernels_of
from sparse_attentions import WINDOW

import seqmem_fast
from seqmem_fast._triton import window_attention as launchers
from seqmem_fast.reference import window_attention as reference
from seqmem_fast.reference.common import Sample

assert seqmem_fast.__version__
SIZES = (2, 1, 17, 20, 5, 6)  # B, Hk, Tq, Tk, D, Dv: two blocks of each, no power of two in sight
SAMPLES = {s.name: s for s in reference.sample_inputs(sizes=SIZES)}
# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(2, 1, 40, 40, 20, 32)]
check = partial(check_heads, launchers, WINDOW)


class TestWindowAttention(SparseAttentionInterpreted):
    op = WINDOW
    launchers = launchers
    samples = SAMPLES
    plain = "causal"
    rich = ("ranges", "global", "everything")
    outputs = 3

    def nothing(self, queries: int) -> tuple[int, int]:
        return 3, 0


def test_keys_that_nobody_sees_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_BLOCK", 16)
    q, k, v, *_ = (t.clone() for t in SAMPLES["causal"].args[:3])
    tail = (3, 2, 1, 0, None, torch.tensor([20, 9]), 0, None, 1.0, 0.0, None)
    expected = launchers.window_attention(q, k, v, *tail, True)
    k[1, :, 9:], v[1, :, 9:] = torch.nan, torch.inf
    found = launchers.window_attention(q, k, v, *tail, True)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("queries", [1, 3])
def test_global_keys_of_classes_that_have_no_query(queries: int) -> None:
    args = torch.randn(2, 2, queries, 5), torch.randn(2, 1, 9, 5), torch.randn(2, 1, 9, 6), 1, 0
    check(Sample("few", args, {"dilation": 4, "offset": 6, "global_keys": 3}), torch.float32)


def kernels() -> list[Kernel]:
    blocks = {"BM": 32, "BN": 32}
    launches = {
        "forward": {**blocks, "EACH_START": False, "EACH_END": True},
        "backward_rows": blocks,
        "backward_columns": {**blocks, "GLOBAL": False},
    }
    narrow = {"BN": 16}  # with dropout in float32
    in_float32 = {"backward_columns": {**narrow, "BM": 16}}
    return kernels_of(
        WINDOW,
        ("start_ptr", "end_ptr"),
        launches,
        {"forward": narrow, "backward_rows": narrow, **in_float32},
        {"forward": {"BM": 16}},
    )
