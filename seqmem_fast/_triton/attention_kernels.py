"""Attention kernels: scores, softmax, weights and output in one, and their gradients.

The forward kernel owns BM queries and walks over the keys twice, as the weights it writes need the
softmax's sum first: maximum and sum, then weights and their product with the values. Where all keys
are one block the scores are kept and it walks once. Floor: it reads Q and, per BM queries, K and V,
and writes Tq Tk weights, which memory bounds from about 128 features down; the second walk costs
a third product (6 instead of 4 Tq Tk D flops) and saves a round trip of Tq Tk scores.

Backward, with P = grad_output V^T + grad_weights and delta_i = sum_j W_ij P_ij:
dS = W (P - delta), dQ = scale dS K, dK = scale dS^T Q, dV = W^T grad_output. One kernel by rows
gives delta, dQ and where wanted dS, one by columns dK and dV: no atomics, the same bits every time.

Leading dimensions are two, with a stride each (0 where broadcast).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import masked_scores, moved, place, softmax_step, softmax_weights, unmasked

# Sizes that change from call to call: specialising on them would only compile the same code twice.
VARYING = ("queries", "blocks", "heads")


@triton.jit
def _rows_of(ptr, rows, count, stride, width, BLOCK: tl.constexpr):
    """[len(rows), BLOCK] of a [count, width] matrix; zero outside."""
    n = tl.arange(0, BLOCK)
    mask = (rows < count)[:, None] & (n < width)[None, :]
    of_row = rows[:, None].to(tl.int64) * stride
    return tl.load(ptr + of_row + n[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, at, value, rows, count, width, BLOCK: tl.constexpr):
    """The first `width` columns of [len(rows), BLOCK], into a dense matrix of `count` rows."""
    n = tl.arange(0, BLOCK)
    mask = (rows < count)[:, None] & (n < width)[None, :]
    where = ptr + at + rows[:, None] * width + n[None, :]
    tl.store(where, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def known_scores(s, mask_ptr, m_i, m_j, i, j, queries, keys, CAUSAL: tl.constexpr):
    """Scores [BM, BN] of queries i and keys j, masked; -inf where j is no key of the row."""
    there = (i < queries)[:, None] & (j < keys)[None, :]
    known = (j < keys)[None, :]
    if CAUSAL:
        known = known & (j[None, :] <= i[:, None])
    return masked_scores(s, mask_ptr, i, j, m_i, m_j, there, known)


@triton.jit
def store_rest(weights_ptr, total, i, begin, queries, keys, BM: tl.constexpr, BN: tl.constexpr):
    """The weights of keys from `begin` on, which all come after their queries.

    Zeros; NaN where a score was NaN, as the softmax of the whole row has it.
    """
    rest = (total * 0.0)[:, None] + tl.zeros([BM, BN], tl.float32)
    for start in range(begin, keys, BN):
        j = start + tl.arange(0, BN)
        there = (i < queries)[:, None] & (j < keys)[None, :]
        at = weights_ptr + i[:, None] * keys + j[None, :]
        tl.store(at, rest.to(weights_ptr.dtype.element_ty), mask=there)


@triton.jit
def _scores(q, k_ptr, k_t, mask_ptr, m_i, m_j, scale, i, j, queries, keys, width,
            CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
            BD: tl.constexpr):  # fmt: skip
    """Masked scores [BM, BN] of queries i and keys j."""
    k = _rows_of(k_ptr, j, keys, k_t, width, BD)
    s = _product(q, tl.trans(k), PRECISION) * scale
    return known_scores(s, mask_ptr, m_i, m_j, i, j, queries, keys, CAUSAL)


@triton.jit
def _weigh(s, m, total, out, weights_ptr, v_ptr, v_t, i, j, queries, keys, value_width,
           PRECISION: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """Stores the weights of one block of keys and adds their values to the output."""
    w = softmax_weights(s, m, total).to(v_ptr.dtype.element_ty)
    there = (i < queries)[:, None] & (j < keys)[None, :]
    tl.store(weights_ptr + i[:, None] * keys + j[None, :], w, mask=there)
    v = _rows_of(v_ptr, j, keys, v_t, value_width, BV)
    return out + _product(w, v, PRECISION)


@triton.jit(do_not_specialize=("scale", *VARYING))
def attention_forward(
    q_ptr,  # [Z0, Z1, Tq, D]
    k_ptr,  # [Z0, Z1, Tk, D]
    v_ptr,  # [Z0, Z1, Tk, DV]
    mask_ptr,  # [Z0, Z1, Tq, Tk] uint8 (0 = masked) or floating (added), or None
    output_ptr,  # [Z0 * Z1, Tq, DV], dense
    weights_ptr,  # [Z0 * Z1, Tq, Tk], dense
    scale, queries, keys, width, value_width,
    heads,  # Z1
    blocks,  # of queries
    q_0, q_1, q_t, k_0, k_1, k_t, v_0, v_1, v_t, m_0, m_1, m_i, m_j,
    CAUSAL: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # of keys
    PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    z, i = place(blocks, BM)
    k_ptr = moved(k_ptr, z, heads, k_0, k_1)
    v_ptr = moved(v_ptr, z, heads, v_0, v_1)
    mask_ptr = moved(mask_ptr, z, heads, m_0, m_1)
    weights_ptr += z * queries * keys

    q = _rows_of(moved(q_ptr, z, heads, q_0, q_1), i, queries, q_t, width, BD)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BV], tl.float32)
    last = keys  # keys from here on weigh nothing for any of these queries
    if CAUSAL:
        last = tl.minimum(keys, (tl.program_id(0) % blocks + 1) * BM)
    if ONE_BLOCK:
        j = tl.arange(0, BN)
        s = _scores(q, k_ptr, k_t, mask_ptr, m_i, m_j, scale, i, j, queries, keys, width,
                    CAUSAL, PRECISION, BD)  # fmt: skip
        m, total = softmax_step(s, m, total)
        out = _weigh(s, m, total, out, weights_ptr, v_ptr, v_t, i, j, queries, keys,
                     value_width, PRECISION, BV)  # fmt: skip
    else:
        for start in range(0, last, BN):
            j = start + tl.arange(0, BN)
            s = _scores(q, k_ptr, k_t, mask_ptr, m_i, m_j, scale, i, j, queries, keys, width,
                        CAUSAL, PRECISION, BD)  # fmt: skip
            m, total = softmax_step(s, m, total)
        for start in range(0, last, BN):
            j = start + tl.arange(0, BN)
            s = _scores(q, k_ptr, k_t, mask_ptr, m_i, m_j, scale, i, j, queries, keys, width,
                        CAUSAL, PRECISION, BD)  # fmt: skip
            out = _weigh(s, m, total, out, weights_ptr, v_ptr, v_t, i, j, queries, keys,
                         value_width, PRECISION, BV)  # fmt: skip
        if CAUSAL:
            begin = tl.cdiv(last, BN) * BN
            store_rest(weights_ptr, total, i, begin, queries, keys, BM, BN)
    store_rows(output_ptr, z * queries * value_width, out, i, queries, value_width, BV)


@triton.jit
def _grad_weights(g, v_ptr, v_t, grad_weights_ptr, g_i, g_j, i, j, queries, keys,
                  value_width, PRECISION: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """P [BM, BN]: the weights' gradient, through the output and of their own."""
    p = tl.zeros([BM, BN], tl.float32)
    if g is not None:
        v = _rows_of(v_ptr, j, keys, v_t, value_width, BV)
        p += _product(g, tl.trans(v), PRECISION)
    if grad_weights_ptr is not None:
        there = (i < queries)[:, None] & (j < keys)[None, :]
        at = grad_weights_ptr + i[:, None].to(tl.int64) * g_i + j[None, :].to(tl.int64) * g_j
        p += tl.load(at, mask=there, other=0.0).to(tl.float32)
    return p


