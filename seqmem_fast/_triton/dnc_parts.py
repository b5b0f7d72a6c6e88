"""The steps of a DNC in one row's program that forward and backward share; dnc_kernels.py."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ..reference.dnc import NORM_EPSILON as _NORM_EPSILON
from ..reference.dnc import SHARPEN_FLOOR as _SHARPEN_FLOOR
from ..reference.dnc import USAGE_FLOOR as _USAGE_FLOOR
from .common import sigmoid
from .machine_kernels import softmax_of, softplus

USAGE_FLOOR = tl.constexpr(_USAGE_FLOOR)
SHARPEN_FLOOR = tl.constexpr(_SHARPEN_FLOOR)
NORM_EPSILON = tl.constexpr(_NORM_EPSILON)


@triton.jit
def product(a, b):
    return a * b


@triton.jit
def mean_of(p, values, ACC: tl.constexpr, BC: tl.constexpr):
    total = tl.zeros([BC], ACC)
    for start in tl.range(0, values, BC, disable_licm=True):
        o = start + tl.arange(0, BC)
        total += tl.load(p + o, mask=o < values, other=0.0)
    return tl.sum(total, axis=0) / values


@triton.jit
def normalised(p, to_ptr, weight_ptr, bias_ptr, values, ACC: tl.constexpr, BC: tl.constexpr):
    """Layer norm of p [P] to `to_ptr`."""
    mean = mean_of(p, values, ACC, BC)
    total = tl.zeros([BC], ACC)
    for start in tl.range(0, values, BC, disable_licm=True):
        o = start + tl.arange(0, BC)
        off = tl.where(o < values, tl.load(p + o, mask=o < values, other=0.0) - mean, 0.0)
        total += off * off
    scale = 1.0 / tl.sqrt(tl.sum(total, axis=0) / values + NORM_EPSILON)
    for start in tl.range(0, values, BC, disable_licm=True):
        o = start + tl.arange(0, BC)
        x = (tl.load(p + o, mask=o < values, other=0.0) - mean) * scale
        x = x * tl.load(weight_ptr + o, mask=o < values, other=0.0)
        x += tl.load(bias_ptr + o, mask=o < values, other=0.0)
        tl.store(to_ptr + o, x, mask=o < values)
    tl.debug_barrier()


@triton.jit
def head_parts(reads, writes, width, MASKS: tl.constexpr, SHARPEN: tl.constexpr,
               LINKS: tl.constexpr):  # fmt: skip
    """Where the parts of the head values begin, from the second on, as `interface_parts` says."""
    read_strengths = reads * width
    write_keys = read_strengths + reads
    write_strengths = write_keys + writes * width
    erase = write_strengths + writes
    add = erase + writes * width
    free = add + writes * width
    allocation_gates = free + reads
    write_gates = allocation_gates + writes
    modes = write_gates + writes
    write_masks = modes
    if LINKS:
        write_masks += reads * (1 + 2 * writes)
    read_masks = write_masks
    sharpness = write_masks
    if MASKS:
        read_masks += writes * width
        sharpness = read_masks + reads * width
    strengths = sharpness
    if LINKS and SHARPEN:
        strengths += 2 * reads
    return (
        read_strengths, write_keys, write_strengths, erase, add, free, allocation_gates,
        write_gates, modes, write_masks, read_masks, sharpness, strengths,
    )  # fmt: skip


@triton.jit
def element(x, k, BLOCK: tl.constexpr):
    """x[k] of a vector [BLOCK]."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == k, x, 0.0), axis=0)


@triton.jit
def masked_key(key, mask_ptr, width, MASKS: tl.constexpr, MASK_MIN: tl.constexpr,
               BW: tl.constexpr):  # fmt: skip
    """A key's mask [BW], of the head values at `mask_ptr` or ones, and their product."""
    mask = tl.full([BW], 1.0, key.dtype)
    if MASKS:
        m = tl.arange(0, BW)
        s = sigmoid(tl.load(mask_ptr + m, mask=m < width, other=0.0))
        mask = MASK_MIN + (1.0 - MASK_MIN) * s
    return mask, key * mask


@triton.jit
def content_of(memory, key, strength, mask_ptr, slots, width, MASKS: tl.constexpr,
             STRENGTH: tl.constexpr, NORM_FLOOR: tl.constexpr, EPS: tl.constexpr,
             MASK_MIN: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):  # fmt: skip
    """Content weights [BN] of a key; `strength` and the mask are head values."""
    mask, key = masked_key(key, mask_ptr, width, MASKS, MASK_MIN, BW)
    if MASKS:
        squares = tl.sum(memory * memory * (mask * mask)[None, :], axis=1)
    else:
        squares = tl.sum(memory * memory, axis=1)
    dots = tl.sum(memory * (key * mask)[None, :], axis=1)
    norms = tl.sqrt(squares + NORM_FLOOR) * tl.sqrt(tl.sum(key * key, axis=0) + NORM_FLOOR)
    beta = STRENGTH + softplus(strength)
    return softmax_of(beta * (dots / (norms + EPS)), tl.arange(0, BN) < slots)


