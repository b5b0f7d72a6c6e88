r"""Attention of each query to a list of keys: given ones, or those with the highest scores.

.. math::
    S_{ic} = \text{scale} \cdot q_i \cdot k_{j(i, c)}, \qquad W = \text{softmax}_c(S), \qquad
    O_i = \sum_c W_{ic} v_{j(i, c)}

over the places c of query i's list that name a key j(i, c); sparsemax or entmax may stand in
softmax's place. Memory, and but for the search of the highest scores time, grow with Tq times C,
never with Tq times Tk.

Letters: B rows, Hq heads of queries, Hk of keys and values, a divisor of Hq (query head h reads key
head h // (Hq / Hk)), Tq queries, Tk keys, D features of a query and a key, Dv of a value, C places
of a list.

Papers: Child, Gray, Radford & Sutskever, Generating long sequences with sparse transformers, arXiv
1904.10509, 2019; Gupta, Dar, Goodman, Ciprut & Berant, Memory-efficient transformers via top-k
attention, arXiv 2106.06899, 2021.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..reference import indexed_attention as reference
from .common import (
    Rule,
    attend_to_some,
    by_fields,
    differentiate_through,
    fall_back,
    plain_rule,
    require_tensors,
)
from .flops import Shape, count_products

__all__ = ["indexed_attention", "top_k_attention"]


@by_fields
def _plain(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    return reference.indexed_attention(q, k, v, index, scale=scale, **plain_rule(rule))


def _with_flag(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _plain(*arguments[:-1])


def _plain_keys(
    q: Tensor, k: Tensor, count: int, is_causal: bool, key_end: Tensor | None, scale: float | None
) -> Tensor:
    return reference.top_k_keys(q, k, count, is_causal=is_causal, key_end=key_end, scale=scale)


_indexed_attention: Any = fall_back("indexed_attention", _with_flag)
_top_k_keys: Any = fall_back("top_k_keys", _plain_keys)
differentiate_through("indexed_attention", _plain, gradients=2)


def _products(q: Shape, k: Shape, v: Shape, index: Shape) -> int:
    return math.prod(q[:3]) * index[3] * (q[3] + v[3])


def _products_of_keys(q: Shape, k: Shape) -> int:
    return math.prod(q) * k[2]


count_products("indexed_attention", _products)
count_products("top_k_keys", _products_of_keys)


def indexed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    normalizer: str = "softmax",
    alpha: Tensor | float = 1.5,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    return_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention to listed keys as a single op; the equation is in the module's docstring.

    q, k and v are float32, float64, bfloat16 or float16, of one dtype (under ``torch.autocast``
    they are cast), on one device, of any strides, and differentiable, any number of times, through
    both results: the first derivative has its own kernel, higher ones run in plain PyTorch. Inside
    a ``torch.func`` transform (grad, vmap, jacrev, ...) the call runs in plain PyTorch: right, but
    slow. Results on the CPU are the same bits for any number of threads: the gradients of keys and
    values are summed in the order of heads, queries and places.

    Args:
        q: [B, Hq, Tq, D], D > 0.
        k: [B, Hk, Tk, D], Hk > 0.
        v: [B, Hk, Tk, Dv].
        index: int64 [1 or B, 1 or Hq, Tq, C], which keys a query sees: 0..Tk - 1, or -1 for none,
            in any order. A key that is named twice counts twice.
        normalizer: of a query's scores: "softmax", "sparsemax", "entmax15" or "entmax"
            (:func:`entmax`).
        alpha: of "entmax", 1 < alpha <= 2, or a tensor that broadcasts to [B, Hq, Tq, 1] and is
            differentiable ([H, 1, 1] for one a head). With a tensor, plain PyTorch runs around
            :func:`entmax`, and each query's keys are
            written out: memory Tq times C times D.
        scale: factor of the scores, 1 / sqrt(D) by default.
        dropout: in 0..1, how probably a weight is zero when it meets the values; the others are
            divided by 1 - dropout, as torch.nn.MultiheadAttention has it. Which ones depends on
            seed and on the weight's place alone.
        seed: int64 [1] or a number; drawn from torch's generator by default.
        return_weights: False returns None in place of weights, which are not stored unless a
            gradient is wanted.

    Returns:
        output [B, Hq, Tq, Dv]; weights [B, Hq, Tq, C], exactly 0 where the list names none. A query
        whose list names no key gets zeros, and no gradient. NaN or infinity in a query, key or
        value reaches the queries that name it, what they name, and nothing else.

    Raises:
        ValueError: a shape or value does not fit; the message names the argument, what was
            expected and what came. On a GPU what index holds is not checked: a key that does not
            exist is none.
        TypeError: a dtype, device or layout does not fit.
    """
    require_tensors("indexed_attention", index=index)
    pattern = index, scale
    output, weights = attend_to_some(
        _indexed_attention,
        _plain,
        (q, k, v),
        pattern,
        normalizer,
        alpha,
        dropout,
        seed,
        return_weights,
    )
    return output, weights if return_weights else None


def top_k_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: int,
    *,
    is_causal: bool = False,
    key_end: Tensor | None = None,
    normalizer: str = "softmax",
    alpha: Tensor | float = 1.5,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    return_weights: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Attention of each query to the keys of its highest scores.

    The keys are found without holding the scores of all pairs; attention to them is
    :func:`indexed_attention`, which says what holds of dtypes, derivatives and q, k and v. The
    gradient flows through the chosen keys alone.

    Args:
        q, k, v, normalizer, alpha, scale, dropout, seed, return_weights: as in
            :func:`indexed_attention`.
        count: C, how many keys; at least 1.
        is_causal: query i sees no key after key i.
        key_end: int64 or int32, [B] or [B, Tq]: the query sees keys 0..key_end - 1 alone; Tk by
            default, to which any other value is clamped.

    Returns:
        output [B, Hq, Tq, Dv]; weights [B, Hq, Tq, C]; index int64 [B, Hq, Tq, C]: the chosen keys,
        the highest score first, of equal scores the lower index first; -1, and weight 0, beyond the
        keys that a query sees. A NaN score is above all others.

    Raises:
        ValueError, TypeError: as :func:`indexed_attention`.
    """
    require_tensors("top_k_attention", key_end=key_end)
    index = _top_k_keys(q, k, count, is_causal, key_end, scale)
    output, weights = indexed_attention(
        q,
        k,
        v,
        index,
        normalizer=normalizer,
        alpha=alpha,
        scale=scale,
        dropout=dropout,
        seed=seed,
        return_weights=return_weights,
    )
    return output, weights, index