@triton.jit
def _weights_gradient(j, g, grad_ptr, given, PRECISION: tl.constexpr, BM: tl.constexpr,
                      BN: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """The weights of keys j and P; where in the weights they are, and whether."""
    v_ptr, v_t, weights_ptr, g_i, g_j, z, i, queries, keys, value_width = given
    there = (i < queries)[:, None] & (j < keys)[None, :]
    at = z * queries * keys + i[:, None] * keys + j[None, :]
    p = _grad_weights(g, v_ptr, v_t, grad_ptr, g_i, g_j, i, j, queries, keys, value_width,
                      PRECISION, BM, BN, BV)  # fmt: skip
    return tl.load(weights_ptr + at, mask=there, other=0.0).to(tl.float32), p, at, there


@triton.jit(do_not_specialize=("scale", *VARYING))
def attention_backward_rows(
    grad_output_ptr,  # [Z0 * Z1, Tq, DV], dense, or None
    grad_weights_ptr,  # [Z0, Z1, Tq, Tk] or None
    k_ptr,  # [Z0, Z1, Tk, D]
    v_ptr,  # [Z0, Z1, Tk, DV]
    mask_ptr,  # [Z0, Z1, Tq, Tk] uint8 or floating, or None
    weights_ptr,  # [Z0 * Z1, Tq, Tk], dense
    delta_ptr,  # [Z0 * Z1, Tq] float32
    grad_q_ptr,  # [Z0 * Z1, Tq, D], dense, or None
    grad_scores_ptr,  # [Z0 * Z1, Tq, Tk], dense, or None
    scale, queries, keys, width, value_width, heads, blocks,
    g_0, g_1, g_i, g_j,  # of grad_weights
    k_0, k_1, k_t, v_0, v_1, v_t, m_0, m_1, m_i, m_j,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    z, i = place(blocks, BM)
    k_ptr = moved(k_ptr, z, heads, k_0, k_1)
    v_ptr = moved(v_ptr, z, heads, v_0, v_1)
    mask_ptr = moved(mask_ptr, z, heads, m_0, m_1)
    grad_weights_ptr = moved(grad_weights_ptr, z, heads, g_0, g_1)
    g = None  # passed beside `given`: a compiled kernel takes no None in a tuple
    if grad_output_ptr is not None:
        g = _rows_of(grad_output_ptr + z * queries * value_width, i, queries, value_width,
                     value_width, BV)  # fmt: skip

    given = (
        v_ptr, v_t, weights_ptr, g_i, g_j, z, i, queries, keys, value_width,
    )  # fmt: skip
    delta = tl.zeros([BM], tl.float32)
    for start in range(0, keys, BN):
        j = start + tl.arange(0, BN)
        w, p, _, _ = _weights_gradient(j, g, grad_weights_ptr, given, PRECISION, BM, BN, BV)
        delta += tl.sum(w * p, axis=1)
    tl.store(delta_ptr + z * queries + i, delta, mask=i < queries)

    grad_q = tl.zeros([BM, BD], tl.float32)
    for start in range(0, keys, BN):
        j = start + tl.arange(0, BN)
        w, p, at, there = _weights_gradient(j, g, grad_weights_ptr, given, PRECISION, BM, BN, BV)
        ds = unmasked(w * (p - delta[:, None]), mask_ptr, i, j, m_i, m_j, there)
        if grad_scores_ptr is not None:
            tl.store(grad_scores_ptr + at, ds.to(grad_scores_ptr.dtype.element_ty), mask=there)
        if grad_q_ptr is not None:
            k = _rows_of(k_ptr, j, keys, k_t, width, BD)
            grad_q += _product(ds.to(k.dtype), k, PRECISION)
    if grad_q_ptr is not None:
        store_rows(grad_q_ptr, z * queries * width, grad_q * scale, i, queries, width, BD)


@triton.jit(do_not_specialize=("scale", *VARYING))
def attention_backward_columns(
    grad_output_ptr,  # [Z0 * Z1, Tq, DV], dense, or None
    grad_weights_ptr,  # [Z0, Z1, Tq, Tk] or None
    q_ptr,  # [Z0, Z1, Tq, D]
    v_ptr,  # [Z0, Z1, Tk, DV]
    mask_ptr,  # [Z0, Z1, Tq, Tk] uint8 or floating, or None
    weights_ptr,  # [Z0 * Z1, Tq, Tk], dense
    delta_ptr,  # [Z0 * Z1, Tq]
    grad_k_ptr,  # [Z0 * Z1, Tk, D], dense, or None
    grad_v_ptr,  # [Z0 * Z1, Tk, DV], dense, or None
    scale, queries, keys, width, value_width, heads,
    blocks,  # of keys
    g_0, g_1, g_i, g_j,
    q_0, q_1, q_t, v_0, v_1, v_t, m_0, m_1, m_i, m_j,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    z, j = place(blocks, BN)
    first = tl.program_id(0) % blocks * BN
    q_ptr = moved(q_ptr, z, heads, q_0, q_1)
    v_ptr = moved(v_ptr, z, heads, v_0, v_1)
    mask_ptr = moved(mask_ptr, z, heads, m_0, m_1)
    grad_weights_ptr = moved(grad_weights_ptr, z, heads, g_0, g_1)

    grad_k = tl.zeros([BN, BD], tl.float32)
    grad_v = tl.zeros([BN, BV], tl.float32)
    begin = 0
    if CAUSAL:  # no earlier query weighs any of these keys
        begin = first // BM * BM
    for start in range(begin, queries, BM):
        i = start + tl.arange(0, BM)
        there = (i < queries)[:, None] & (j < keys)[None, :]
        at = z * queries * keys + i[:, None].to(tl.int64) * keys + j[None, :]
        w = tl.load(weights_ptr + at, mask=there, other=0.0)
        g = None
        if grad_output_ptr is not None:
            g = _rows_of(grad_output_ptr + z * queries * value_width, i, queries, value_width,
                         value_width, BV)  # fmt: skip
            if grad_v_ptr is not None:
                grad_v += _product(tl.trans(w), g, PRECISION)
        if grad_k_ptr is not None:
            p = _grad_weights(g, v_ptr, v_t, grad_weights_ptr, g_i, g_j, i, j, queries,
                              keys, value_width, PRECISION, BM, BN, BV)  # fmt: skip
            delta = tl.load(delta_ptr + z * queries + i, mask=i < queries, other=0.0)
            ds = unmasked(w.to(tl.float32) * (p - delta[:, None]), mask_ptr, i, j, m_i, m_j, there)
            q = _rows_of(q_ptr, i, queries, q_t, width, BD)
            grad_k += _product(tl.trans(ds.to(q.dtype)), q, PRECISION)
    if grad_k_ptr is not None:
        store_rows(grad_k_ptr, z * keys * width, grad_k * scale, j, keys, width, BD)
    if grad_v_ptr is not None:
        store_rows(grad_v_ptr, z * keys * value_width, grad_v, j, keys, value_width, BV)
