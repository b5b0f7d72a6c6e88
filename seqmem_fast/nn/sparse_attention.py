"""What the modules of attention to some of the keys share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import Attention, refuse


class SparseAttention(Attention):
    """The projections around an op that has no mask; arguments as its subclasses have them."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool,
        dropout: float,
        normalizer: str,
        alpha: Tensor | float,
        kdim: int | None,
        vdim: int | None,
        batch_first: bool,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias=bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
            normalizer=normalizer,
            alpha=alpha,
        )

    def _rule(self, need_weights: bool) -> dict[str, Any]:
        """How the op makes weights of scores, and whether it returns them."""
        return {
            "normalizer": self.normalizer,
            "alpha": self.alpha,
            "dropout": self.dropout if self.training else 0.0,
            "return_weights": need_weights,
        }

    def _heads_of_batch(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Checked and projected, [B, H, T, E / H] each; three dimensions are asked for."""
        if query.dim() != 3:
            refuse("query with 3 dimensions", query)
        self._check(query, key, value, None, None, False)
        return self._heads(query, key, value)

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Projected, [B, H, T, E / H] each."""
        projected = self._project(query, key, value)
        if not self.batch_first:
            projected = tuple(t.transpose(0, 1) for t in projected)
        return tuple(t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in projected)

    def _joined(self, output: Tensor) -> Tensor:
        output = output.transpose(1, 2) if self.batch_first else output.permute(2, 0, 1, 3)
        projected: Tensor = self.out_proj(output.flatten(2))
        return projected
