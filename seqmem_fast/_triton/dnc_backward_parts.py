"""Gradients of the steps of a DNC in one row's program; dnc_backward_kernels.py.

"dq" is the gradient of the head values: what is stored there goes through their squashing.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import sigmoid
from .dnc_parts import (
    NORM_EPSILON,
    SHARPEN_FLOOR,
    USAGE_FLOOR,
    links_after,
    masked_key,
    mean_of,
    product,
)
from .machine_kernels import softmax_of, softplus, vector


@triton.jit
def rewritten(memory, kept, w_ptr, erase_ptr, add_ptr, writes, slots, width,
              SQUASH: tl.constexpr, DEALLOCATE: tl.constexpr, ACC: tl.constexpr,
              BN: tl.constexpr, BW: tl.constexpr):  # fmt: skip
    """The memory after a step's writes."""
    memory = memory * erased(
        kept, w_ptr, erase_ptr, -1, writes, slots, width, DEALLOCATE, ACC, BN, BW
    )
    n = tl.arange(0, BN)
    for h in tl.range(0, writes, disable_licm=True):
        w = tl.load(w_ptr + h * slots + n, mask=n < slots, other=0.0)
        memory += w[:, None] * vector(add_ptr + h * width, width, SQUASH, BW)[None, :]
    return memory


@triton.jit
def erased(kept, w_ptr, erase_ptr, without, writes, slots, width, DEALLOCATE: tl.constexpr,
           ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):  # fmt: skip
    """What the memory is multiplied by, but for the head `without`."""
    n = tl.arange(0, BN)
    m = tl.arange(0, BW)
    factor = tl.full([BN, BW], 1.0, ACC)
    if DEALLOCATE:
        factor *= kept[:, None]
    for h in tl.range(0, writes, disable_licm=True):
        w = tl.load(w_ptr + h * slots + n, mask=(n < slots) & (h != without), other=0.0)
        erase = sigmoid(tl.load(erase_ptr + h * width + m, mask=m < width, other=0.0))
        factor *= 1.0 - w[:, None] * erase[None, :]
    return factor


@triton.jit
def unfreed(read_ptr, free_ptr, without, reads, slots, ACC: tl.constexpr, BN: tl.constexpr):
    """psi [BN], but for the read head `without`."""
    n = tl.arange(0, BN)
    kept = tl.full([BN], 1.0, ACC)
    for r in tl.range(0, reads, disable_licm=True):
        w = tl.load(read_ptr + r * slots + n, mask=(n < slots) & (r != without), other=0.0)
        kept *= 1.0 - sigmoid(tl.load(free_ptr + r)) * w
    return kept


@triton.jit
def unwritten(w_ptr, without, writes, slots, ACC: tl.constexpr, BN: tl.constexpr):
    """prod (1 - w) [BN], but for the write head `without`."""
    n = tl.arange(0, BN)
    rest = tl.full([BN], 1.0, ACC)
    for h in tl.range(0, writes, disable_licm=True):
        rest *= 1.0 - tl.load(w_ptr + h * slots + n, mask=(n < slots) & (h != without), other=0.0)
    return rest


