"""What the kernels of attention to some of the keys share.

Rows are queries i [BM], columns keys j [BN]; `seen` says which keys a query sees.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import signed


@triton.jit
def load_rows(ptr, at, rows, known, stride, width, BLOCK: tl.constexpr):
    """[len(rows), BLOCK] of a matrix; zero in rows that are not known."""
    n = tl.arange(0, BLOCK)
    mask = known[:, None] & (n < width)[None, :]
    return tl.load(
        ptr + at + rows[:, None].to(tl.int64) * stride + n[None, :], mask=mask, other=0.0
    )


@triton.jit
def store_rows(ptr, at, value, rows, known, width, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    mask = known[:, None] & (n < width)[None, :]
    where = ptr + at + rows[:, None].to(tl.int64) * width + n[None, :]
    tl.store(where, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    if ACC == tl.float64:  # which matrix cores do not have everywhere
        found = tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        found = tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)
    return found


@triton.jit
def key_bound(ptr, b, i, queries, keys, other, EACH: tl.constexpr):
    """Of each query i, clamped to the keys."""
    at = other + i * 0
    if ptr is not None:
        if EACH:
            at = tl.load(ptr + b * queries + i, mask=i < queries, other=0)
        else:
            at = tl.load(ptr + b) + i * 0
    return tl.minimum(tl.maximum(at, 0), keys)


@triton.jit
def of_head(z, heads, stride_0, stride_1, group=1):
    """Where row and head z is, or the keys or values that it reads, a head for each group."""
    return (z // heads) * stride_0 + (z % heads // group) * stride_1


@triton.jit
def any_row(seen):
    return tl.max(seen.to(tl.int32), axis=0) > 0


@triton.jit
def is_nothing(w):
    """Where weights are zero; NaN is not. Beside zero itself, 16 bits would be compared in pairs,
    which is no faster, and which the emulated PTX does not know."""
    return w < 1.1e-38


@triton.jit
def meet_values(w, x, FACTOR: tl.constexpr):
    """Weights x as they meet the values, or the gradient x of that as it comes back: zero where the
    signed weights w are dropped."""
    if FACTOR != 1.0:
        x = tl.where(w < 0, 0.0, x * FACTOR)
    return x


@triton.jit
def with_sign(w, x, FACTOR: tl.constexpr):
    """x with the sign of w."""
    if FACTOR != 1.0:
        x = tl.where(w < 0, -x, x)
    return x


@triton.jit
def scores_of(q, k_ptr, k_at, k_t, j, seen, width, SCALE: tl.constexpr, ACC: tl.constexpr,
            PRECISION: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    k = load_rows(k_ptr, k_at, j, any_row(seen), k_t, width, BD)
    return tl.where(seen, product(q, tl.trans(k), ACC, PRECISION) * SCALE, float("-inf"))


@triton.jit
def weigh(out, w, seen, seed_ptr, row, column, weights_ptr, at, there, v_ptr, v_at, v_t, j,
          value_width, ACC: tl.constexpr, PRECISION: tl.constexpr, BELOW: tl.constexpr,
          FACTOR: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """The output once keys j are added, after dropout by row and column; their weights, zero where
    a query does not see a key, are stored `at` their places, `there`."""
    w = signed(w, seed_ptr, row[:, None], column, BELOW)
    if weights_ptr is not None:
        tl.store(weights_ptr + at, w.to(weights_ptr.dtype.element_ty), mask=there)
    v = load_rows(v_ptr, v_at, j, any_row(seen), v_t, value_width, BV)
    return out + product(meet_values(w, w, FACTOR).to(v.dtype), v, ACC, PRECISION)
