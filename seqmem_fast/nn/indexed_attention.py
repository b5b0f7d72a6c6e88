"""Multi-head attention to the keys of each query's highest scores.

Parameters, their names and initialisation are those of ``torch.nn.MultiheadAttention``, whose
state_dicts load both ways; the attention is :func:`seqmem_fast.ops.top_k_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .sparse_attention import SparseAttention

__all__ = ["TopKAttention"]


class TopKAttention(SparseAttention):
    """Attention in which each query sees the keys of its highest scores alone.

    Args:
        embed_dim: E, the width of the query and of the output.
        num_heads: H, dividing E; each head has E / H features.
        count: C, how many keys a query sees.
        bias: with in_proj_bias and out_proj.bias.
        is_causal: query i sees no key after key i.
        dropout: probability of zeroing a weight in training.
        normalizer, alpha: as in :func:`seqmem_fast.ops.indexed_attention`.
        kdim, vdim: widths of key and value, E by default.
        batch_first: tensors are [B, T, *] instead of [T, B, *].
        device, dtype: of the parameters.

    ``attention(query, key, value, key_end=None, need_weights=True) -> (output, weights, index)``:

    - query [Tq, B, E], key [Tk, B, kdim], value [Tk, B, vdim].
    - key_end: as in :func:`seqmem_fast.ops.top_k_attention`; [B] are the lengths of rows that are
      padded.
    - need_weights: False returns None instead of weights.
    - returns output, laid out as query, and each head's weights and keys [B, H, Tq, C]. A query
      that sees no key gets zeros (and then out_proj).

    Errors are a ValueError for shapes and values, a TypeError for dtypes and devices. Equation and
    papers: :mod:`seqmem_fast.ops.indexed_attention`; parameters: :class:`Attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        count: int,
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
        if count < 1:
            raise ValueError(f"seqmem::top_k_attention: expected count of at least 1, got {count}")
        options = (bias, dropout, normalizer, alpha, kdim, vdim, batch_first, device, dtype)
        super().__init__(embed_dim, num_heads, *options)
        self.count, self.is_causal = count, is_causal

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_end: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        q, k, v = self._heads_of_batch(query, key, value)
        output, weights, index = ops.top_k_attention(
            q,
            k,
            v,
            self.count,
            is_causal=self.is_causal,
            key_end=key_end,
            **self._rule(need_weights),
        )
        return self._joined(output), weights, index

    def extra_repr(self) -> str:
        causal = ", is_causal=True" if self.is_causal else ""
        return f"{super().extra_repr()}, count={self.count}{causal}"