@triton.jit
def content_backward(dc, memory, raw_key_ptr, raw_strength_ptr, raw_mask_ptr, dq_key_ptr,
                      dq_strength_ptr, dq_mask_ptr, slots, width, SQUASH: tl.constexpr,
                      MASKS: tl.constexpr, STRENGTH: tl.constexpr, NORM_FLOOR: tl.constexpr,
                      EPS: tl.constexpr, MASK_MIN: tl.constexpr, BN: tl.constexpr,
                      BW: tl.constexpr):  # fmt: skip
    """Gradient of the memory [BN, BW]; those of the head's values are stored."""
    m = tl.arange(0, BW)
    there = tl.arange(0, BN) < slots
    plain = vector(raw_key_ptr, width, SQUASH, BW)
    mask, key = masked_key(plain, raw_mask_ptr, width, MASKS, MASK_MIN, BW)
    if MASKS:
        squares = tl.sum(memory * memory * (mask * mask)[None, :], axis=1)
    else:
        squares = tl.sum(memory * memory, axis=1)
    norms = tl.sqrt(squares + NORM_FLOOR)
    key_norm = tl.sqrt(tl.sum(key * key, axis=0) + NORM_FLOOR)
    whole = norms * key_norm + EPS
    similar = tl.sum(memory * (key * mask)[None, :], axis=1) / whole
    raw_strength = tl.load(raw_strength_ptr)
    beta = STRENGTH + softplus(raw_strength)
    c = softmax_of(beta * similar, there)
    dy = tl.where(there, c * (dc - tl.sum(tl.where(there, dc * c, 0.0), axis=0)), 0.0)
    tl.store(dq_strength_ptr, tl.sum(dy * similar, axis=0) * sigmoid(raw_strength))
    d_dots = beta * dy / whole
    d_whole = tl.where(there, -d_dots * similar, 0.0)
    # A norm of zero has no gradient.
    of_square = tl.where(norms == 0.0, 0.0, d_whole * key_norm / tl.where(norms == 0.0, 1.0, norms))
    of_key = tl.sum(d_whole * norms, axis=0)
    of_key = tl.where(key_norm == 0.0, 0.0, of_key / tl.where(key_norm == 0.0, 1.0, key_norm))
    pull = tl.sum(d_dots[:, None] * memory, axis=0)
    d_key = pull * mask + of_key * key
    if MASKS:
        d_mask = pull * key + mask * tl.sum(of_square[:, None] * memory * memory, axis=0)
        d_mask += d_key * plain
        s = sigmoid(tl.load(raw_mask_ptr + m, mask=m < width, other=0.0))
        tl.store(dq_mask_ptr + m, d_mask * (1.0 - MASK_MIN) * s * (1.0 - s), mask=m < width)
        d_key *= mask
    if SQUASH:
        d_key *= 1.0 - plain * plain
    tl.store(dq_key_ptr + m, d_key, mask=m < width)
    return (
        d_dots[:, None] * (key * mask)[None, :]
        + of_square[:, None] * memory * (mask * mask)[None, :]
    )


@triton.jit
def direction_backward(ptr, dw, mode, sharpness_ptr, to_ptr, slots, SHARPEN: tl.constexpr,
                        BN: tl.constexpr):  # fmt: skip
    """Of a direction [N] at `ptr`: its gradient [N] at `to_ptr`; those of mode and sharpness."""
    n = tl.arange(0, BN)
    there = n < slots
    d = tl.load(ptr + n, mask=there, other=0.0)
    of_sharpness = tl.sum(tl.zeros([BN], d.dtype), axis=0)
    if SHARPEN:
        top = tl.max(tl.where(there, d, float("-inf")), axis=0)
        scale = tl.where(top <= 0.0, 0.0, 1.0 / tl.where(top <= 0.0, 1.0, top))
        scaled = d * scale
        clamped = tl.where(scaled < 0.0, 0.0, scaled)
        raw = tl.load(sharpness_ptr)
        log = tl.log(clamped + SHARPEN_FLOOR)
        power = 1.0 + softplus(raw)
        y = softmax_of(power * log, there)
        of_mode = tl.sum(dw * y, axis=0)
        dz = mode * y * (dw - of_mode)
        of_sharpness = tl.sum(dz * log, axis=0) * sigmoid(raw)
        d_scaled = tl.where(scaled < 0.0, 0.0, power * dz / (clamped + SHARPEN_FLOOR))
        largest = there & (d == top)
        share = tl.sum(d_scaled * scaled, axis=0) / tl.sum(largest.to(d.dtype), axis=0)
        grad = scale * (d_scaled - tl.where(largest, share, 0.0))
    else:
        of_mode = tl.sum(dw * d, axis=0)
        grad = mode * dw
    tl.store(to_ptr + n, grad, mask=there)
    return of_mode, of_sharpness


