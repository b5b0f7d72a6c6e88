"""Triton block-sparse attention on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from ahead_of_time import Kernel
from sparse_attention_interpreted import SparseAttentionInterpreted, check_heads, kernels_of
from sparse_attentions import BLOCK_SPARSE

import seqmem_fast
from seqmem_fast._triton import block_sparse_attention as launchers
from seqmem_fast.reference import block_sparse_attention as reference

assert seqmem_fast.__version__
SIZES = (2, 1, 50, 60, 5, 6)  # B, Hk, Tq, Tk, D, Dv: blocks of 16 by 20, the last ones short
SAMPLES = {s.name: s for s in reference.sample_inputs(sizes=SIZES)}
# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(2, 1, 96, 120, 20, 32)]
check = partial(check_heads, launchers, BLOCK_SPARSE)


class TestBlockSparseAttention(SparseAttentionInterpreted):
    op = BLOCK_SPARSE
    launchers = launchers
    samples = SAMPLES
    plain = "shared"
    rich = ("causal",)

    def nothing(self, queries: int) -> tuple[torch.Tensor, tuple[int, int]]:
        return torch.full((1, 1, 2, 2), -1), SAMPLES["shared"].args[4]


def test_blocks_that_do_not_exist_hold_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose lists are not read by the checks."""
    monkeypatch.setattr(launchers, "_BLOCK", 16)
    q, k, v, blocks, block = SAMPLES["shared"].args
    call = partial(launchers.block_sparse_attention.__wrapped__, q, k, v)  # type: ignore[attr-defined]
    tail = (*block, False, None, None, 1.0, 0.0, None, True)
    output, weights = call(blocks, *tail)
    more = torch.tensor([[2**40, 0], [9, 9]])[None, None]
    again, more_weights = call(torch.cat((blocks, more), 2), *tail)
    assert torch.equal(again, output) and not more_weights[:, :, -2:].any()
    torch.testing.assert_close(more_weights[:, :, :-2], weights)


def kernels() -> list[Kernel]:
    parts = {"BM": 32, "BN": 32}
    launches = {
        "forward": {**parts, "CAUSAL": True, "EACH_END": True},
        "backward_rows": parts,
        "backward_columns": parts,
    }
    integers = ("blocks_ptr", "rows_ptr", "by_key_ptr", "columns_ptr", "end_ptr")
    with_entmax = {"forward": {"BN": 16}, "backward_columns": {"BM": 16}}
    in_float32 = {"backward_rows": {"BN": 16}}
    return kernels_of(BLOCK_SPARSE, integers, launches, in_float32, with_entmax)
