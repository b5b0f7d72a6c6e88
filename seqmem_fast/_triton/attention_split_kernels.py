"""Attention's forward in float32 by products of bfloat16, which tensor cores multiply fastest.

A float32 is a sum of three bfloat16, x = x1 + x2 + x3 with |x2| < 2^-7 |x|, |x3| <= 2^-16 |x|. So a
product of two matrices is nine products of their parts, summed in float32:
A B = A1 B1 + (A1 B2 + A2 B1 + A2 B2 + A1 B3 + A3 B1) + ..., of which three, below 2^-22 of the
whole, are left out. The small ones are summed first.

  attention_parts  Q, K, V -> their parts, with zeros up to whole blocks,
                   [Z, blocks, 3, rows of a block, columns]
  attention_split  walk 1 over the keys: the scores' maximum and sum
                   walk 2: weights, split where they are computed, and their product with V

The parts of a block lie together, so that one address serves them all. Asynchronous copies bring
those of the next block while this one is multiplied. Three products of TF32 would take as long on
the tensor cores, would be less exact, and need shuffles of the weights between threads.

Floor at 4 x 2048^2 x 64 on an H200: 39 GFLOP in bfloat16, 52 us at the 751 TFLOP/s measured there.
For 64 keys a warp executes 933 and 1368 instructions in the two walks (sm_90; 244 registers, no
spills) and waits for its products in between. Predicted: 130 us, where torch's products in float32
with a softmax between them took 216.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .attention_kernels import VARYING, known_scores, store_rest, store_rows
from .common import moved, place, softmax_step


@triton.jit
def _upper(bits):
    """The float32 whose first 16 bits these are: a bfloat16."""
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _parts(x):
    """x1, x2, x3 of finite x: the first cut off, which never overflows, the others rounded."""
    first = _upper(x.to(tl.uint32, bitcast=True))
    rest = x - first
    second = _upper(rest.to(tl.uint32, bitcast=True) + 0x8000)
    return first.to(tl.bfloat16), second.to(tl.bfloat16), (rest - second).to(tl.bfloat16)


@triton.jit
def _product(a, b, out):
    """out + a b, of three parts each.

    An infinity times a part that is 0 is NaN: what it makes of the small sums does not count.
    """
    a1, a2, a3 = a
    b1, b2, b3 = b
    small = tl.dot(a3, b1)
    small = tl.dot(a1, b3, small)
    small = tl.dot(a2, b2, small)
    small = tl.dot(a2, b1, small)
    small = tl.dot(a1, b2, small)
    return tl.dot(a1, b1, out) + tl.where(tl.abs(small) < float("inf"), small, 0.0)


@triton.jit
def _store_parts(x_ptr, parts_ptr, block, count, stride, width,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """The parts of a block of rows of one [count, width] matrix."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    i = block.to(tl.int64) * ROWS + row
    there = (i < count)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + i[:, None] * stride + column[None, :], mask=there, other=0.0)
    finite = tl.abs(x) < float("inf")
    first, second, third = _parts(tl.where(finite, x, 0.0))
    at = parts_ptr + row[:, None] * COLUMNS + column[None, :]
    tl.store(at, tl.where(finite, first, x.to(tl.bfloat16)))
    tl.store(at + ROWS * COLUMNS, second)
    tl.store(at + 2 * ROWS * COLUMNS, third)


