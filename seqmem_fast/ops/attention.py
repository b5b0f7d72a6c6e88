r"""Functional scaled dot-product attention that returns its weights.

.. math::
    S = \text{scale} \cdot Q K^\top, \qquad
    S_{ij} = -10^9 \text{ where masked}, \qquad
    W = \text{softmax}_j(S), \qquad O = W V

Paper: Vaswani et al., Attention Is All You Need, arXiv 1706.03762, 2017.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import attention as reference
from ..reference.common import attend
from .common import (
    alpha_of,
    autocast_dtype,
    differentiate_through,
    exports_onnx,
    fall_back,
    transform_active,
)
from .flops import Shape, count_products

__all__ = ["attention"]


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
    alpha: Tensor | float,
) -> tuple[Tensor, Tensor]:
    normalizer = "softmax" if not isinstance(alpha, Tensor) and alpha == 1 else "entmax"
    output, weights = reference.attention(
        query, key, value, mask, scale, is_causal, normalizer=normalizer, alpha=alpha
    )
    assert weights is not None
    return output, weights


_attention = fall_back("attention", _plain)
_check = fall_back("check_attention", _plain)
differentiate_through("attention", _plain, gradients=2)


def _products(query: Shape, key: Shape, value: Shape) -> int:
    rows = math.prod(torch.broadcast_shapes(query[:-2], key[:-2], value[:-2]))
    return rows * query[-2] * key[-2] * (query[-1] + value[-1])


count_products("attention", _products)


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_weights: Literal[True] = True,
    normalizer: str = "softmax",
    alpha: Tensor | float = 1.5,
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_weights: bool,
    normalizer: str = "softmax",
    alpha: Tensor | float = 1.5,
) -> tuple[Tensor, Tensor | None]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_weights: bool = True,
    normalizer: str = "softmax",
    alpha: Tensor | float = 1.5,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention in one pass, with its weights; the equation is in the module's
    docstring.

    Letters: Tq queries, Tk keys, D features of query and key, Dv of a value.

    query, key, value and a floating mask are float32, float64, bfloat16 or float16, all of one
    dtype (under ``torch.autocast`` they are cast), and are differentiable, any number of times,
    through both results: the first derivative has its own kernel, higher ones run in plain PyTorch.
    All tensors are on one device, their strides are free. Inside a ``torch.func`` transform (grad,
    vmap, jacrev, ...) the call runs in plain PyTorch, since these transforms cannot see into C++
    functions: right, but slow.

    Args:
        query: [..., Tq, D], D > 0.
        key: [..., Tk, D].
        value: [..., Tk, Dv]. The leading dimensions of query, key, value and mask broadcast.
        mask: broadcasts to [..., Tq, Tk]. Bool or integer: the score is -1e9 where it is zero, so
            a row of zeros has uniform weights; no gradient passes there. Floating: added to the
            scores, differentiable; a row of -inf has NaN weights, as softmax gives it.
        scale: factor of the scores, 1 / sqrt(D) by default.
        is_causal: query i sees keys 0..i alone (counted from the top left where Tq and Tk
            differ, as in ``F.scaled_dot_product_attention``). Later keys have weight zero whatever
            the mask says; a row whose mask leaves nothing is uniform over the keys that it sees.
        return_weights: False calls ``F.scaled_dot_product_attention``, which never holds the
            weights; a row whose mask is all zero is uniform there, too, and one of -inf gives
            zeros instead of NaN.
        normalizer: what makes weights of scores: "softmax", or "sparsemax", "entmax15" or "entmax",
            which give many keys a weight of exactly 0. On the CPU, where fewer than one key in
            eight has a weight in a block of queries, only those keys' values are added up: whether
            a value that nobody has a weight for spreads a NaN is left open. A row of -inf has
            weights of zero.
        alpha: of "entmax", 1 < alpha <= 2, or a tensor that broadcasts to [..., Tq, 1] and is
            differentiable ([H, 1, 1] for one a head). With a tensor, torch's products run with
            :func:`entmax` between them.

    Returns:
        output [..., Tq, Dv] and weights [..., Tq, Tk] (None without ``return_weights``). No keys
        (Tk = 0) give outputs of zero.

    Raises:
        ValueError: shapes do not fit; the message names the argument, what was expected and what
            came.
        TypeError: a dtype, device or layout does not fit.
    """
    if normalizer == "entmax" and isinstance(alpha, Tensor):
        output, weights = _by_products(query, key, value, mask, scale, is_causal, alpha)
        return output, weights if return_weights else None
    power = 1.0 if normalizer == "softmax" else alpha_of("attention", normalizer, alpha)
    if power == 1 and not (return_weights or transform_active() or exports_onnx()):
        _check(query, key, value, mask, scale, is_causal, power)
        return _without_weights(query, key, value, mask, scale, is_causal), None
    output, weights = _attention(query, key, value, mask, scale, is_causal, power)
    return output, weights if return_weights else None


def _by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
    alpha: Tensor,
) -> tuple[Tensor, Tensor]:
    """With a learned alpha: scores in float32 at least, and entmax as one op between products."""
    if transform_active() or exports_onnx():  # nor does the check run inside one
        return _plain(query, key, value, mask, scale, is_causal, alpha)
    _check(query, key, value, mask, scale, is_causal, 1.5)
    dtype = autocast_dtype(query)
    with nullcontext() if dtype is None else torch.autocast(query.device.type, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        products = query.to(wide) @ key.to(wide).mT
        scores = reference.scores_of(products, mask, query.size(-1), scale, is_causal)
        weights = torch.ops.seqmem.entmax(scores, alpha.to(wide), 1.5, -1)
        return attend(weights.to(dtype or query.dtype), value.to(dtype or query.dtype))


def _without_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
) -> Tensor:
    """What torch's own op computes, a row without any allowed key made uniform."""
    if mask is not None:
        if is_causal:  # torch takes one of the two
            rows = torch.arange(query.size(-2), device=query.device)
            behind = rows[:, None] >= torch.arange(key.size(-2), device=query.device)
        if mask.is_floating_point():
            mask = mask.masked_fill(~behind, float("-inf")) if is_causal else mask
        else:
            mask = mask != 0
            mask = mask & behind if is_causal else mask
            # Such a row asks with zeros instead, and sees all its keys: uniform weights, and no
            # gradient but the value's.
            empty = ~mask.any(-1, keepdim=True)
            mask = mask | (empty & behind if is_causal else empty)
            query = torch.where(empty, 0, query)
    batch = torch.broadcast_shapes(
        query.shape[:-2], key.shape[:-2], value.shape[:-2], () if mask is None else mask.shape[:-2]
    )
    # Only four dimensions reach torch's fused kernels.
    output = F.scaled_dot_product_attention(
        _four(query, batch),
        _four(key, batch),
        _four(value, batch),
        attn_mask=None if mask is None else _four(torch.atleast_2d(mask), batch),
        is_causal=is_causal and mask is None,
        scale=scale,
    )
    return output.reshape(*batch, query.size(-2), value.size(-1))


def _four(t: Tensor, batch: torch.Size) -> Tensor:
    """[..., R, C] in four dimensions, the leading ones those of ``batch``; a view if it can be."""
    t = t.expand(*batch, -1, -1)
    if len(batch) > 2:
        return t.flatten(0, -4)
    return t if len(batch) == 2 else t.view(*batch, *(1,) * (2 - len(batch)), *t.shape[-2:])