@triton.jit
def allocation_backward(da, a, u, scratch_ptr, slots, BN: tl.constexpr, BI: tl.constexpr):
    """dv_i = (sum of da_k a_k over the k that come after i) / v_i - da_i P_i, of usage.

    v is at least its floor: where a product has underflowed, so has what is divided.
    """
    j = tl.arange(0, BN)
    there = j < slots
    v = USAGE_FLOOR + (1.0 - USAGE_FLOOR) * u
    tl.debug_barrier()
    tl.store(scratch_ptr + j, v, mask=there)
    tl.debug_barrier()
    share = tl.where(there, da * a, 0.0)
    for start in tl.range(0, BN, BI, disable_licm=True):
        i = start + tl.arange(0, BI)
        v_i = tl.load(scratch_ptr + i, mask=i < slots, other=1.0)
        same = v[None, :] == v_i[:, None]
        first = (v[None, :] < v_i[:, None]) | (same & (j[None, :] < i[:, None]))
        after = (v[None, :] > v_i[:, None]) | (same & (j[None, :] > i[:, None]))
        before = tl.reduce(tl.where(first & there[None, :], v[None, :], 1.0), 1, product)
        behind = tl.sum(tl.where(after, share[None, :], 0.0), axis=1)
        tl.store(scratch_ptr + BN + i, behind / v_i)
        tl.store(scratch_ptr + 2 * BN + i, before)
    tl.debug_barrier()
    dv = tl.load(scratch_ptr + BN + j) - da * tl.load(scratch_ptr + 2 * BN + j)
    return tl.where(there, (1.0 - USAGE_FLOOR) * dv, 0.0)


