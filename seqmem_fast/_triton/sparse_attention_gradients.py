"""The gradients in kernels of attention to some of the keys.

Rows are queries i [BM], columns keys j [BN]; weights are signed where dropout drops them.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .normalizers import SOFTMAX, weight_slopes
from .sparse_attention_kernels import (
    any_row,
    is_nothing,
    load_rows,
    meet_values,
    product,
    with_sign,
)


@triton.jit
def weights_gradient(g, v_ptr, v_at, v_t, weights_ptr, grad_ptr, at, there, j, value_width,
              ACC: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr, BM: tl.constexpr,
              BN: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """Weights W, zero where a query does not see a key, and their gradient P, [BM, BN] each."""
    sign = tl.load(weights_ptr + at, mask=there, other=0.0).to(ACC)
    w = with_sign(sign, sign, FACTOR)
    p = tl.zeros([BM, BN], ACC)
    if g is not None:
        v = load_rows(v_ptr, v_at, j, any_row(~is_nothing(w)), v_t, value_width, BV)
        p += meet_values(sign, product(g, tl.trans(v), ACC, PRECISION), FACTOR)
    if grad_ptr is not None:
        given = tl.load(grad_ptr + at, mask=there, other=0.0).to(ACC)
        p += with_sign(sign, given, FACTOR)
    return w, tl.where(is_nothing(w), 0.0, p)


@triton.jit
def add_to_sums(dot, total, w, p, alpha, KIND: tl.constexpr):
    """What `delta_of` takes once a block of keys is added."""
    s = weight_slopes(w, alpha, KIND)
    dot += tl.sum(s * p, axis=1)
    if KIND != SOFTMAX:
        total += tl.sum(s, axis=1)
    return dot, total


@triton.jit
def scores_gradient(w, p, delta, alpha, KIND: tl.constexpr):
    return tl.where(is_nothing(w), 0.0, weight_slopes(w, alpha, KIND) * (p - delta[:, None]))


@triton.jit
def add_to_queries(grad_q, w, p, delta, k_ptr, k_at, k_t, j, width, alpha, ACC: tl.constexpr,
                   PRECISION: tl.constexpr, KIND: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """dQ / scale once keys j are added."""
    ds = scores_gradient(w, p, delta, alpha, KIND)
    k = load_rows(k_ptr, k_at, j, any_row(~is_nothing(w)), k_t, width, BD)
    return grad_q + product(ds.to(k.dtype), k, ACC, PRECISION)


@triton.jit
def add_to_keys(grad_k, grad_v, v, z, i, there, weights_ptr, grad_weights_ptr, at, inside,
                grad_output_ptr, delta_ptr, q_ptr, q_at, q_t, queries, width, value_width, alpha,
                ACC: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr,
                FACTOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                BV: tl.constexpr):  # fmt: skip
    """dK / scale and dV once queries i of row and head z are added; `there`: they exist, `inside`:
    so do their weights."""
    sign = tl.load(weights_ptr + at, mask=inside, other=0.0).to(ACC)
    w = with_sign(sign, sign, FACTOR)
    busy = there & (tl.max((~is_nothing(w)).to(tl.int32), axis=1) > 0)
    p = tl.zeros([BM, BN], ACC)
    if grad_output_ptr is not None:
        g = load_rows(grad_output_ptr, z * queries * value_width, i, busy, value_width,
                      value_width, BV)  # fmt: skip
        met = meet_values(sign, w, FACTOR).to(g.dtype)
        grad_v += product(tl.trans(met), g, ACC, PRECISION)
        p += meet_values(sign, product(g, tl.trans(v), ACC, PRECISION), FACTOR)
    if grad_weights_ptr is not None:
        given = tl.load(grad_weights_ptr + at, mask=inside, other=0.0)
        p += with_sign(sign, given.to(ACC), FACTOR)
    delta = tl.load(delta_ptr + z * queries + i, mask=there, other=0.0)
    ds = scores_gradient(w, p, delta, alpha, KIND)
    q = load_rows(q_ptr, q_at, i, busy, q_t, width, BD)
    grad_k += product(tl.trans(ds.to(q.dtype)), q, ACC, PRECISION)
    return grad_k, grad_v
