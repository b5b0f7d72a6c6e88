"""Multi-head attention as torch.nn has it, over :mod:`seqmem_fast.ops.attention`.

Constructor, call form, attributes, parameter names and initialisation are those of
``torch.nn.MultiheadAttention``, and state_dicts load both ways (a learned alpha is a parameter
more). ``forward`` uses only attributes
that torch.nn's module has as well, so :func:`seqmem_fast.accelerate` can run it on one.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _C, ops
from ..ops.common import (
    MASKED,
    alpha_of,
    dynamo_traces,
    overridden,
    require_like,
    transform_active,
)

__all__ = ["Attention"]


class Attention(nn.Module):
    """Multi-head attention, a drop-in for :class:`torch.nn.MultiheadAttention`.

    Args:
        embed_dim: E, the width of the query and of the output.
        num_heads: H, dividing E; each head has E / H features.
        dropout: probability of zeroing a weight in training.
        bias: with in_proj_bias and out_proj.bias.
        add_bias_kv: one learned key and value more, bias_k and bias_v.
        add_zero_attn: one key and value of zeros more.
        kdim, vdim: widths of key and value, E by default.
        batch_first: tensors are [B, T, *] instead of [T, B, *].
        device, dtype: of the parameters.
        normalizer, alpha: as in :func:`seqmem_fast.ops.attention`; alpha is a number, 1.5 by
            default, or a Parameter, which is then learned.

    ``attention(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
    average_attn_weights=True, is_causal=False) -> (output, weights)``:

    - query [Tq, B, E], key [Tk, B, kdim], value [Tk, B, vdim], or unbatched without B.
    - key_padding_mask: [B, Tk] ([Tk] unbatched), bool (true: the key is left out) or floating
      (added to the scores).
    - attn_mask: [Tq, Tk] or [B * H, Tq, Tk], likewise.
    - need_weights: False returns None instead of weights; with softmax it calls
      ``F.scaled_dot_product_attention``, which never holds them.
    - average_attn_weights: weights are the heads' mean [B, Tq, Tk]; False gives each head's,
      [B, H, Tq, Tk]. Unbatched weights have no B. Both are differentiable.
    - is_causal: a hint that attn_mask, which must be given, is the causal one: query i sees keys
      0..i alone. Half of the work is then left out.
    - returns output, laid out as query.

    A query whose every key is left out gets zeros (and then out_proj) where no weights of softmax
    are wanted, as in ``torch.nn.MultiheadAttention``. Else, where torch's weights are NaN, it
    attends to all keys alike if bool masks left them out; -inf in a floating mask gives NaN as in
    torch, and zeros with another normalizer.
    Errors are a ValueError for shapes and values, a TypeError for dtypes and devices. Equation and
    paper: :mod:`seqmem_fast.ops.attention`.

    Parameters: in_proj_weight [3E, E] (rows of query, key, value), or, where kdim or vdim differs
    from E, q_proj_weight [E, E], k_proj_weight [E, kdim] and v_proj_weight [E, vdim];
    in_proj_bias [3E]; bias_k and bias_v [1, 1, E]; out_proj.weight [E, E] and out_proj.bias [E].
    """

    __constants__: ClassVar[list[str]] = ["batch_first"]
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        normalizer: str = "softmax",
        alpha: Tensor | float = 1.5,
    ) -> None:
        super().__init__()
        learned = isinstance(alpha, Tensor) and normalizer == "entmax"
        alpha_of("attention", normalizer, 1.5 if learned else alpha)  # refuses what the op would
        self.normalizer = normalizer
        self.alpha: Any = alpha
        if not 0 <= dropout <= 1:
            raise ValueError(f"seqmem::attention: expected dropout in 0..1, got {dropout}")
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                "seqmem::attention: expected embed_dim > 0 that num_heads > 0 divides, "
                f"got {embed_dim} and {num_heads}"
            )
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        same = self.kdim == embed_dim and self.vdim == embed_dim
        # Where this is true, torch's transformer layers may compute a softmax of their own instead.
        self._qkv_same_embed_dim = same and normalizer == "softmax" and type(self) is Attention
        self.num_heads = num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.head_dim = embed_dim // num_heads
        self.add_zero_attn = add_zero_attn
        shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(_PARAMETERS[:5])
        if same:
            shapes["in_proj_weight"] = (3 * embed_dim, embed_dim)
        else:
            shapes["q_proj_weight"] = (embed_dim, embed_dim)
            shapes["k_proj_weight"] = (embed_dim, self.kdim)
            shapes["v_proj_weight"] = (embed_dim, self.vdim)
        if bias:
            shapes["in_proj_bias"] = (3 * embed_dim,)
        if add_bias_kv:
            shapes["bias_k"] = shapes["bias_v"] = (1, 1, embed_dim)
        else:
            self.bias_k = self.bias_v = None  # no parameters, as in torch
        for name, shape in shapes.items():
            value = None if shape is None else torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> Attention:
        """The same attention over the very Parameters of a ``torch.nn.MultiheadAttention``."""
        if cls is not Attention:
            raise TypeError(
                f"seqmem::attention: expected Attention.from_torch, got {cls.__name__}.from_torch: "
                "make the module and load the other one's state_dict"
            )
        attention = cls(
            module.embed_dim,
            module.num_heads,
            module.dropout,
            module.in_proj_bias is not None,
            module.bias_k is not None,
            module.add_zero_attn,
            module.kdim,
            module.vdim,
            module.batch_first,
            device="meta",
        )
        attention._parameters = module._parameters
        attention.out_proj = module.out_proj
        return attention.train(module.training)

    def reset_parameters(self) -> None:
        """As torch.nn.MultiheadAttention draws them; out_proj.weight stays as nn.Linear drew it."""
        for name in _PARAMETERS[:4]:
            if (weight := getattr(self, name)) is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    # The names that torch.nn.MultiheadAttention has beside forward.
    _reset_parameters = reset_parameters
    merge_masks = nn.MultiheadAttention.merge_masks

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        unmasked = key_padding_mask is None and attn_mask is None and not is_causal
        if unmasked and Attention._is_usual(self, query, key, value):
            try:
                done = _C.attention_module(
                    query,
                    key,
                    value,
                    cast(Tensor, self.in_proj_weight),
                    self.in_proj_bias,
                    self.out_proj.weight,
                    self.out_proj.bias,
                    self.num_heads,
                    self.batch_first,
                    need_weights,
                    average_attn_weights,
                )
            except TypeError:  # what is no tensor is named below
                done = None
            if done is not None:
                return done
        Attention._check(self, query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        batch = 0 if self.batch_first or not batched else 1  # the batch's dimension
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        q, k, v = Attention._project(self, query, key, value)  # [B, T, E], or [T, B, E]
        if batch == 1:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        causal = is_causal and key_padding_mask is None and not Attention._extends(self)
        extra = None if causal else attn_mask
        ours = need_weights or getattr(self, "normalizer", "softmax") != "softmax"
        mask = Attention._mask(self, key_padding_mask, extra, q, ours)
        k, v, mask = Attention._extend(self, k, v, mask)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        # output [B, H, Tq, E / H]
        output, weights = Attention._attend(self, q, k, v, mask, causal, need_weights)
        output = output.transpose(1, 2) if batch == 0 else output.permute(2, 0, 1, 3)
        output = Attention._join(self, output.flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output, weights

    def _is_usual(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the compiled module may run the whole call at once."""
        projection = self.out_proj
        return not (
            self.in_proj_weight is None
            or Attention._extends(self)
            or getattr(self, "normalizer", "softmax") != "softmax"
            or (self.training and self.dropout)
            or transform_active()
            or dynamo_traces()
            or overridden(query, key, value, self.in_proj_weight, projection.weight)
            or getattr(projection.forward, "__func__", None) is not nn.Linear.forward
            or projection._forward_hooks
            or projection._forward_pre_hooks
            or projection._backward_hooks
            or projection._backward_pre_hooks
        )

    def _join(self, output: Tensor) -> Tensor:
        """out_proj; of a torch.nn.MultiheadAttention its weights alone, as torch has it."""
        projection = self.out_proj
        if isinstance(self, Attention):
            joined: Tensor = projection(output)
            return joined
        return F.linear(output, projection.weight, projection.bias)

    def _extends(self) -> bool:
        """Whether keys and values are added to those given."""
        return self.bias_k is not None or self.add_zero_attn

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """q [B, H, Tq, E/H], k and v [B, H, Tk, E/H] -> [B, H, Tq, E/H], [B, H, Tq, Tk]."""
        drop = self.dropout if self.training else 0.0
        # A torch.nn.MultiheadAttention that is accelerated has no normalizer.
        normalizer = getattr(self, "normalizer", "softmax")
        rule: dict[str, Any] = (
            {} if normalizer == "softmax" else {"normalizer": normalizer, "alpha": self.alpha}
        )
        if not need_weights and not rule:
            attended = F.scaled_dot_product_attention(q, k, v, mask, drop, is_causal=causal)
            return attended, None
        if drop == 0:
            output, weights = ops.attention(q, k, v, mask, is_causal=causal, **rule)
            return output, weights if need_weights else None
        # Values of no features: the weights alone, which dropout thins before they meet the values.
        _, weights = ops.attention(q, k, v[..., :0], mask, is_causal=causal, **rule)
        weights = F.dropout(weights, drop)
        return weights @ v, weights if need_weights else None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        bias = self.in_proj_bias
        if self.in_proj_weight is None:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            inputs = (query, key, value)
            return tuple(map(F.linear, inputs, cast(Any, weights), cast(Any, biases)))
        weight = self.in_proj_weight
        if query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        width = self.embed_dim
        if key is value:
            q_bias, kv_bias = (None, None) if bias is None else bias.split([width, 2 * width])
            q = F.linear(query, weight[:width], q_bias)
            return q, *F.linear(key, weight[width:], kv_bias).chunk(2, -1)
        parts = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), weight.chunk(3), cast(Any, parts)))

    def _mask(
        self, padding: Tensor | None, extra: Tensor | None, query: Tensor, need_weights: bool
    ) -> Tensor | None:
        """One mask that broadcasts to [B, H, Tq, Tk]: bool (true: kept) or floating (added)."""
        if padding is not None:
            padding = padding[:, None, None, :]
        if extra is not None and extra.dim() == 3:
            extra = extra.unflatten(0, (query.size(0), self.num_heads))
        masks = [mask for mask in (padding, extra) if mask is not None]
        if all(mask.dtype == torch.bool for mask in masks):
            masks = [~mask for mask in masks]
            return masks[0] & masks[1] if len(masks) == 2 else masks[0] if masks else None
        dtype = query.dtype
        left_out = max(MASKED, torch.finfo(dtype).min) if need_weights else -math.inf
        added = [
            torch.zeros((), dtype=dtype, device=mask.device).masked_fill(mask, left_out)
            if mask.dtype == torch.bool
            else mask.to(dtype)
            for mask in masks
        ]
        return added[0] + added[1] if len(added) == 2 else added[0]

    def _extend(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The learned key and value, then those of zeros, which no mask leaves out."""
        more = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat((k, self.bias_k.to(k.dtype).expand(k.size(0), -1, -1)), 1)
            v = torch.cat((v, self.bias_v.to(v.dtype).expand(v.size(0), -1, -1)), 1)
            more += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            more += 1
        if mask is not None and more:
            mask = F.pad(mask, (0, more), value=mask.dtype == torch.bool)
        return k, v, mask

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, {self.num_heads}"
        if self.batch_first:
            text += ", batch_first=True"
        # A torch.nn.MultiheadAttention that is accelerated has no normalizer.
        normalizer = getattr(self, "normalizer", "softmax")
        if normalizer != "softmax":
            text += f", normalizer={normalizer}"
        if normalizer == "entmax" and not isinstance(self.alpha, Tensor):
            text += f", alpha={self.alpha}"
        return text

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        extra: Tensor | None,
        is_causal: bool,
    ) -> None:
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        require_like("attention", weight, query=query, key=key, value=value)
        if query.dim() not in (2, 3):
            refuse("query with 2 or 3 dimensions", query)
        batched = query.dim() == 3
        at = 0 if self.batch_first and batched else int(batched)  # where the batch is
        queries = query.size(0 if not batched else 1 - at)
        keys = key.size(0 if not batched else 1 - at) if key.dim() == query.dim() else -1
        batch = query.size(at) if batched else 1
        for name, tensor, length, width in (
            ("query", query, queries, self.embed_dim),
            ("key", key, keys, self.kdim),
            ("value", value, keys, self.vdim),
        ):
            shape = [length, width]
            if batched:
                shape.insert(at, batch)
            if tensor.dim() != query.dim() or list(tensor.shape) != shape:
                refuse(f"{name} of shape {shape}".replace("-1", "Tk"), tensor)
        if padding is not None and list(padding.shape) != ([batch, keys] if batched else [keys]):
            refuse(f"key_padding_mask of shape {[batch, keys] if batched else [keys]}", padding)
        if extra is None:
            if is_causal:
                raise ValueError("seqmem::attention: expected attn_mask with is_causal, got None")
        elif list(extra.shape) not in (
            [queries, keys],
            [batch * self.num_heads, queries, keys],
        ):
            refuse(
                f"attn_mask of shape {[queries, keys]} or "
                f"{[batch * self.num_heads, queries, keys]}",
                extra,
            )
        for name, mask in (("key_padding_mask", padding), ("attn_mask", extra)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(
                    f"seqmem::attention: expected {name} of dtype bool or a floating one, "
                    f"got {mask.dtype}"
                )


def refuse(expected: str, got: Tensor) -> None:
    raise ValueError(f"seqmem::attention: expected {expected}, got shape {list(got.shape)}")


_PARAMETERS = (
    "in_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
)
