"""Multi-head attention over a window and a few global tokens.

Parameters, their names and initialisation are those of ``torch.nn.MultiheadAttention``, whose
state_dicts load both ways; the attention is :func:`seqmem_fast.ops.window_attention`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .sparse_attention import SparseAttention

__all__ = ["WindowAttention", "WindowState", "WindowWeights"]


class WindowWeights(NamedTuple):
    """What a :class:`WindowAttention` attended to; each [B, H, ...], or [B, ...] where averaged."""

    band: Tensor  # [B, H, Tq, left + 1 + right]
    global_keys: Tensor | None  # [B, H, Tq, G]
    global_queries: Tensor | None  # [B, H, G, Tk], of global tokens as queries


class WindowState(NamedTuple):
    """The projected keys and values that a stream's next chunk may see, [B, H, n, E / H] each."""

    key: Tensor
    value: Tensor


class WindowAttention(SparseAttention):
    """Attention in which each query sees a window of keys, and the first tokens see and are seen.

    Args:
        embed_dim: E, the width of the query and of the output.
        num_heads: H, dividing E; each head has E / H features.
        left, right: how many keys a query sees before and after its own; -1 is no bound, right = 0
            is causal.
        bias: with in_proj_bias and out_proj.bias.
        dilation: steps from one key of a window to the next.
        global_tokens: G. Where right is not 0, the first G keys are seen by every query, and the
            first G queries see every key (Longformer). Where it is 0, keys only are global, and
            only for the queries after them (attention sinks).
        dropout: probability of zeroing a weight in training.
        normalizer, alpha: as in :func:`seqmem_fast.ops.window_attention`.
        kdim, vdim: widths of key and value, E by default.
        batch_first: tensors are [B, T, *] instead of [T, B, *].
        device, dtype: of the parameters.

    ``attention(query, key, value, key_padding_mask=None, need_weights=True,
    average_attn_weights=True) -> (output, weights)``:

    - query [Tq, B, E], key [Tk, B, kdim], value [Tk, B, vdim]; query i stands at key i.
    - key_padding_mask: bool [B, Tk], true where a key is left out: at the ends alone. Others are
      refused on the CPU; on a GPU and under ``torch.compile`` nothing looks for them.
    - need_weights: False returns None instead of weights.
    - average_attn_weights: weights are the heads' mean; False gives each head's.
    - returns output, laid out as query, and :class:`WindowWeights`. A query that sees no key gets
      zeros (and then out_proj).

    :meth:`stream` takes a sequence chunk by chunk.

    Errors are a ValueError for shapes and values, a TypeError for dtypes and devices. Equation and
    papers: :mod:`seqmem_fast.ops.window_attention`; parameters: :class:`Attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        left: int,
        right: int = 0,
        bias: bool = True,
        *,
        dilation: int = 1,
        global_tokens: int = 0,
        dropout: float = 0.0,
        normalizer: str = "softmax",
        alpha: Tensor | float = 1.5,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value, least in (
            ("left", left, -1),
            ("right", right, -1),
            ("dilation", dilation, 1),
            ("global_tokens", global_tokens, 0),
        ):
            if value < least:
                raise ValueError(
                    f"seqmem::window_attention: expected {name} of at least {least}, got {value}"
                )
        options = (bias, dropout, normalizer, alpha, kdim, vdim, batch_first, device, dtype)
        super().__init__(embed_dim, num_heads, *options)
        self.left, self.right = left, right
        self.dilation, self.global_tokens = dilation, global_tokens

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, WindowWeights | None]:
        if query.dim() != 3:
            raise ValueError(
                "seqmem::window_attention: expected query with 3 dimensions, "
                f"got shape {list(query.shape)}"
            )
        self._check(query, key, value, key_padding_mask, None, False)
        start, end = (None, None) if key_padding_mask is None else _ends(key_padding_mask)
        q, k, v = self._heads(query, key, value)
        output, weights = self._windows(q, k, v, 0, start, end, need_weights)
        if weights is not None and average_attn_weights:
            weights = WindowWeights(*(None if w is None else w.mean(1) for w in weights))  # type: ignore[arg-type]
        return self._joined(output), weights

    def init_state(self, batch: int) -> WindowState:
        """Of a stream that has not begun."""
        like = self.out_proj.weight
        empty = like.new_zeros(batch, self.num_heads, 0, self.head_dim)
        return WindowState(empty, empty)

    def stream(
        self, input: Tensor, state: WindowState, need_weights: bool = True
    ) -> tuple[Tensor, WindowWeights | None, WindowState]:
        """The next chunk of a sequence that attends to itself; right must be 0, left bounded.

        input [T, B, E] ([B, T, E] where batch_first), the state that the chunk before returned (or
        :meth:`init_state`) -> output, each head's weights, and the next state: its memory is the
        keys and values of the last left * dilation steps and of the global tokens. Chunks of any
        lengths give what the whole sequence gives at once.
        """
        if self.right != 0 or self.left < 0:
            raise ValueError(
                "seqmem::window_attention: expected right = 0 and left >= 0 of a stream, "
                f"got {self.right} and {self.left}"
            )
        q, k, v = self._heads_of_batch(input, input, input)
        wanted = [k.size(0), self.num_heads, "T", self.head_dim]
        for name, part in zip(WindowState._fields, state or (), strict=True):
            shape: list[Any] = list(part.shape)
            if len(shape) != 4 or [*shape[:2], "T", shape[3]] != wanted:
                sizes = ", ".join(map(str, wanted))
                raise ValueError(
                    f"seqmem::window_attention: expected state.{name} of shape [{sizes}], "
                    f"got {shape}"
                )
        before = state.key.size(2)
        k, v = torch.cat((state.key, k), 2), torch.cat((state.value, v), 2)
        output, weights = self._windows(q, k, v, before, None, None, need_weights)
        count = k.size(2)
        kept = min(count, self.left * self.dilation)
        sinks = min(self.global_tokens, count - kept)
        following = (torch.cat((t[:, :, :sinks], t[:, :, count - kept :]), 2) for t in (k, v))
        return self._joined(output), weights, WindowState(*following)

    def _windows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offset: int,
        start: Tensor | None,
        end: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, WindowWeights | None]:
        count, keys = min(self.global_tokens, k.size(2)), k.size(2)
        causal = self.right == 0
        bound = end
        if causal and count:  # no query sees a global key ahead of it
            own = torch.arange(offset + 1, offset + 1 + q.size(2), device=q.device)
            bound = own.expand(q.size(0), -1)
            bound = bound if end is None else torch.minimum(bound, end.unsqueeze(1))
        output, band, of_keys = ops.window_attention(
            q,
            k,
            v,
            self.left,
            self.right,
            dilation=self.dilation,
            offset=offset,
            key_start=start,
            key_end=bound,
            global_keys=count,
            **self._rule(need_weights),
        )
        of_queries = None
        rows = 0 if causal else min(count, q.size(2))
        if rows:  # all keys are global ones for them
            seen, _, of_queries = ops.window_attention(
                q[:, :, :rows],
                k,
                v,
                0,
                0,
                key_start=start,
                key_end=end,
                global_keys=keys,
                **self._rule(need_weights),
            )
            output = torch.cat((seen, output[:, :, rows:]), 2)
        if band is None:
            return output, None
        return output, WindowWeights(band, of_keys, of_queries)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, left={self.left}, right={self.right}"
        if self.dilation != 1:
            text += f", dilation={self.dilation}"
        if self.global_tokens:
            text += f", global_tokens={self.global_tokens}"
        return text


def _ends(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The one run of keys that a padding mask [B, Tk] leaves: its begin and end, [B] each."""
    if mask.dtype != torch.bool:
        raise TypeError(
            f"seqmem::window_attention: expected key_padding_mask of dtype bool, got {mask.dtype}"
        )
    kept = F.pad(~mask, (0, 1)).to(torch.int8)
    count = kept.sum(1, dtype=torch.int64)
    start = kept.argmax(1) * (count > 0)
    if not torch.compiler.is_compiling() and mask.is_cpu:
        last = mask.size(1) - kept[:, :-1].flip(1).argmax(1) if mask.size(1) else start
        if bool(((last - start != count) & (count > 0)).any()):
            raise ValueError(
                "seqmem::window_attention: expected key_padding_mask that is true at the ends of a "
                "row alone, got one with keys left out between others"
            )
    return start, start + count
