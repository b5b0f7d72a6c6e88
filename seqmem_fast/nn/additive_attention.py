"""Additive attention with its projections, over :mod:`seqmem_fast.ops.additive_attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.common import autocast_dtype

__all__ = ["AdditiveAttention"]


class AdditiveAttention(nn.Module):
    r"""Bahdanau's attention: scores by a small network, softmax over the keys.

    .. math::
        e_{ij} = v^\top \tanh(W s_i + U h_j), \qquad \alpha = \operatorname{softmax}_j(e), \qquad
        c_i = \sum_j \alpha_{ij} \, \text{value}_j

    Bahdanau, Cho & Bengio 2014 (arXiv 1409.0473). Without biases, as there.

    Args:
        query_dim: width of a query s, such as a decoder's hidden state.
        key_dim: width of a key h, such as an encoder's output.
        hidden_dim: A, the width both are projected to.
        device, dtype: of the parameters.

    Parameters: ``query_proj.weight`` [A, query_dim], ``key_proj.weight`` [A, key_dim] and
    ``score_weight`` [A], each drawn uniformly within one over the root of its input's width.

    ``attention(query, key, value, mask=None) -> (output, weights)`` with query
    [..., Tq, query_dim], key [..., Tk, key_dim], value [..., Tk, Dv] and a mask that broadcasts to
    [..., Tq, Tk]; masks and what is differentiable as in
    :func:`seqmem_fast.ops.additive_attention`. A decoder that runs step by step projects its keys
    once: ``keys = attention.project_keys(key)``, then
    ``attention(query, keys, value, keys_projected=True)``.

    Raises:
        ValueError: a size or shape does not fit.
        TypeError: a dtype, device or layout does not fit.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"query_dim": query_dim, "key_dim": key_dim, "hidden_dim": hidden_dim}
        for name, size in sizes.items():
            if size <= 0:
                raise ValueError(f"AdditiveAttention: expected {name} > 0, got {size}")
        self.query_dim, self.key_dim, self.hidden_dim = query_dim, key_dim, hidden_dim
        self.query_proj = nn.Linear(query_dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.key_proj = nn.Linear(key_dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.score_weight = nn.Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        self.query_proj.reset_parameters()
        self.key_proj.reset_parameters()
        bound = 1 / math.sqrt(self.hidden_dim)
        nn.init.uniform_(self.score_weight, -bound, bound)

    def project_keys(self, key: Tensor) -> Tensor:
        """U h: [..., Tk, key_dim] -> [..., Tk, A]."""
        self._check("key", key, self.key_dim)
        return self.key_proj(key)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        *,
        keys_projected: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """output [..., Tq, Dv] and weights [..., Tq, Tk]; see the class."""
        self._check("query", query, self.query_dim)
        keys = key if keys_projected else self.project_keys(key)
        return ops.additive_attention(self.query_proj(query), keys, value, self.score_weight, mask)

    def extra_repr(self) -> str:
        """The sizes, as the constructor takes them."""
        return f"{self.query_dim}, {self.key_dim}, {self.hidden_dim}"

    def _check(self, name: str, t: Tensor, width: int) -> None:
        if not isinstance(t, Tensor):
            kind = type(t).__name__
            raise TypeError(f"AdditiveAttention: expected {name} to be a tensor, got {kind}")
        if t.dim() < 2 or t.size(-1) != width:
            raise ValueError(
                f"AdditiveAttention: expected {name} of shape [..., T, {width}], "
                f"got {list(t.shape)}"
            )
        wanted = self.score_weight.dtype
        if t.dtype != wanted and autocast_dtype(t) is None:
            raise TypeError(f"AdditiveAttention: expected {name} of dtype {wanted}, got {t.dtype}")
