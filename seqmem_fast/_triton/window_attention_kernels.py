"""Window attention's kernels: scores, normaliser, weights and output in one, and their gradients.

Queries and keys whose positions leave the same remainder by the dilation see each other alone:
such a class is an undilated window over every dilation-th query and key. Query n of a class is
query first + n * dilation and stands at key n + ahead; x is a key of the class, or a global one.

The forward kernel owns BM queries of a class and walks over their keys, global ones first, twice,
as the weights that it writes need the softmax's sum; with entmax once more for each step towards
the threshold. Backward, with P the weights' gradient and s = W^(2 - alpha), W itself for softmax:
dS = s (P - delta), delta = rowsum(s P) / rowsum(s), dQ = scale dS K, dK = scale dS^T Q,
dV = W^T grad_output.
One kernel by rows gives delta and dQ, one by columns dK and dV, of the band's keys and of the
global ones in turn, from the queries of all heads that read them: no atomics, the same bits always.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .normalizers import add_scores, alpha_of, delta_of, state_of, weights_of
from .sparse_attention_gradients import add_to_keys, add_to_queries, add_to_sums, weights_gradient
from .sparse_attention_kernels import key_bound, load_rows, of_head, scores_of, store_rows, weigh

# Sizes that change from call to call: specialising on them would only compile the same code twice.
VARYING = ("offset", "queries", "keys", "blocks", "left", "right", "count")


@triton.jit
def _queries(blocks, classes, dilation, offset, BM: tl.constexpr):
    """A program's row and head z, its queries i, where in the class's keys each of them stands, and
    the class's first key."""
    z = (tl.program_id(0) // (blocks * classes)).to(tl.int64)
    rest = tl.program_id(0) % (blocks * classes)
    first = (rest // blocks).to(tl.int64)
    n = (rest % blocks).to(tl.int64) * BM + tl.arange(0, BM)
    return z, first + n * dilation, n + (offset + first) // dilation, (offset + first) % dilation


@triton.jit
def _reach(own, first_key, dilation, left, right, keys):
    """From where to where keys x of the class are seen by some query."""
    least = tl.maximum(tl.min(own, axis=0) - left, 0)
    of_class = (keys - first_key + dilation - 1) // dilation
    return least, tl.minimum(tl.max(own, axis=0) + right + 1, of_class)


@triton.jit
def _seen(own, x, first_key, dilation, left, right, keys, count, start, end, GLOBAL: tl.constexpr):
    """Which key x is [BN], and whether each query sees it [BM, BN]."""
    if GLOBAL:
        j = x
        seen = (own * 0 == 0)[:, None] & (x < count)[None, :]
    else:
        j = first_key + x * dilation
        ahead = x[None, :] - own[:, None]
        seen = (ahead >= -left) & (ahead <= right) & ((j >= count) & (j < keys))[None, :]
    return j, seen & (j[None, :] >= start[:, None]) & (j[None, :] < end[:, None])


@triton.jit
def _places(i, own, x, z, queries, columns, left, GLOBAL: tl.constexpr):
    """Where the weights of queries i and keys x are, and whether they are at all."""
    column = x[None, :] - own[:, None] + left
    if GLOBAL:
        column = x[None, :] + own[:, None] * 0
    there = (i < queries)[:, None] & (column >= 0) & (column < columns)
    return (z * queries + i)[:, None] * columns + column, there


@triton.jit
def _scan(a, b, top, tau, given, alpha, SCALE: tl.constexpr, ACC: tl.constexpr,
          PRECISION: tl.constexpr, KIND: tl.constexpr, BN: tl.constexpr,
          BD: tl.constexpr):  # fmt: skip
    """`add_scores` of all keys."""
    (
        q, k_ptr, k_at, k_t, own, least, most, first_key, dilation, left, right, keys, count, start,
        end, width,
    ) = given  # fmt: skip
    for x_0 in range(0, count, BN):
        x = x_0 + tl.arange(0, BN).to(tl.int64)
        j, seen = _seen(own, x, first_key, dilation, left, right, keys, count, start, end, True)
        s = scores_of(q, k_ptr, k_at, k_t, j, seen, width, SCALE, ACC, PRECISION, BD)
        a, b = add_scores(s, a, b, top, tau, alpha, KIND)
    for x_0 in range(least, most, BN):
        x = x_0 + tl.arange(0, BN)
        j, seen = _seen(own, x, first_key, dilation, left, right, keys, count, start, end, False)
        s = scores_of(q, k_ptr, k_at, k_t, j, seen, width, SCALE, ACC, PRECISION, BD)
        a, b = add_scores(s, a, b, top, tau, alpha, KIND)
    return a, b


@triton.jit(do_not_specialize=VARYING)
def window_attention_forward(
    q_ptr,  # [B, Hq, Tq, D]
    k_ptr,  # [B, Hk, Tk, D]
    v_ptr,  # [B, Hk, Tk, DV]
    start_ptr,  # int64 [B] or [B, Tq], or None
    end_ptr,
    seed_ptr,  # int64 [1], or None
    alpha_ptr,  # float64 [1] of KIND ANY, else None
    output_ptr,  # [B, Hq, Tq, DV], dense
    weights_ptr,  # [B, Hq, Tq, left + 1 + right], dense, zero; or None
    global_ptr,  # [B, Hq, Tq, count], dense; or None
    queries, keys, width, value_width,
    heads,  # Hq
    group,  # Hq / Hk
    left, right, dilation, offset,
    count,  # of global keys
    classes,
    blocks,  # of a class's queries
    q_0, q_1, q_t, k_0, k_1, k_t, v_0, v_1, v_t,
    EACH_START: tl.constexpr, EACH_END: tl.constexpr,
    SCALE: tl.constexpr,  # an argument would be rounded to float32
    ACC: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr, BELOW: tl.constexpr,
    FACTOR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    z, i, own, first_key = _queries(blocks, classes, dilation, offset, BM)
    b = z // heads
    k_at = of_head(z, heads, k_0, k_1, group)
    v_at = of_head(z, heads, v_0, v_1, group)
    start = key_bound(start_ptr, b, i, queries, keys, 0, EACH_START)
    end = key_bound(end_ptr, b, i, queries, keys, keys, EACH_END)
    q = load_rows(q_ptr, of_head(z, heads, q_0, q_1), i, i < queries, q_t, width, BD)
    least, most = _reach(own, first_key, dilation, left, right, keys)

    alpha = alpha_of(alpha_ptr, KIND)
    given = (
        q, k_ptr, k_at, k_t, own, least, most, first_key, dilation, left, right, keys, count, start,
        end, width,
    )  # fmt: skip
    m, total = state_of(_scan, given, alpha, SCALE, ACC, PRECISION, KIND, BM, BN, BD)
    out = tl.zeros([BM, BV], ACC)
    row = z * queries + i

    for x_0 in range(0, count, BN):
        x = x_0 + tl.arange(0, BN).to(tl.int64)
        j, seen = _seen(own, x, first_key, dilation, left, right, keys, count, start, end, True)
        s = scores_of(q, k_ptr, k_at, k_t, j, seen, width, SCALE, ACC, PRECISION, BD)
        w = weights_of(s, seen, m, total, alpha, KIND)
        column = x[None, :] + left + 1 + right
        at, there = _places(i, own, x, z, queries, count, left, True)
        out = weigh(out, w, seen, seed_ptr, row, column, global_ptr, at, there, v_ptr, v_at, v_t, j,
                    value_width, ACC, PRECISION, BELOW, FACTOR, BV)  # fmt: skip
    for x_0 in range(least, most, BN):
        x = x_0 + tl.arange(0, BN)
        j, seen = _seen(own, x, first_key, dilation, left, right, keys, count, start, end, False)
        s = scores_of(q, k_ptr, k_at, k_t, j, seen, width, SCALE, ACC, PRECISION, BD)
        w = weights_of(s, seen, m, total, alpha, KIND)
        column = x[None, :] - own[:, None] + left
        at, there = _places(i, own, x, z, queries, left + 1 + right, left, False)
        out = weigh(out, w, seen, seed_ptr, row, column, weights_ptr, at, there, v_ptr, v_at, v_t,
                    j, value_width, ACC, PRECISION, BELOW, FACTOR, BV)  # fmt: skip
    store_rows(output_ptr, z * queries * value_width, out, i, i < queries, value_width, BV)


@triton.jit
def _gradient(x, g, given, weights, GLOBAL: tl.constexpr, ACC: tl.constexpr,
              PRECISION: tl.constexpr, FACTOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
              BV: tl.constexpr):  # fmt: skip
    """Which keys x of the class are, or the global ones, their weights and P."""
    v_ptr, v_at, v_t, z, i, own, queries, first_key, dilation, left, value_width = given
    weights_ptr, grad_ptr, columns = weights
    at, there = _places(i, own, x, z, queries, columns, left, GLOBAL)
    j = x
    if not GLOBAL:
        j = first_key + x * dilation
    w, p = weights_gradient(g, v_ptr, v_at, v_t, weights_ptr, grad_ptr, at, there, j, value_width,
                            ACC, PRECISION, FACTOR, BM, BN, BV)  # fmt: skip
    return j, w, p


@triton.jit(do_not_specialize=VARYING)
def window_attention_backward_rows(
    grad_output_ptr,  # [B, Hq, Tq, DV], dense, or None
    grad_weights_ptr,  # as the weights, or None
    grad_global_ptr,  # as the global weights, or None
    k_ptr,
    v_ptr,
    weights_ptr,  # [B, Hq, Tq, left + 1 + right], dense
    global_ptr,  # [B, Hq, Tq, count], dense
    alpha_ptr,  # float64 [1] of KIND ANY, else None
    delta_ptr,  # [B, Hq, Tq] float32
    grad_q_ptr,  # [B, Hq, Tq, D], dense
    queries, keys, width, value_width, heads, group, left, right, dilation, offset, count, classes,
    blocks,
    k_0, k_1, k_t, v_0, v_1, v_t,
    SCALE: tl.constexpr,  # an argument would be rounded to float32
    ACC: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr, FACTOR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    z, i, own, first_key = _queries(blocks, classes, dilation, offset, BM)
    k_at = of_head(z, heads, k_0, k_1, group)
    v_at = of_head(z, heads, v_0, v_1, group)
    g = None  # passed beside `given`: a compiled kernel takes no None in a tuple
    if grad_output_ptr is not None:
        g = load_rows(grad_output_ptr, z * queries * value_width, i, i < queries, value_width,
                  value_width, BV)  # fmt: skip
    least, most = _reach(own, first_key, dilation, left, right, keys)

    given = (v_ptr, v_at, v_t, z, i, own, queries, first_key, dilation, left, value_width)
    of_global = (global_ptr, grad_global_ptr, count)
    of_band = (weights_ptr, grad_weights_ptr, left + 1 + right)
    alpha = alpha_of(alpha_ptr, KIND)
    dot = tl.zeros([BM], ACC)
    total = tl.zeros([BM], ACC)
    for x_0 in range(0, count, BN):
        x = x_0 + tl.arange(0, BN).to(tl.int64)
        _, w, p = _gradient(x, g, given, of_global, True, ACC, PRECISION, FACTOR, BM, BN, BV)
        dot, total = add_to_sums(dot, total, w, p, alpha, KIND)
    for x_0 in range(least, most, BN):
        x = x_0 + tl.arange(0, BN)
        j, w, p = _gradient(x, g, given, of_band, False, ACC, PRECISION, FACTOR, BM, BN, BV)
        dot, total = add_to_sums(dot, total, w, p, alpha, KIND)
    delta = delta_of(dot, total, KIND)
    tl.store(delta_ptr + z * queries + i, delta, mask=i < queries)

    grad_q = tl.zeros([BM, BD], ACC)
    for x_0 in range(0, count, BN):
        x = x_0 + tl.arange(0, BN).to(tl.int64)
        _, w, p = _gradient(x, g, given, of_global, True, ACC, PRECISION, FACTOR, BM, BN, BV)
        grad_q = add_to_queries(grad_q, w, p, delta, k_ptr, k_at, k_t, x, width, alpha, ACC,
                                PRECISION, KIND, BD)  # fmt: skip
    for x_0 in range(least, most, BN):
        x = x_0 + tl.arange(0, BN)
        j, w, p = _gradient(x, g, given, of_band, False, ACC, PRECISION, FACTOR, BM, BN, BV)
        grad_q = add_to_queries(grad_q, w, p, delta, k_ptr, k_at, k_t, j, width, alpha, ACC,
                                PRECISION, KIND, BD)  # fmt: skip
    store_rows(grad_q_ptr, z * queries * width, grad_q * SCALE, i, i < queries, width, BD)


@triton.jit(do_not_specialize=VARYING)
def window_attention_backward_columns(
    grad_output_ptr,
    grad_weights_ptr,  # as weights_ptr, or None
    q_ptr,
    v_ptr,
    weights_ptr,  # of the band; of the global keys where GLOBAL
    alpha_ptr,
    delta_ptr,
    grad_k_ptr,  # [B, Hk, Tk, D], dense, zero
    grad_v_ptr,  # [B, Hk, Tk, DV], dense, zero
    queries, keys, width, value_width, heads, group, left, right, dilation, offset, count,
    classes,  # of keys; 1 where GLOBAL
    blocks,  # of a class's keys
    q_0, q_1, q_t, v_0, v_1, v_t,
    GLOBAL: tl.constexpr,
    SCALE: tl.constexpr,  # an argument would be rounded to float32
    ACC: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr, FACTOR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    y = (tl.program_id(0) // (blocks * classes)).to(tl.int64)  # row and head of keys
    rest = tl.program_id(0) % (blocks * classes)
    first_key = (rest // blocks).to(tl.int64)
    x = (rest % blocks).to(tl.int64) * BN + tl.arange(0, BN)
    first = (first_key + dilation - offset % dilation) % dilation  # the class's first query
    ahead = (offset + first) // dilation
    step = dilation
    columns = left + 1 + right
    j = first_key + x * dilation
    known = (j >= count) & (j < keys)
    of_class = (queries - first + dilation - 1) // dilation
    least = tl.maximum(tl.min(x, axis=0) - right - ahead, 0)
    most = tl.minimum(tl.max(x, axis=0) + left + 1 - ahead, of_class)
    if GLOBAL:
        first = first * 0
        step = 1
        columns = count
        j = x
        known = x < count
        least = least * 0
        most = most * 0 + queries
    v = load_rows(v_ptr, of_head(y, heads // group, v_0, v_1), j, known, v_t, value_width, BV)
    alpha = alpha_of(alpha_ptr, KIND)
    grad_k = tl.zeros([BN, BD], ACC)
    grad_v = tl.zeros([BN, BV], ACC)
    for z in range(y * group, (y + 1) * group):
        for n_0 in range(least, most, BM):
            n = n_0 + tl.arange(0, BM)
            i = first + n * step
            at, there = _places(i, n + ahead, x, z, queries, columns, left, GLOBAL)
            grad_k, grad_v = add_to_keys(
                grad_k, grad_v, v, z, i, i < queries, weights_ptr, grad_weights_ptr, at,
                there & known[None, :], grad_output_ptr, delta_ptr, q_ptr,
                of_head(z, heads, q_0, q_1), q_t, queries, width, value_width, alpha, ACC,
                PRECISION, KIND, FACTOR, BM, BN, BD, BV,
            )  # fmt: skip
    store_rows(grad_k_ptr, y * keys * width, grad_k * SCALE, j, known, width, BD)
    store_rows(grad_v_ptr, y * keys * value_width, grad_v, j, known, value_width, BV)
