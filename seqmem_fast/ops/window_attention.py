r"""Attention over a window of keys around each query, and a few global keys, with its weights.

.. math::
    S_{ic} = \text{scale} \cdot q_i \cdot k_{j(i, c)}, \qquad
    j(i, c) = \text{offset} + i + (c - \text{left}) \cdot \text{dilation}, \qquad
    W = \text{softmax}_c(S), \qquad O_i = \sum_c W_{ic} v_{j(i, c)}

over the columns c whose key query i may see, and the global keys besides: one softmax over both, or
sparsemax or entmax in its place.
Time and memory grow with Tq times the window, never with Tq times Tk.

Letters: B rows, Hq heads of queries, Hk of keys and values, a divisor of Hq (query head h reads key
head h // (Hq / Hk)), Tq queries, Tk keys, D features of a query and a key, Dv of a value,
W = left + 1 + right columns of the band, G global keys.

Papers: Child, Gray, Radford & Sutskever, Generating long sequences with sparse transformers, arXiv
1904.10509, 2019; Beltagy, Peters & Cohan, Longformer, arXiv 2004.05150, 2020.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from ..reference import window_attention as reference
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

__all__ = ["window_attention"]


class Operands(NamedTuple):
    """Heads, and the columns on either side."""

    q: Tensor
    k: Tensor
    v: Tensor
    left: int
    right: int


class Options(NamedTuple):
    """Which key a column is, and which of them are seen."""

    dilation: int
    offset: int
    key_start: Tensor | None
    key_end: Tensor | None
    global_keys: int
    scale: float | None


@by_fields
def _plain(operands: Operands, options: Options, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    more: Any = {**options._asdict(), **plain_rule(rule)}
    return reference.window_attention(*operands, **more)


def _with_flag(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _plain(*arguments[:-1])


_window_attention: Any = fall_back("window_attention", _with_flag)
differentiate_through("window_attention", _plain, gradients=3)


def _products(
    q: Shape,
    k: Shape,
    v: Shape,
    left: int,
    right: int,
    dilation: int,
    offset: int,
    global_keys: int,
) -> int:
    left, right = reference.bounds(left, right, dilation, offset, q[2], k[2])
    return math.prod(q[:3]) * (left + 1 + right + global_keys) * (q[3] + v[3])


count_products("window_attention", _products)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    *,
    dilation: int = 1,
    offset: int = 0,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    global_keys: int = 0,
    normalizer: str = "softmax",
    alpha: Tensor | float = 1.5,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    return_weights: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention over a band as a single op; the equation is in the module's docstring.

    q, k and v are float32, float64, bfloat16 or float16, of one dtype (under ``torch.autocast``
    they are cast), on one device, of any strides, and differentiable, any number of times, through
    all results: the first derivative has its own kernel, higher ones run in plain PyTorch. Inside a
    ``torch.func`` transform (grad, vmap, jacrev, ...) the call runs in plain PyTorch: right, but
    slow. Results on the CPU are the same bits for any number of threads.

    Args:
        q: [B, Hq, Tq, D], D > 0.
        k: [B, Hk, Tk, D], Hk > 0.
        v: [B, Hk, Tk, Dv].
        left, right: how many keys a query sees before and after its own, each at least 0. Causal is
            right = 0; a causal window of w keys, the query's own among them, is left = w - 1. -1 is
            no bound: the band is then as wide as some query needs, left = (offset + Tq - 1) //
            dilation and right = (Tk - 1 - offset) // dilation, both at least 0.
        dilation: steps from one key of a window to the next, at least 1.
        offset: query i's own key is key offset + i; at least 0. It is the number of keys before the
            first query: of a chunk of a stream, Tk - Tq.
        key_start, key_end: int64 or int32, [B] or [B, Tq]: the query sees keys
            key_start..key_end - 1 alone, of the band and of the global ones; 0 and Tk by default,
            to which any other value is clamped. They express lengths, padding on either side,
            packed documents and a prefix, without a mask; nothing depends on keys that no query
            sees, whatever they hold.
        global_keys: G in 0..Tk: the first G keys are seen by every query, later ones too; a causal
            query is kept from those ahead of it by key_end. Their weights are columns of their own,
            and zero in the band.
        normalizer: of the scores that a query sees: "softmax", "sparsemax", "entmax15" or "entmax"
            (:func:`entmax`).
        alpha: of "entmax", 1 < alpha <= 2, or a tensor that broadcasts to [B, Hq, Tq, 1] and is
            differentiable ([H, 1, 1] for one a head). With a tensor, plain PyTorch runs around
            :func:`entmax`, and each query's keys are
            written out: memory Tq times W times D.
        scale: factor of the scores, 1 / sqrt(D) by default.
        dropout: in 0..1, how probably a weight is zero when it meets the values; the others are
            divided by 1 - dropout, as torch.nn.MultiheadAttention has it. Which ones depends on
            seed and on the weight's place alone.
        seed: int64 [1] or a number; drawn from torch's generator by default.
        return_weights: False returns None in place of weights, which are not stored unless a
            gradient is wanted.

    Returns:
        output [B, Hq, Tq, Dv]; weights [B, Hq, Tq, W]: column c of query i is key
        offset + i + (c - left) * dilation, and exactly 0 where there is no such key or the query
        does not see it or it was dropped; the global keys' weights [B, Hq, Tq, G], None where G is
        0. A query that sees no key gets zeros, and no gradient (:func:`attention` has it see all
        keys alike). On the CPU, NaN or infinity in a query, key or value reaches what sees it and
        nothing else.

    Raises:
        ValueError: a shape or value does not fit; the message names the argument, what was
            expected and what came.
        TypeError: a dtype, device or layout does not fit.
    """
    require_tensors("window_attention", key_start=key_start, key_end=key_end)
    output, weights, global_weights = attend_to_some(
        _window_attention,
        _plain,
        (q, k, v),
        (left, right, dilation, offset, key_start, key_end, global_keys, scale),
        normalizer,
        alpha,
        dropout,
        seed,
        return_weights,
    )
    if not return_weights:
        return output, None, None
    return output, weights, global_weights if global_keys else None
