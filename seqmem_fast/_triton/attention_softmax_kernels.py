"""Attention kernels between torch's own products: the softmax of scores, and its gradient.

Each owns BM queries. The forward walks over the keys twice: maximum and sum, then weights; the
backward too: delta_i = sum_j W_ij P_ij with P = grad_output V^T + grad_weights, then
dS = W (P - delta). Where all keys are one block it is kept and read once. Floor: both read Tq Tk
numbers and write as many, the backward two for one.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .attention_kernels import VARYING
from .common import masked_scores, moved, place, softmax_step, softmax_weights, unmasked


@triton.jit
def _dense_block(ptr, i, j, keys, there, other):
    return tl.load(ptr + i[:, None] * keys + j[None, :], mask=there, other=other)


@triton.jit
def _read_scores(scores_ptr, mask_ptr, m_i, m_j, scale, i, j, queries, keys,
                 CAUSAL: tl.constexpr):  # fmt: skip
    there = (i < queries)[:, None] & (j < keys)[None, :]
    s = _dense_block(scores_ptr, i, j, keys, there, 0.0) * scale
    known = (j < keys)[None, :]
    if CAUSAL:
        known = known & (j[None, :] <= i[:, None])
    return masked_scores(s, mask_ptr, i, j, m_i, m_j, there, known)


@triton.jit(do_not_specialize=("scale", *VARYING))
def attention_softmax(
    scores_ptr,  # [Z0 * Z1, Tq, Tk] wide, dense: Q K^T
    mask_ptr,  # [Z0, Z1, Tq, Tk] uint8 (0 = masked) or floating (added), or None
    weights_ptr,  # [Z0 * Z1, Tq, Tk], dense; may be scores_ptr
    scale, queries, keys,
    heads,  # Z1
    blocks,  # of queries
    m_0, m_1, m_i, m_j,
    CAUSAL: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # of keys
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    z, i = place(blocks, BM)
    mask_ptr = moved(mask_ptr, z, heads, m_0, m_1)
    scores_ptr += z * queries * keys
    weights_ptr += z * queries * keys
    m = tl.full([BM], float("-inf"), scores_ptr.dtype.element_ty)
    total = tl.zeros([BM], scores_ptr.dtype.element_ty)
    if ONE_BLOCK:
        j = tl.arange(0, BN)
        s = _read_scores(scores_ptr, mask_ptr, m_i, m_j, scale, i, j, queries, keys, CAUSAL)
        m, total = softmax_step(s, m, total)
        there = (i < queries)[:, None] & (j < keys)[None, :]
        w = softmax_weights(s, m, total).to(weights_ptr.dtype.element_ty)
        tl.store(weights_ptr + i[:, None] * keys + j[None, :], w, mask=there)
    else:
        for start in range(0, keys, BN):
            j = start + tl.arange(0, BN)
            s = _read_scores(scores_ptr, mask_ptr, m_i, m_j, scale, i, j, queries, keys, CAUSAL)
            m, total = softmax_step(s, m, total)
        for start in range(0, keys, BN):
            j = start + tl.arange(0, BN)
            s = _read_scores(scores_ptr, mask_ptr, m_i, m_j, scale, i, j, queries, keys, CAUSAL)
            there = (i < queries)[:, None] & (j < keys)[None, :]
            w = softmax_weights(s, m, total).to(weights_ptr.dtype.element_ty)
            tl.store(weights_ptr + i[:, None] * keys + j[None, :], w, mask=there)


@triton.jit
def _read_gradients(p_ptr, weights_ptr, grad_weights_ptr, g_i, g_j, i, j, queries, keys):
    """Weights and P of a block."""
    there = (i < queries)[:, None] & (j < keys)[None, :]
    p = _dense_block(p_ptr, i, j, keys, there, 0.0)
    if grad_weights_ptr is not None:
        at = i[:, None] * g_i + j[None, :].to(tl.int64) * g_j
        p += tl.load(grad_weights_ptr + at, mask=there, other=0.0).to(p.dtype)
    return _dense_block(weights_ptr, i, j, keys, there, 0.0).to(p.dtype), p, there


@triton.jit
def _write_gradients(w, p, delta, there, mask_ptr, m_i, m_j, grad_scores_ptr, i, j, keys):
    d_scores = unmasked(w * (p - delta[:, None]), mask_ptr, i, j, m_i, m_j, there)
    at = grad_scores_ptr + i[:, None] * keys + j[None, :]
    tl.store(at, d_scores.to(grad_scores_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=VARYING)
def attention_softmax_backward(
    p_ptr,  # [Z0 * Z1, Tq, Tk] wide, dense: grad_output V^T
    weights_ptr,  # [Z0 * Z1, Tq, Tk], dense
    grad_weights_ptr,  # [Z0, Z1, Tq, Tk], or None
    mask_ptr,  # as in the forward kernel
    grad_scores_ptr,  # [Z0 * Z1, Tq, Tk], dense: dS; may be p_ptr
    queries, keys, heads, blocks,
    g_0, g_1, g_i, g_j,
    m_0, m_1, m_i, m_j,
    ONE_BLOCK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    z, i = place(blocks, BM)
    mask_ptr = moved(mask_ptr, z, heads, m_0, m_1)
    grad_weights_ptr = moved(grad_weights_ptr, z, heads, g_0, g_1)
    p_ptr += z * queries * keys
    weights_ptr += z * queries * keys
    grad_scores_ptr += z * queries * keys
    if ONE_BLOCK:
        j = tl.arange(0, BN)
        w, p, there = _read_gradients(
            p_ptr, weights_ptr, grad_weights_ptr, g_i, g_j, i, j, queries, keys
        )
        delta = tl.sum(w * p, axis=1)
        _write_gradients(w, p, delta, there, mask_ptr, m_i, m_j, grad_scores_ptr, i, j, keys)
    else:
        delta = tl.zeros([BM], p_ptr.dtype.element_ty)
        for start in range(0, keys, BN):
            j = start + tl.arange(0, BN)
            w, p, there = _read_gradients(
                p_ptr, weights_ptr, grad_weights_ptr, g_i, g_j, i, j, queries, keys
            )
            delta += tl.sum(w * p, axis=1)
        for start in range(0, keys, BN):
            j = start + tl.arange(0, BN)
            w, p, there = _read_gradients(
                p_ptr, weights_ptr, grad_weights_ptr, g_i, g_j, i, j, queries, keys
            )
            _write_gradients(w, p, delta, there, mask_ptr, m_i, m_j, grad_scores_ptr, i, j, keys)