@triton.jit(do_not_specialize=VARYING)
def attention_parts(
    q_ptr,  # [Z0, Z1, Tq, D]
    k_ptr,  # [Z0, Z1, Tk, D]
    v_ptr,  # [Z0, Z1, Tk, DV]
    q_parts_ptr,  # [Z0 * Z1, blocks of queries, 3, BM, BD]
    k_parts_ptr,  # [Z0 * Z1, blocks of keys, 3, BN, BD]
    v_parts_ptr,  # [Z0 * Z1, blocks of keys, 3, BN, BV]
    queries, keys, width, value_width,
    heads,  # Z1
    blocks,  # of queries or of keys, whichever are more
    q_0, q_1, q_t, k_0, k_1, k_t, v_0, v_1, v_t,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    z = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    query_blocks = tl.cdiv(queries, BM)
    key_blocks = tl.cdiv(keys, BN)
    if tl.program_id(1) == 0:
        if block < query_blocks:
            to = q_parts_ptr + (z * query_blocks + block) * (3 * BM * BD)
            _store_parts(moved(q_ptr, z, heads, q_0, q_1), to, block, queries, q_t, width, BM, BD)
    elif block < key_blocks:
        if tl.program_id(1) == 1:
            to = k_parts_ptr + (z * key_blocks + block) * (3 * BN * BD)
            _store_parts(moved(k_ptr, z, heads, k_0, k_1), to, block, keys, k_t, width, BN, BD)
        else:
            to = v_parts_ptr + (z * key_blocks + block) * (3 * BN * BV)
            _store_parts(
                moved(v_ptr, z, heads, v_0, v_1), to, block, keys, v_t, value_width, BN, BV
            )


@triton.jit
def _load_parts(ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    first = tl.load(ptr + at)
    second = tl.load(ptr + ROWS * COLUMNS + at)
    return first, second, tl.load(ptr + 2 * ROWS * COLUMNS + at)


@triton.jit
def _scores(q, k_ptr, mask_ptr, m_i, m_j, scale, i, j, queries, keys,
            CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            BD: tl.constexpr):  # fmt: skip
    """Masked scores [BM, BN] of queries i and keys j, whose parts are at k_ptr."""
    k1, k2, k3 = _load_parts(k_ptr, BN, BD)
    k = (tl.trans(k1), tl.trans(k2), tl.trans(k3))
    s = _product(q, k, tl.zeros([BM, BN], tl.float32)) * scale
    return known_scores(s, mask_ptr, m_i, m_j, i, j, queries, keys, CAUSAL)


@triton.jit
def _weigh(s, m, inverse, out, weights_ptr, v_ptr, i, j, queries, keys,
           BN: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """Stores the weights of one block of keys and adds their values to the output."""
    w = tl.exp(s - m[:, None]) * inverse[:, None]
    there = (i < queries)[:, None] & (j < keys)[None, :]
    tl.store(weights_ptr + i[:, None] * keys + j[None, :], w, mask=there)
    return _product(_parts(w), _load_parts(v_ptr, BN, BV), out)


@triton.jit(do_not_specialize=("scale", *VARYING))
def attention_split(
    q_ptr, k_ptr, v_ptr,  # from attention_parts
    mask_ptr,  # [Z0, Z1, Tq, Tk] uint8 (0 = masked) or floating (added), or None
    output_ptr,  # [Z0 * Z1, Tq, DV], dense
    weights_ptr,  # [Z0 * Z1, Tq, Tk], dense
    scale, queries, keys, value_width,
    heads,  # Z1
    blocks,  # of queries
    m_0, m_1, m_i, m_j,
    CAUSAL: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # of keys
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    STAGES: tl.constexpr,  # blocks of keys on the chip at once
):  # fmt: skip
    z, i = place(blocks, BM)
    key_blocks = tl.cdiv(keys, BN)
    k_ptr += z * key_blocks * (3 * BN * BD)
    v_ptr += z * key_blocks * (3 * BN * BV)
    mask_ptr = moved(mask_ptr, z, heads, m_0, m_1)
    weights_ptr += z * queries * keys

    q = _load_parts(q_ptr + tl.program_id(0).to(tl.int64) * (3 * BM * BD), BM, BD)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BV], tl.float32)
    last = key_blocks  # from here on no key weighs anything for any of these queries
    if CAUSAL:
        last = tl.minimum(key_blocks, tl.cdiv((tl.program_id(0) % blocks + 1) * BM, BN))
    if ONE_BLOCK:
        j = tl.arange(0, BN)
        s = _scores(q, k_ptr, mask_ptr, m_i, m_j, scale, i, j, queries, keys,
                    CAUSAL, BM, BN, BD)  # fmt: skip
        m, total = softmax_step(s, m, total)
        m = tl.where(m == float("-inf"), 0.0, m)
        out = _weigh(s, m, 1.0 / total, out, weights_ptr, v_ptr, i, j, queries, keys, BN, BV)
    else:
        for block in tl.range(0, last, num_stages=STAGES):
            j = block * BN + tl.arange(0, BN)
            s = _scores(q, k_ptr + block * (3 * BN * BD), mask_ptr, m_i, m_j, scale,
                        i, j, queries, keys, CAUSAL, BM, BN, BD)  # fmt: skip
            m, total = softmax_step(s, m, total)
        m = tl.where(m == float("-inf"), 0.0, m)
        inverse = 1.0 / total
        for block in tl.range(0, last, num_stages=STAGES):
            j = block * BN + tl.arange(0, BN)
            s = _scores(q, k_ptr + block * (3 * BN * BD), mask_ptr, m_i, m_j, scale,
                        i, j, queries, keys, CAUSAL, BM, BN, BD)  # fmt: skip
            out = _weigh(s, m, inverse, out, weights_ptr, v_ptr + block * (3 * BN * BV),
                         i, j, queries, keys, BN, BV)  # fmt: skip
        if CAUSAL:
            store_rest(weights_ptr, total, i, last * BN, queries, keys, BM, BN)
    store_rows(output_ptr, z * queries * value_width, out, i, queries, value_width, BV)
