"""Softmax and entmax of rows that come block by block: what entmax.py and attention share.

Entmax finds its threshold by Newton's method from the left. alpha = 2 and 1.5 have products for
powers; any other finds it in float64, as near 1 the powers multiply each rounding error.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import softmax_step, softmax_weights

# Kinds of normalisers; alpha is 1 + KIND / 2 but for the last.
SOFTMAX: tl.constexpr = tl.constexpr(0)
ENTMAX15: tl.constexpr = tl.constexpr(1)
SPARSEMAX: tl.constexpr = tl.constexpr(2)
ANY: tl.constexpr = tl.constexpr(3)


def kind_of(alpha: float) -> tl.constexpr:
    return {1.0: SOFTMAX, 1.5: ENTMAX15, 2.0: SPARSEMAX}.get(alpha, ANY)


def of_normalizer(alpha: float, like: Tensor) -> dict[str, Any]:
    """What a kernel of attention takes; an argument of float64 would be rounded to float32."""
    kind = kind_of(alpha)
    given = like.new_full((1,), alpha, dtype=torch.float64) if kind == ANY else None
    return {"alpha_ptr": given, "KIND": kind.value}


@triton.jit
def powers(above, supported, power, KIND: tl.constexpr):
    """above^power and its derivative over `power`; 0 outside the support."""
    inside = tl.where(supported, above, 0.0)
    if KIND == SPARSEMAX:
        slope = tl.where(supported, inside * 0.0 + 1.0, 0.0)
        p = inside
    elif KIND == ENTMAX15:
        slope = inside
        p = inside * inside
    else:
        slope = tl.exp((power - 1.0) * tl.log(tl.where(supported, above, 1.0)))
        slope = tl.where(supported, slope, 0.0)
        p = inside * slope
    return p, slope


@triton.jit
def newton_step(total, slope, scale, finite, KIND: tl.constexpr):
    """Newton's, for the norm total^(alpha - 1) = 1; nowhere does it divide by zero or infinity."""
    total = tl.where(finite, total, 1.0)
    if KIND == SPARSEMAX:
        root = total * 0.0 + 1.0
    elif KIND == ENTMAX15:
        root = tl.sqrt(total)
    else:
        root = tl.exp((1.0 - scale) * tl.log(total))
    return (total - root) / tl.where(finite, slope, 1.0)


@triton.jit
def any_lane(condition, BLOCK: tl.constexpr):
    """The same answer in all lanes, whose sums may differ in the last bit: a multiplication before
    a lane's own addend is fused with the addition, one before another lane's is not."""
    return tl.max(tl.zeros([BLOCK], tl.int32) + condition.to(tl.int32), axis=0) > 0


@triton.jit
def slopes_of(p, alpha, KIND: tl.constexpr):
    """p^(2 - alpha), 0 outside the support; NaN where p is."""
    outside = p <= 0.0
    if KIND == SPARSEMAX:
        s = p - p + 1.0
    elif KIND == ENTMAX15:
        s = tl.sqrt(p)
    else:
        s = tl.exp((2.0 - alpha) * tl.log(tl.where(outside, 1.0, p)))
    return tl.where(outside, 0.0, s)


# ---- of attention: rows of scores [BM, BN], -inf where a query does not see a key ----------------
#
# Each row has a state of two numbers. Softmax's: its highest score and the sum of exponentials.
# Entmax's starts as the same, by which NaN, infinity and rows without a key are known; the second
# number then becomes the threshold.


@triton.jit
def alpha_of(alpha_ptr, KIND: tl.constexpr):
    if KIND == ANY:
        alpha = tl.load(alpha_ptr)
    else:
        alpha = 1.0 + 0.5 * KIND
    return alpha


@triton.jit
def as_powers(x, KIND: tl.constexpr):
    """In the type that powers are computed in."""
    if KIND == ANY:
        x = x.to(tl.float64)
    return x