@triton.jit
def allocation(u, scratch_ptr, slots, BN: tl.constexpr, BI: tl.constexpr):
    """a_i = (1 - v_i) prod of the v_j that come before."""
    j = tl.arange(0, BN)
    v = USAGE_FLOOR + (1.0 - USAGE_FLOOR) * u
    tl.debug_barrier()
    tl.store(scratch_ptr + j, v, mask=j < slots)
    tl.debug_barrier()
    for start in tl.range(0, BN, BI, disable_licm=True):
        i = start + tl.arange(0, BI)
        v_i = tl.load(scratch_ptr + i, mask=i < slots, other=1.0)
        first = (v[None, :] < v_i[:, None]) | (
            (v[None, :] == v_i[:, None]) & (j[None, :] < i[:, None])
        )
        first = first & (j < slots)[None, :]
        before = tl.reduce(tl.where(first, v[None, :], 1.0), 1, product)
        tl.store(scratch_ptr + BN + i, (1.0 - v_i) * before)
    tl.debug_barrier()
    a = tl.load(scratch_ptr + BN + j)
    return tl.where(j < slots, a, 0.0)


@triton.jit
def links_after(link_ptr, precedence_ptr, w_ptr, start, slots, BN: tl.constexpr,
                BI: tl.constexpr):  # fmt: skip
    """A tile of rows of one write head's links [N, N]: offsets, which are in it, old and new."""
    i = start + tl.arange(0, BI)
    j = tl.arange(0, BN)
    to = tl.load(w_ptr + i, mask=i < slots, other=0.0)[:, None]
    since = tl.load(w_ptr + j, mask=j < slots, other=0.0)[None, :]
    p = tl.load(precedence_ptr + j, mask=j < slots, other=0.0)[None, :]
    block = i[:, None] * slots + j[None, :]
    inside = (i < slots)[:, None] & (j < slots)[None, :]
    link = tl.load(link_ptr + block, mask=inside, other=0.0)
    new = (1.0 - to - since) * link + to * p
    return block, inside, link, tl.where((i[:, None] != j[None, :]) & inside, new, 0.0)


@triton.jit
def directions(link_ptr, precedence_ptr, w_ptr, read_ptr, to_ptr, slots, reads,
               IN_PLACE: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    """Backward and forward weights [R, 2, N] of one write head by its new links [N, N].

    w_ptr: the head's new weights; read_ptr [R, N]: the read weights of the step before. Links and
    precedence become those after the step if IN_PLACE.
    """
    j = tl.arange(0, BN)
    there = j < slots
    if IN_PLACE:
        for start in tl.range(0, slots, BI, disable_licm=True):
            block, inside, _before, link = links_after(
                link_ptr, precedence_ptr, w_ptr, start, slots, BN, BI
            )
            tl.store(link_ptr + block, link, mask=inside)
        preceding(precedence_ptr, precedence_ptr, w_ptr, slots, BN)
        tl.debug_barrier()
    for r in tl.range(0, reads, disable_licm=True):
        along = tl.load(read_ptr + r * slots + j, mask=there, other=0.0)
        back = tl.zeros([BI, BN], to_ptr.dtype.element_ty)  # summed by rows in the end alone
        for start in tl.range(0, slots, BI, disable_licm=True):
            i = start + tl.arange(0, BI)
            if IN_PLACE:
                block = i[:, None] * slots + j[None, :]
                inside = (i < slots)[:, None] & there[None, :]
                link = tl.load(link_ptr + block, mask=inside, other=0.0)
            else:
                _block, _inside, _before, link = links_after(
                    link_ptr, precedence_ptr, w_ptr, start, slots, BN, BI
                )
            across = tl.load(read_ptr + r * slots + i, mask=i < slots, other=0.0)
            back += link * across[:, None]
            forward = tl.sum(link * along[None, :], axis=1)
            tl.store(to_ptr + (2 * r + 1) * slots + i, forward, mask=i < slots)
        tl.store(to_ptr + 2 * r * slots + j, tl.sum(back, axis=0), mask=there)
    tl.debug_barrier()


@triton.jit
def preceding(precedence_ptr, to_ptr, w_ptr, slots, BN: tl.constexpr):
    """One write head's precedence [N] after a step."""
    n = tl.arange(0, BN)
    w = tl.load(w_ptr + n, mask=n < slots, other=0.0)
    p = tl.load(precedence_ptr + n, mask=n < slots, other=0.0)
    tl.debug_barrier()  # it may be in place
    tl.store(to_ptr + n, (1.0 - tl.sum(w, axis=0)) * p + w, mask=n < slots)


@triton.jit
def direction_of(ptr, sharpness_ptr, slots, SHARPEN: tl.constexpr, BN: tl.constexpr):
    """A backward or forward weighting [BN], to the power of its sharpness where asked for."""
    n = tl.arange(0, BN)
    d = tl.load(ptr + n, mask=n < slots, other=0.0)
    if SHARPEN:
        top = tl.max(d, axis=0)
        scaled = tl.where(top <= 0.0, 0.0, d / tl.where(top <= 0.0, 1.0, top))
        # A NaN must stay one.
        scaled = tl.where(scaled < 0.0, 0.0, scaled)
        power = 1.0 + softplus(tl.load(sharpness_ptr))
        d = softmax_of(power * tl.log(scaled + SHARPEN_FLOOR), n < slots)
    return d
