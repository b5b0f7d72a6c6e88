"""Block-sparse attention's kernels: scores, normaliser, weights, output, and their gradients.

A head's list names its blocks in the order of their query blocks; `rows` says where those of each
query block begin. Key blocks are cut into parts of BN keys, query blocks into parts of BM queries.

The forward kernel owns BM queries of a query block and walks over its key blocks twice, as the
weights that it writes need the softmax's sum; with entmax once more for each step towards the
threshold. Backward, with P the weights' gradient and s = W^(2 - alpha), W itself for softmax:
dS = s (P - delta), delta = rowsum(s P) / rowsum(s), dQ = scale dS K, dK = scale dS^T Q,
dV = W^T grad_output.
One kernel by rows gives delta and dQ, one by columns dK and dV of BN keys of a key block, from the
queries of all heads that read them and all blocks that hold them: no atomics, the same bits always.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .normalizers import add_scores, alpha_of, delta_of, state_of, weights_of
from .sparse_attention_gradients import add_to_keys, add_to_queries, add_to_sums, weights_gradient
from .sparse_attention_kernels import key_bound, load_rows, of_head, scores_of, store_rows, weigh

# Sizes that change from call to call: specialising on them would only compile the same code twice.
VARYING = ("queries", "keys", "places", "row_blocks", "column_blocks")


@triton.jit
def _queries(queries, row_blocks, block_queries, BM: tl.constexpr):
    """A program's row and head z, its block of queries, the rows r of the block that it owns,
    which queries i these are, and whether they exist."""
    parts = tl.cdiv(block_queries, BM)
    z = (tl.program_id(0) // (row_blocks * parts)).to(tl.int64)
    rest = tl.program_id(0) % (row_blocks * parts)
    row_block = (rest // parts).to(tl.int64)
    r = (rest % parts) * BM + tl.arange(0, BM)
    i = row_block * block_queries + r
    return z, row_block, r, i, (r < block_queries) & (i < queries)


@triton.jit
def _listed(begins_ptr, own, count, block):
    """From where to where the places of a block are in a list."""
    at = begins_ptr + own * (count + 1) + block
    return tl.load(at), tl.load(at + 1)


@triton.jit
def _seen(block, c, i, keys, end, block_keys, column_blocks):
    """Which key each column c of a key block is [BN], and whether each query sees it [BM, BN]."""
    j = block * block_keys + c
    there = (block >= 0) & (block < column_blocks) & (c < block_keys) & (j < keys)
    return j, there[None, :] & (j[None, :] < end[:, None])


@triton.jit
def _at(place, r, c, block_queries, block_keys):
    """Where in the weights rows r and columns c of a block are."""
    return ((place * block_queries + r) * block_keys)[:, None] + c[None, :]


@triton.jit
def _scores(block, c, given, SCALE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
            BD: tl.constexpr):  # fmt: skip
    """Which keys columns c of a block are, whether each query sees them, and their scores."""
    q, k_ptr, k_at, k_t, i, keys, end, block_keys, column_blocks, width = given
    j, seen = _seen(block, c, i, keys, end, block_keys, column_blocks)
    return j, seen, scores_of(q, k_ptr, k_at, k_t, j, seen, width, SCALE, ACC, PRECISION, BD)


@triton.jit
def _scan(a, b, top, tau, given, alpha, SCALE: tl.constexpr, ACC: tl.constexpr,
          PRECISION: tl.constexpr, KIND: tl.constexpr, BN: tl.constexpr,
          BD: tl.constexpr):  # fmt: skip
    """`add_scores` of all keys."""
    blocks_ptr, first, last, block_keys, of_scores = given
    for n in range(first, last):
        block = tl.load(blocks_ptr + n * 2 + 1)
        for c_0 in range(0, block_keys, BN):
            c = c_0 + tl.arange(0, BN)
            _, _, s = _scores(block, c, of_scores, SCALE, ACC, PRECISION, BD)
            a, b = add_scores(s, a, b, top, tau, alpha, KIND)
    return a, b


@triton.jit(do_not_specialize=VARYING)
def block_sparse_attention_forward(
    q_ptr,  # [B, Hq, Tq, D]
    k_ptr,  # [B, Hk, Tk, D]
    v_ptr,  # [B, Hk, Tk, DV]
    blocks_ptr,  # int64 [lists, places, 2], dense
    rows_ptr,  # int64 [lists, row_blocks + 1], dense
    end_ptr,  # int64 [B] or [B, Tq], or None
    seed_ptr,  # int64 [1], or None
    alpha_ptr,  # float64 [1] of KIND ANY, else None
    output_ptr,  # [B, Hq, Tq, DV], dense
    weights_ptr,  # [B, Hq, places, block_queries, block_keys], dense, zero; or None
    queries, keys, width, value_width,
    heads,  # Hq
    group,  # Hq / Hk
    places, row_blocks, column_blocks,
    list_0, list_1,  # which list a row and a head have
    block_queries, block_keys,
    q_0, q_1, q_t, k_0, k_1, k_t, v_0, v_1, v_t,
    CAUSAL: tl.constexpr, EACH_END: tl.constexpr,
    SCALE: tl.constexpr,  # an argument would be rounded to float32
    ACC: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr, BELOW: tl.constexpr,
    FACTOR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    z, row_block, r, i, known = _queries(queries, row_blocks, block_queries, BM)
    k_at = of_head(z, heads, k_0, k_1, group)
    v_at = of_head(z, heads, v_0, v_1, group)
    own = of_head(z, heads, list_0, list_1)
    first, last = _listed(rows_ptr, own, row_blocks, row_block)
    end = key_bound(end_ptr, z // heads, i, queries, keys, keys, EACH_END)
    if CAUSAL:
        end = tl.minimum(end, i + 1)
    end = tl.where(known, end, 0)
    q = load_rows(q_ptr, of_head(z, heads, q_0, q_1), i, known, q_t, width, BD)

    alpha = alpha_of(alpha_ptr, KIND)
    blocks_ptr += own * places * 2
    of_scores = (q, k_ptr, k_at, k_t, i, keys, end, block_keys, column_blocks, width)
    given = (blocks_ptr, first, last, block_keys, of_scores)
    m, total = state_of(_scan, given, alpha, SCALE, ACC, PRECISION, KIND, BM, BN, BD)
    out = tl.zeros([BM, BV], ACC)
    for n in range(first, last):
        block = tl.load(blocks_ptr + n * 2 + 1)
        for c_0 in range(0, block_keys, BN):
            c = c_0 + tl.arange(0, BN)
            j, seen, s = _scores(block, c, of_scores, SCALE, ACC, PRECISION, BD)
            w = weights_of(s, seen, m, total, alpha, KIND)
            row = (z * places + n) * block_queries + r
            at = _at(z * places + n, r, c, block_queries, block_keys)
            inside = known[:, None] & (c < block_keys)[None, :]
            out = weigh(out, w, seen, seed_ptr, row, c[None, :], weights_ptr, at, inside, v_ptr,
                        v_at, v_t, j, value_width, ACC, PRECISION, BELOW, FACTOR,
                        BV)  # fmt: skip
    store_rows(output_ptr, z * queries * value_width, out, i, known, value_width, BV)


@triton.jit
def _gradient(block, n, c_0, g, given, ACC: tl.constexpr, PRECISION: tl.constexpr,
              FACTOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
              BV: tl.constexpr):  # fmt: skip
    """Which keys columns c_0 and on of the block at place n are, their weights and P."""
    (
        v_ptr, v_at, v_t, weights_ptr, grad_ptr, z, places, r, i, keys, end, block_queries,
        block_keys, column_blocks, value_width,
    ) = given  # fmt: skip
    c = c_0 + tl.arange(0, BN)
    j, there = _seen(block, c, i, keys, end, block_keys, column_blocks)
    at = _at(z * places + n, r, c, block_queries, block_keys)
    w, p = weights_gradient(g, v_ptr, v_at, v_t, weights_ptr, grad_ptr, at, there, j, value_width,
                            ACC, PRECISION, FACTOR, BM, BN, BV)  # fmt: skip
    return j, w, p


@triton.jit(do_not_specialize=VARYING)
def block_sparse_attention_backward_rows(
    grad_output_ptr,  # [B, Hq, Tq, DV], dense, or None
    grad_weights_ptr,  # as the weights, or None
    k_ptr,
    v_ptr,
    blocks_ptr,
    rows_ptr,
    weights_ptr,  # [B, Hq, places, block_queries, block_keys], dense
    alpha_ptr,  # float64 [1] of KIND ANY, else None
    delta_ptr,  # [B, Hq, Tq] float32
    grad_q_ptr,  # [B, Hq, Tq, D], dense
    queries, keys, width, value_width, heads, group, places, row_blocks, column_blocks,
    list_0, list_1, block_queries, block_keys,
    k_0, k_1, k_t, v_0, v_1, v_t,
    SCALE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr,
    FACTOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    z, row_block, r, i, known = _queries(queries, row_blocks, block_queries, BM)
    end = tl.where(known, keys, 0)
    k_at = of_head(z, heads, k_0, k_1, group)
    v_at = of_head(z, heads, v_0, v_1, group)
    own = of_head(z, heads, list_0, list_1)
    first, last = _listed(rows_ptr, own, row_blocks, row_block)
    g = None  # passed beside `given`: a compiled kernel takes no None in a tuple
    if grad_output_ptr is not None:
        g = load_rows(grad_output_ptr, z * queries * value_width, i, known, value_width,
                      value_width, BV)  # fmt: skip

    given = (
        v_ptr, v_at, v_t, weights_ptr, grad_weights_ptr, z, places, r, i, keys, end,
        block_queries, block_keys, column_blocks, value_width,
    )  # fmt: skip
    alpha = alpha_of(alpha_ptr, KIND)
    dot = tl.zeros([BM], ACC)
    total = tl.zeros([BM], ACC)
    for n in range(first, last):
        block = tl.load(blocks_ptr + (own * places + n) * 2 + 1)
        for c_0 in range(0, block_keys, BN):
            _, w, p = _gradient(block, n, c_0, g, given, ACC, PRECISION, FACTOR, BM, BN, BV)
            dot, total = add_to_sums(dot, total, w, p, alpha, KIND)
    delta = delta_of(dot, total, KIND)
    tl.store(delta_ptr + z * queries + i, delta, mask=known)

    grad_q = tl.zeros([BM, BD], ACC)
    for n in range(first, last):
        block = tl.load(blocks_ptr + (own * places + n) * 2 + 1)
        for c_0 in range(0, block_keys, BN):
            j, w, p = _gradient(block, n, c_0, g, given, ACC, PRECISION, FACTOR, BM, BN, BV)
            grad_q = add_to_queries(grad_q, w, p, delta, k_ptr, k_at, k_t, j, width, alpha,
                                    ACC, PRECISION, KIND, BD)  # fmt: skip
    store_rows(grad_q_ptr, z * queries * width, grad_q * SCALE, i, known, width, BD)


@triton.jit(do_not_specialize=VARYING)
def block_sparse_attention_backward_columns(
    grad_output_ptr,
    grad_weights_ptr,
    q_ptr,
    v_ptr,
    blocks_ptr,
    by_key_ptr,  # int64 [lists, places], dense: places in the order of their key blocks
    columns_ptr,  # int64 [lists, column_blocks + 1], dense: where those of a key block begin
    weights_ptr,
    alpha_ptr,
    delta_ptr,
    grad_k_ptr,  # [B, Hk, Tk, D], dense
    grad_v_ptr,  # [B, Hk, Tk, DV], dense
    queries, keys, width, value_width, heads, group, places, row_blocks, column_blocks,
    list_0, list_1, block_queries, block_keys,
    q_0, q_1, q_t, v_0, v_1, v_t,
    SCALE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr,
    FACTOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(block_keys, BN)
    y = (tl.program_id(0) // (column_blocks * parts)).to(tl.int64)  # row and head of keys
    rest = tl.program_id(0) % (column_blocks * parts)
    column_block = (rest // parts).to(tl.int64)
    c = (rest % parts) * BN + tl.arange(0, BN)
    j = column_block * block_keys + c
    known = (c < block_keys) & (j < keys)
    v = load_rows(v_ptr, of_head(y, heads // group, v_0, v_1), j, known, v_t, value_width, BV)
    alpha = alpha_of(alpha_ptr, KIND)
    grad_k = tl.zeros([BN, BD], ACC)
    grad_v = tl.zeros([BN, BV], ACC)
    for member in range(group):
        z = y * group + member
        own = of_head(z, heads, list_0, list_1)
        first, last = _listed(columns_ptr, own, column_blocks, column_block)
        for n in range(first, last):
            place = tl.load(by_key_ptr + own * places + n)
            row_block = tl.load(blocks_ptr + (own * places + place) * 2)
            for r_0 in range(0, block_queries, BM):
                r = r_0 + tl.arange(0, BM)
                i = row_block * block_queries + r
                there = (r < block_queries) & (i >= 0) & (i < queries)
                at = _at(z * places + place, r, c, block_queries, block_keys)
                inside = there[:, None] & known[None, :]
                grad_k, grad_v = add_to_keys(
                    grad_k, grad_v, v, z, i, there, weights_ptr, grad_weights_ptr, at, inside,
                    grad_output_ptr, delta_ptr, q_ptr, of_head(z, heads, q_0, q_1), q_t, queries,
                    width, value_width, alpha, ACC, PRECISION, KIND, FACTOR, BM, BN, BD, BV,
                )  # fmt: skip
    store_rows(grad_k_ptr, y * keys * width, grad_k * SCALE, j, known, width, BD)
    store_rows(grad_v_ptr, y * keys * value_width, grad_v, j, known, value_width, BV)
