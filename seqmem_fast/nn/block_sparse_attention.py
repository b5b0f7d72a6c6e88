"""Multi-head attention over listed blocks of keys.

Parameters, their names and initialisation are those of ``torch.nn.MultiheadAttention``, whose
state_dicts load both ways; the attention is :func:`seqmem_fast.ops.block_sparse_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.block_sparse_attention import check_block
from .sparse_attention import SparseAttention

__all__ = ["BlockSparseAttention"]


class BlockSparseAttention(SparseAttention):
    """Attention in which each block of queries sees the blocks of keys that a mask names.

    Args:
        embed_dim: E, the width of the query and of the output.
        num_heads: H, dividing E; each head has E / H features.
        block: (Bq, Bk), queries and keys of a block.
        bias: with in_proj_bias and out_proj.bias.
        is_causal: query i sees no key after key i.
        dropout: probability of zeroing a weight in training.
        normalizer, alpha: as in :func:`seqmem_fast.ops.block_sparse_attention`.
        kdim, vdim: widths of key and value, E by default.
        batch_first: tensors are [B, T, *] instead of [T, B, *].
        device, dtype: of the parameters.

    ``attention(query, key, value, blocks, key_end=None, need_weights=True) -> (output, weights)``:

    - query [Tq, B, E], key [Tk, B, kdim], value [Tk, B, vdim].
    - blocks, key_end: as in :func:`seqmem_fast.ops.block_sparse_attention`; key_end [B] are the
      lengths of rows that are padded.
    - need_weights: False returns None instead of weights.
    - returns output, laid out as query, and each head's weights of each listed block
      [B, H, N, Bq, Bk]. A query that sees no key gets zeros (and then out_proj).

    Errors are a ValueError for shapes and values, a TypeError for dtypes and devices. Equation and
    papers: :mod:`seqmem_fast.ops.block_sparse_attention`; parameters: :class:`Attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        block: tuple[int, int] = (64, 64),
        bias: bool = True,
        *,
        is_causal: bool = False,
        dropout: float = 0.0,
        normalizer: str = "softmax",
        alpha: Tensor | float = 1.5,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_block(block)
        if min(block) < 1:
            raise ValueError(
                "seqmem::block_sparse_attention: expected block of two sizes in 1..1048576, "
                f"got {min(block)}"
            )
        options = (bias, dropout, normalizer, alpha, kdim, vdim, batch_first, device, dtype)
        super().__init__(embed_dim, num_heads, *options)
        self.block, self.is_causal = block, is_causal

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Tensor,
        key_end: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self._heads_of_batch(query, key, value)
        output, weights = ops.block_sparse_attention(
            q,
            k,
            v,
            blocks,
            self.block,
            is_causal=self.is_causal,
            key_end=key_end,
            **self._rule(need_weights),
        )
        return self._joined(output), weights

    def extra_repr(self) -> str:
        causal = ", is_causal=True" if self.is_causal else ""
        return f"{super().extra_repr()}, block={self.block}{causal}"