@triton.jit
def links_backward(d_link_ptr, link_ptr, precedence_ptr, w_ptr, read_ptr, d_direction_ptr,
                    d_along_ptr, d_across_ptr, d_rows_ptr, slots, reads, ACC: tl.constexpr,
                    BN: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    """One write head's d_link in place; gradients [BN] of its weights (by columns) and precedence.

    Those of the weights by rows come to `d_rows_ptr` [N], of the read weights before the step, in
    two parts, are added to `d_along_ptr` and `d_across_ptr` [R, N].
    """
    j = tl.arange(0, BN)
    there = j < slots
    since = tl.load(w_ptr + j, mask=there, other=0.0)
    p = tl.load(precedence_ptr + j, mask=there, other=0.0)
    for r in tl.range(0, reads, disable_licm=True):
        d_back = tl.load(d_direction_ptr + 2 * r * slots + j, mask=there, other=0.0)
        sums = tl.zeros([BI, BN], ACC)  # by rows in the end alone
        for start in tl.range(0, slots, BI, disable_licm=True):
            i = start + tl.arange(0, BI)
            rows = i < slots
            _block, _inside, _before, link = links_after(
                link_ptr, precedence_ptr, w_ptr, start, slots, BN, BI
            )
            d_ahead = tl.load(d_direction_ptr + (2 * r + 1) * slots + i, mask=rows, other=0.0)
            sums += link * d_ahead[:, None]
            to = d_across_ptr + r * slots + i
            of_across = tl.load(to, mask=rows) + tl.sum(link * d_back[None, :], axis=1)
            tl.debug_barrier()  # several threads load what one stores
            tl.store(to, of_across, mask=rows)
        at = d_along_ptr + r * slots + j
        of_along = tl.load(at, mask=there) + tl.sum(sums, axis=0)
        tl.debug_barrier()  # as above
        tl.store(at, of_along, mask=there)
    of_since = tl.zeros([BI, BN], ACC)
    of_p = tl.zeros([BI, BN], ACC)
    for start in tl.range(0, slots, BI, disable_licm=True):
        i = start + tl.arange(0, BI)
        rows = i < slots
        block = i[:, None] * slots + j[None, :]
        inside = rows[:, None] & there[None, :]
        before = tl.load(link_ptr + block, mask=inside, other=0.0)
        d_link = tl.load(d_link_ptr + block, mask=inside, other=0.0)
        for r in tl.range(0, reads, disable_licm=True):
            along = tl.load(read_ptr + r * slots + j, mask=there, other=0.0)
            across = tl.load(read_ptr + r * slots + i, mask=rows, other=0.0)
            d_back = tl.load(d_direction_ptr + 2 * r * slots + j, mask=there, other=0.0)
            d_ahead = tl.load(d_direction_ptr + (2 * r + 1) * slots + i, mask=rows, other=0.0)
            d_link += d_ahead[:, None] * along[None, :] + across[:, None] * d_back[None, :]
        d_link = tl.where((i[:, None] != j[None, :]) & inside, d_link, 0.0)
        w = tl.load(w_ptr + i, mask=rows, other=0.0)
        tl.store(d_rows_ptr + i, tl.sum(d_link * (p[None, :] - before), axis=1), mask=rows)
        of_since += d_link * before
        of_p += d_link * w[:, None]
        d_link = (1.0 - w[:, None] - since[None, :]) * d_link
        tl.debug_barrier()
        tl.store(d_link_ptr + block, d_link, mask=inside)
    d_since, d_p = -tl.sum(of_since, axis=0), tl.sum(of_p, axis=0)
    return d_since, d_p


@triton.jit
def next_links(link_ptr, next_ptr, precedence_ptr, w_ptr, slots, BN: tl.constexpr,
                BI: tl.constexpr):  # fmt: skip
    """One write head's links [N, N] after a step."""
    for start in tl.range(0, slots, BI, disable_licm=True):
        block, inside, _before, link = links_after(
            link_ptr, precedence_ptr, w_ptr, start, slots, BN, BI
        )
        tl.store(next_ptr + block, link, mask=inside)


@triton.jit
def normalised_backward(dq, dp, raw, weight_ptr, values, ACC: tl.constexpr, BC: tl.constexpr):
    """Layer norm: from the gradient dq [P] of its result to dp [P] of `raw`."""
    mean = mean_of(raw, values, ACC, BC)
    squares = tl.zeros([BC], ACC)
    plain = tl.zeros([BC], ACC)
    along = tl.zeros([BC], ACC)
    for start in tl.range(0, values, BC, disable_licm=True):
        o = start + tl.arange(0, BC)
        off = tl.where(o < values, tl.load(raw + o, mask=o < values, other=0.0) - mean, 0.0)
        grad = tl.load(dq + o, mask=o < values, other=0.0)
        grad *= tl.load(weight_ptr + o, mask=o < values, other=0.0)
        squares += off * off
        plain += grad
        along += grad * off
    scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / values + NORM_EPSILON)
    of_mean = tl.sum(plain, axis=0) / values
    of_scale = tl.sum(along, axis=0) * scale * scale / values
    for start in tl.range(0, values, BC, disable_licm=True):
        o = start + tl.arange(0, BC)
        off = tl.load(raw + o, mask=o < values, other=0.0) - mean
        grad = tl.load(dq + o, mask=o < values, other=0.0)
        grad *= tl.load(weight_ptr + o, mask=o < values, other=0.0)
        tl.store(dp + o, scale * (grad - of_mean - off * of_scale), mask=o < values)


@triton.jit
def entering(first_ptr, trace_ptr, initial_ptr, to_ptr, count, first, follows, cut,
              BC: tl.constexpr):  # fmt: skip
    """What a step starts from: of the first state, of the step before, or of a reset."""
    for start in tl.range(0, count, BC, disable_licm=True):
        k = start + tl.arange(0, BC)
        value = tl.load(first_ptr + k, mask=(k < count) & first, other=0.0)
        value = value.to(to_ptr.dtype.element_ty)
        before = tl.load(trace_ptr + k, mask=(k < count) & follows, other=0.0)
        value += before.to(to_ptr.dtype.element_ty)
        if initial_ptr is not None:
            value += tl.load(initial_ptr + k, mask=(k < count) & cut, other=0.0)
        tl.store(to_ptr + k, value, mask=k < count)


@triton.jit
def zero(ptr, count, BC: tl.constexpr):
    for start in tl.range(0, count, BC, disable_licm=True):
        k = start + tl.arange(0, BC)
        tl.store(ptr + k, tl.zeros([BC], ptr.dtype.element_ty), mask=k < count)
