r"""Indexed attention on GPU: launchers of `indexed_attention`, its backward and `top_k_keys`.

Formulas, shapes and errors: `ops/indexed_attention.py`; the kernels: indexed_attention_kernels.py.
Heads wider than 128 features, 32 in float64, take plain PyTorch, which writes out the keys of each
query. `top_k_keys` is plain PyTorch, some queries at a time.

State of proof: by the interpreter and the emulated PTX; not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.common import Rule
from ..ops.indexed_attention import _plain
from ..reference import indexed_attention as reference
from . import indexed_attention_kernels as kernels
from .common import launcher, next_power_of_2, of_dropout, only, through_reference, wide
from .normalizers import of_normalizer
from .sparse_attention import begins_of, dense_rows, fits_heads, of_heads, of_lists, placed

_PLACES = 32  # most places of a list at once
_SCORES = 1 << 26  # most scores that the selection holds at once


def _common(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float | None, rule: Rule
) -> dict[str, Any]:
    """What every kernel takes."""
    count = index.shape[3]
    return {
        **of_heads(q, k, v, scale, rule.dropout),
        "count": count,
        **of_lists(index.shape[:2]),
        "BC": min(_PLACES, max(16, next_power_of_2(count))),
    }


@launcher
def indexed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    scale: float | None,
    rule: Rule,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """`seqmem::indexed_attention` on GPU."""
    alpha = rule.alpha
    if alpha != 1 or not fits_heads(q, v):
        found = _plain(q, k, v, index, scale, *rule)
        return found if need_weights else (found[0], q.new_empty(0))
    shape = q.shape[:3]
    output = q.new_empty(*shape, v.shape[3])
    weights = q.new_empty((*shape, index.shape[3]) if need_weights else 0)
    if shape.numel():
        common = _common(q, k, v, index, scale, rule)
        q, k, v = dense_rows(q, k, v)
        kernels.indexed_attention_forward[(shape.numel(),)](
            index_ptr=index.contiguous(),
            output_ptr=output,
            weights_ptr=weights if need_weights else None,
            **placed(q=q, k=k, v=v),
            **of_dropout(rule.dropout, rule.seed),
            **of_normalizer(alpha, q),
            **{**common, "num_warps": common["num_warps"] if alpha == 1 else 4},  # spills nothing
        )
    return output, weights


@launcher
def indexed_attention_backward(
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    scale: float | None,
    rule: Rule,
    weights: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`seqmem::indexed_attention_backward` on GPU: one kernel by queries, one by keys."""
    seeds = (grad_output, grad_weights)
    if rule.alpha != 1 or not fits_heads(q, v):
        return through_reference(
            lambda q, k, v: _plain(q, k, v, index, scale, *rule), (q, k, v), seeds, output_mask
        )
    grads = [q.new_zeros(t.shape) for t in (q, k, v)]
    if q.shape[:3].numel() and k.shape[2]:
        common = _common(q, k, v, index, scale, rule)
        saved = index.contiguous(), weights.contiguous()
        _backward(common, of_normalizer(rule.alpha, q), seeds, (q, k, v), saved, grads)
    return only(output_mask, grads)


def _backward(
    common: dict[str, Any],
    normalizer: dict[str, Any],
    seeds: Sequence[Tensor | None],
    operands: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> None:
    index, weights = saved
    q, k, v = dense_rows(*operands)
    of_output, of_weights = (None if t is None else t.contiguous() for t in seeds)
    slopes = weights.new_empty(weights.shape, dtype=wide(q.dtype))
    kernels.indexed_attention_backward_rows[(q.shape[:3].numel(),)](
        grad_output_ptr=of_output,
        grad_weights_ptr=of_weights,
        index_ptr=index,
        weights_ptr=weights,
        slopes_ptr=slopes,
        grad_q_ptr=grads[0],
        **placed(k=k, v=v),
        **normalizer,
        **common,
    )
    keys = common["keys"]
    key = index.flatten(0, 1).flatten(1)
    key, places = torch.where((key >= 0) & (key < keys), key, keys).sort(dim=-1, stable=True)
    kernels.indexed_attention_backward_keys[(k.shape[:3].numel(),)](
        grad_output_ptr=of_output,
        places_ptr=places,
        begins_ptr=begins_of(key, keys),
        weights_ptr=weights,
        slopes_ptr=slopes,
        grad_k_ptr=grads[1],
        grad_v_ptr=grads[2],
        **placed(q=q),
        **common,
    )


@launcher
def top_k_keys(
    q: Tensor, k: Tensor, count: int, is_causal: bool, key_end: Tensor | None, scale: float | None
) -> Tensor:
    """`seqmem::top_k_keys` on GPU."""
    queries, keys = q.size(2), k.size(2)
    end = torch.full((q.size(0), queries), keys, device=q.device)
    if key_end is not None:
        end = end.minimum(key_end if key_end.dim() == 2 else key_end[:, None])
    if is_causal:
        end = end.minimum(torch.arange(1, queries + 1, device=q.device))
    step = max(1, _SCORES // max(1, q.size(0) * q.size(1) * keys))
    return torch.cat(
        [
            reference.top_k_keys(
                q[:, :, i : i + step], k, count, key_end=end[:, i : i + step], scale=scale
            )
            for i in range(0, max(queries, 1), step)
        ],
        2,
    )
