"""Indexed attention's kernels: scores, normaliser, weights and output in one, and their gradients.

The forward kernel owns a query and walks over its list twice, as the weights that it writes need
the softmax's sum; with entmax once more for each step towards the threshold. Backward, with P the
weights' gradient and s = W^(2 - alpha), W itself for softmax: dS = s (P - delta),
delta = sum(s P) / sum(s), dQ = scale sum of dS K, dK = scale sum of dS Q, dV = sum of
W grad_output. One kernel by queries gives dS and dQ, one by keys dK and dV, from the places of all
lists that name the key, in order: no atomics, the same bits always. Rows are read where they lie;
products are sums over features.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import signed
from .normalizers import add_scores, alpha_of, delta_of, state_of, weight_slopes, weights_of
from .sparse_attention_kernels import is_nothing, load_rows, meet_values, of_head, with_sign

# Sizes that change from call to call: specialising on them would only compile the same code twice.
VARYING = ("queries", "keys", "count")


@triton.jit
def _row(ptr, at, width, BLOCK: tl.constexpr, ACC: tl.constexpr):
    n = tl.arange(0, BLOCK)
    return tl.load(ptr + at + n, mask=n < width, other=0.0).to(ACC)


@triton.jit
def _store_row(ptr, at, value, width, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(ptr + at + n, value.to(ptr.dtype.element_ty), mask=n < width)


@triton.jit
def _query(queries, heads, list_0, list_1, count):
    """A program's row and head z, its query i, and where the query's list begins."""
    z = (tl.program_id(0) // queries).to(tl.int64)
    i = (tl.program_id(0) % queries).to(tl.int64)
    return z, i, (of_head(z, heads, list_0, list_1) * queries + i) * count


@triton.jit
def _listed(index_ptr, at, c, count, keys):
    """The keys at places c of a list, and whether they exist."""
    j = tl.load(index_ptr + at + c, mask=c < count, other=-1)
    return j, (j >= 0) & (j < keys)


@triton.jit
def _scores(q, k_ptr, k_at, k_t, j, seen, width, SCALE: tl.constexpr, ACC: tl.constexpr,
            BD: tl.constexpr):  # fmt: skip
    k = load_rows(k_ptr, k_at, j, seen, k_t, width, BD).to(ACC)
    return tl.where(seen, tl.sum(k * q[None, :], axis=1) * SCALE, float("-inf"))[None, :]


@triton.jit
def _scan(a, b, top, tau, given, alpha, SCALE: tl.constexpr, ACC: tl.constexpr,
          PRECISION: tl.constexpr, KIND: tl.constexpr, BN: tl.constexpr,
          BD: tl.constexpr):  # fmt: skip
    """`add_scores` of all keys."""
    q, k_ptr, k_at, k_t, index_ptr, at, count, keys, width = given
    for c_0 in range(0, count, BN):
        j, seen = _listed(index_ptr, at, c_0 + tl.arange(0, BN), count, keys)
        s = _scores(q, k_ptr, k_at, k_t, j, seen, width, SCALE, ACC, BD)
        a, b = add_scores(s, a, b, top, tau, alpha, KIND)
    return a, b


@triton.jit(do_not_specialize=VARYING)
def indexed_attention_forward(
    q_ptr,  # [B, Hq, Tq, D]
    k_ptr,  # [B, Hk, Tk, D]
    v_ptr,  # [B, Hk, Tk, DV]
    index_ptr,  # int64 [lists, Tq, count], dense
    seed_ptr,  # int64 [1], or None
    alpha_ptr,  # float64 [1] of KIND ANY, else None
    output_ptr,  # [B, Hq, Tq, DV], dense
    weights_ptr,  # [B, Hq, Tq, count], dense, or None
    queries, keys, width, value_width,
    heads,  # Hq
    group,  # Hq / Hk
    count,
    list_0, list_1,  # which list a row and a head have
    q_0, q_1, q_t, k_0, k_1, k_t, v_0, v_1, v_t,
    SCALE: tl.constexpr,  # an argument would be rounded to float32
    ACC: tl.constexpr, KIND: tl.constexpr, BELOW: tl.constexpr, FACTOR: tl.constexpr,
    BC: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    z, i, at = _query(queries, heads, list_0, list_1, count)
    k_at = of_head(z, heads, k_0, k_1, group)
    v_at = of_head(z, heads, v_0, v_1, group)
    q = _row(q_ptr, of_head(z, heads, q_0, q_1) + i * q_t, width, BD, ACC)
    alpha = alpha_of(alpha_ptr, KIND)
    given = (q, k_ptr, k_at, k_t, index_ptr, at, count, keys, width)
    m, total = state_of(_scan, given, alpha, SCALE, ACC, None, KIND, 1, BC, BD)
    out = tl.zeros([BV], ACC)
    for c_0 in range(0, count, BC):
        c = c_0 + tl.arange(0, BC)
        j, seen = _listed(index_ptr, at, c, count, keys)
        s = _scores(q, k_ptr, k_at, k_t, j, seen, width, SCALE, ACC, BD)
        w = tl.sum(weights_of(s, seen[None, :], m, total, alpha, KIND), axis=0)
        w = signed(w, seed_ptr, z * queries + i, c, BELOW)
        if weights_ptr is not None:
            where = weights_ptr + (z * queries + i) * count + c
            tl.store(where, w.to(weights_ptr.dtype.element_ty), mask=c < count)
        v = load_rows(v_ptr, v_at, j, seen, v_t, value_width, BV).to(ACC)
        out += tl.sum(meet_values(w, w, FACTOR)[:, None] * v, axis=0)
    _store_row(output_ptr, (z * queries + i) * value_width, out, value_width, BV)


@triton.jit
def _gradient(g, v_ptr, v_at, v_t, weights_ptr, grad_ptr, own, c, count, j, seen, value_width,
              ACC: tl.constexpr, FACTOR: tl.constexpr, BC: tl.constexpr,
              BV: tl.constexpr):  # fmt: skip
    """Weights W at places c of query number `own`, zero where none, and their gradient P."""
    sign = tl.load(weights_ptr + own * count + c, mask=seen, other=0.0).to(ACC)
    w = with_sign(sign, sign, FACTOR)
    p = tl.zeros([BC], ACC)
    if g is not None:
        v = load_rows(v_ptr, v_at, j, seen, v_t, value_width, BV).to(ACC)
        p += meet_values(sign, tl.sum(v * g[None, :], axis=1), FACTOR)
    if grad_ptr is not None:
        given = tl.load(grad_ptr + own * count + c, mask=seen, other=0.0).to(ACC)
        p += with_sign(sign, given, FACTOR)
    return w, tl.where(is_nothing(w), 0.0, p)


@triton.jit(do_not_specialize=VARYING)
def indexed_attention_backward_rows(
    grad_output_ptr,  # [B, Hq, Tq, DV], dense, or None
    grad_weights_ptr,  # as the weights, or None
    k_ptr,
    v_ptr,
    index_ptr,
    weights_ptr,  # [B, Hq, Tq, count], dense
    alpha_ptr,  # float64 [1] of KIND ANY, else None
    slopes_ptr,  # as the weights, in float32 or float64
    grad_q_ptr,  # [B, Hq, Tq, D], dense
    queries, keys, width, value_width, heads, group, count,
    list_0, list_1,
    k_0, k_1, k_t, v_0, v_1, v_t,
    SCALE: tl.constexpr,  # an argument would be rounded to float32
    ACC: tl.constexpr, KIND: tl.constexpr, FACTOR: tl.constexpr,
    BC: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    z, i, at = _query(queries, heads, list_0, list_1, count)
    k_at = of_head(z, heads, k_0, k_1, group)
    v_at = of_head(z, heads, v_0, v_1, group)
    own = z * queries + i
    g = None
    if grad_output_ptr is not None:
        g = _row(grad_output_ptr, own * value_width, value_width, BV, ACC)
    alpha = alpha_of(alpha_ptr, KIND)
    dot = tl.zeros([BC], ACC)
    total = tl.zeros([BC], ACC)
    for c_0 in range(0, count, BC):
        c = c_0 + tl.arange(0, BC)
        j, seen = _listed(index_ptr, at, c, count, keys)
        w, p = _gradient(g, v_ptr, v_at, v_t, weights_ptr, grad_weights_ptr, own, c, count, j,
                         seen, value_width, ACC, FACTOR, BC, BV)  # fmt: skip
        slope = weight_slopes(w, alpha, KIND)
        dot += slope * p
        total += slope
    delta = delta_of(tl.sum(dot, axis=0), tl.sum(total, axis=0), KIND)
    grad_q = tl.zeros([BD], ACC)
    for c_0 in range(0, count, BC):
        c = c_0 + tl.arange(0, BC)
        j, seen = _listed(index_ptr, at, c, count, keys)
        w, p = _gradient(g, v_ptr, v_at, v_t, weights_ptr, grad_weights_ptr, own, c, count, j,
                         seen, value_width, ACC, FACTOR, BC, BV)  # fmt: skip
        ds = tl.where(is_nothing(w), 0.0, weight_slopes(w, alpha, KIND) * (p - delta))
        tl.store(slopes_ptr + own * count + c, ds, mask=c < count)
        k = load_rows(k_ptr, k_at, j, seen, k_t, width, BD).to(ACC)
        grad_q += tl.sum(ds[:, None] * k, axis=0)
    _store_row(grad_q_ptr, own * width, grad_q * SCALE, width, BD)


@triton.jit(do_not_specialize=VARYING)
def indexed_attention_backward_keys(
    grad_output_ptr,
    q_ptr,
    places_ptr,  # int64 [lists, Tq * count], dense: places of a list in the order of their keys
    begins_ptr,  # int64 [lists, Tk + 1], dense: where those of a key begin
    weights_ptr,
    slopes_ptr,
    grad_k_ptr,  # [B, Hk, Tk, D], dense
    grad_v_ptr,  # [B, Hk, Tk, DV], dense
    queries, keys, width, value_width, heads, group, count,
    list_0, list_1,
    q_0, q_1, q_t,
    SCALE: tl.constexpr,  # an argument would be rounded to float32
    ACC: tl.constexpr, FACTOR: tl.constexpr,
    BC: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    y = (tl.program_id(0) // keys).to(tl.int64)  # row and head of keys
    j = (tl.program_id(0) % keys).to(tl.int64)
    key_heads = heads // group
    b = y // key_heads
    grad_k = tl.zeros([BD], ACC)
    grad_v = tl.zeros([BV], ACC)
    for member in range(group):
        h = (y % key_heads) * group + member
        z = b * heads + h
        own = b * list_0 + h * list_1
        first = tl.load(begins_ptr + own * (keys + 1) + j)
        last = tl.load(begins_ptr + own * (keys + 1) + j + 1)
        for n_0 in range(first, last, BC):
            n = n_0 + tl.arange(0, BC)
            known = n < last
            place = tl.load(places_ptr + own * queries * count + n, mask=known, other=0)
            i = place // count
            at = z * queries * count + place
            ds = tl.load(slopes_ptr + at, mask=known, other=0.0)
            q = load_rows(q_ptr, b * q_0 + h * q_1, i, known, q_t, width, BD).to(ACC)
            grad_k += tl.sum(ds[:, None] * q, axis=0)
            if grad_output_ptr is not None:
                w = tl.load(weights_ptr + at, mask=known, other=0.0).to(ACC)
                g = load_rows(grad_output_ptr, z * queries * value_width, i, known, value_width,
                              value_width, BV).to(ACC)  # fmt: skip
                grad_v += tl.sum(meet_values(w, w, FACTOR)[:, None] * g, axis=0)
    _store_row(grad_k_ptr, (y * keys + j) * width, grad_k * SCALE, width, BD)
    _store_row(grad_v_ptr, (y * keys + j) * value_width, grad_v, value_width, BV)