@triton.jit
def add_scores(s, a, b, top, tau, alpha, KIND: tl.constexpr):
    """a and b once a block of scores is added: softmax's state or, where there is a threshold tau,
    the sums of entmax's powers and of their slopes."""
    if tau is None:
        a, b = softmax_step(s, a, b)
    else:
        x = (as_powers(s, KIND) - top[:, None]) * (alpha - 1.0)
        p, slope = powers(x - tau[:, None], x > tau[:, None], 1.0 / (alpha - 1.0), KIND)
        a += tl.sum(p, axis=1)
        b += tl.sum(slope, axis=1)
    return a, b


@triton.jit
def before_threshold(top, KIND: tl.constexpr):
    """The highest scores, a threshold below all and the next one, in the type of powers."""
    top = as_powers(top, KIND)
    tau = tl.zeros_like(top) - 2.0
    return top, tau, tau + 1.0


@triton.jit
def next_threshold(tau, total, slope, z, alpha, KIND: tl.constexpr):
    """tau where the row has no threshold: softmax's sum z is NaN, or 0 without a key."""
    finite = z > 0.0
    return tl.where(finite, tau + newton_step(total, slope, alpha - 1.0, finite, KIND), tau)


@triton.jit
def any_row_climbs(next, tau, BN: tl.constexpr):
    """The same answer in all lanes, as `any_lane` has it; of rows whose numbers lie in several."""
    lanes = tl.zeros([tau.shape[0], BN], tl.int32) + (next > tau).to(tl.int32)[:, None]
    return tl.max(tl.max(lanes, axis=1), axis=0) > 0


@triton.jit
def last_threshold(tau, z):
    return tl.where(z > 0.0, tau, tl.where(z == 0.0, float("inf"), float("nan")))


@triton.jit
def state_of(SCAN: tl.constexpr, seen, alpha, SCALE: tl.constexpr, ACC: tl.constexpr,
             PRECISION: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             BD: tl.constexpr):  # fmt: skip
    """The state of BM rows; SCAN is `add_scores` of all keys, which the tuple `seen` describes."""
    top = tl.full([BM], float("-inf"), ACC)
    z = tl.zeros([BM], ACC)
    top, z = SCAN(top, z, None, None, seen, alpha, SCALE, ACC, PRECISION, KIND, BN, BD)
    if KIND == SOFTMAX:
        z = tl.where(z == 0.0, 1.0, z)  # of a query that sees no key
    else:
        highest, tau, next = before_threshold(top, KIND)
        while any_row_climbs(next, tau, BN):
            tau = tl.maximum(tau, next)
            none = tau * 0.0
            above, slopes = SCAN(
                none, none, highest, tau, seen, alpha, SCALE, ACC, PRECISION, KIND, BN, BD
            )
            next = next_threshold(tau, above, slopes, z, alpha, KIND)
        z = last_threshold(next, z)
    return top, z


@triton.jit
def weights_of(s, seen, top, z, alpha, KIND: tl.constexpr):
    """From a row's state; zero where a query does not see a key."""
    if KIND == SOFTMAX:
        w = softmax_weights(s, top, z)
    else:
        x = (as_powers(s, KIND) - as_powers(top, KIND)[:, None]) * (alpha - 1.0)
        tau = z[:, None]
        p, _ = powers(x - tau, x > tau, 1.0 / (alpha - 1.0), KIND)
        w = tl.where(tau == tau, p, tau).to(s.dtype)
    return tl.where(seen, w, 0.0)


@triton.jit
def weight_slopes(w, alpha, KIND: tl.constexpr):
    """s of dS = s (P - delta), with delta = rowsum(s P) / rowsum(s)."""
    s = w
    if KIND == ANY:
        s = slopes_of(w, alpha.to(w.dtype), KIND)
    elif KIND != SOFTMAX:
        s = slopes_of(w, alpha, KIND)
    return s


@triton.jit
def delta_of(dot, total, KIND: tl.constexpr):
    """From rowsum(s P) and rowsum(s), which is 1 for softmax."""
    if KIND != SOFTMAX:
        dot = tl.where(total == 0.0, 0.0, dot / tl.where(total == 0.0, 1.0, total))
    return dot
