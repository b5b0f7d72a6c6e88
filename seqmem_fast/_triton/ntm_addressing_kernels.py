"""NTM addressing and writing on chip: the parts that functionals and sequence share, and kernels.

A row's memory is one block [BN, BW] in registers, N slots and M values padded to powers of two; a
vector over slots is [BN]. Slots past N weigh nothing. Letters and formulas:
reference/ntm_addressing.py, and for the backward csrc/autograd/ntm_addressing.cpp.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .machine_kernels import block_of, content_backward, similarity, softmax_of

VARYING = ("count",)


@triton.jit
def _moved(x, by, slots, BN: tl.constexpr):
    """y_i = x_(i - by) around N slots, |by| <= N."""
    n = tl.arange(0, BN)
    at = n - by
    at = tl.where(at < 0, at + slots, at)
    at = tl.where(at >= slots, at - slots, at)
    return tl.where(n < slots, tl.gather(x, tl.where(n < slots, at, 0), 0), 0.0)


@triton.jit
def _element(x, k, BS: tl.constexpr):
    """x[k] of a vector [BS]."""
    return tl.sum(tl.where(tl.arange(0, BS) == k, x, 0.0), axis=0)


@triton.jit
def gated(content, gate, prev):
    return prev + gate * (content - prev)


@triton.jit
def shifted(u, shift, taps, slots, BN: tl.constexpr, BS: tl.constexpr):
    """Equation 8; tap j moves by j - r."""
    v = tl.zeros_like(u)
    for j in range(taps):
        v += _element(shift, j, BS) * _moved(u, j - taps // 2, slots, BN)
    return v


@triton.jit
def sharpened(v, gamma):
    """Equation 9, and log v with 0 where v <= 0: such slots stay at zero and get no gradient."""
    some = (v <= 0.0) == 0
    log = tl.log(tl.where(some, v, 1.0))
    y = tl.where(some, gamma * log, float("-inf"))
    top = tl.max(y, axis=0)
    e = tl.exp(y - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(e, axis=0)
    return e / tl.where(total == 0.0, 1.0, total), log


@triton.jit
def sharpened_backward(dw, v, w, log, gamma):
    """Gradients of v and gamma."""
    dz = w * (dw - tl.sum(dw * w, axis=0))
    some = (v <= 0.0) == 0
    return tl.where(some, gamma * dz / tl.where(some, v, 1.0), 0.0), tl.sum(dz * log, axis=0)


@triton.jit
def shifted_backward(dv, u, shift, taps, slots, BN: tl.constexpr, BS: tl.constexpr):
    """Gradients of u and shift."""
    du = tl.zeros_like(dv)
    ds = tl.zeros_like(shift)
    for j in range(taps):
        by = j - taps // 2
        du += _element(shift, j, BS) * _moved(dv, -by, slots, BN)
        part = tl.sum(dv * _moved(u, by, slots, BN), axis=0)
        ds += tl.where(tl.arange(0, BS) == j, part, 0.0)
    return du, ds


@triton.jit
def written(memory, w, erase, add):
    """Equations 3 and 4."""
    return memory * (1.0 - w[:, None] * erase[None, :]) + w[:, None] * add[None, :]


@triton.jit
def written_backward(d_new, memory, w, erase, add):
    """Gradients of memory, weights, erase and add."""
    dw = tl.sum(d_new * (add[None, :] - memory * erase[None, :]), axis=1)
    d_erase = -tl.sum(w[:, None] * memory * d_new, axis=0)
    d_add = tl.sum(w[:, None] * d_new, axis=0)
    return d_new * (1.0 - w[:, None] * erase[None, :]), dw, d_erase, d_add


@triton.jit(do_not_specialize=VARYING)
def ntm_address(
    memory_ptr,  # [B, N, M]
    key_ptr,  # [B, H, M]
    beta_ptr,  # [B, H]
    gate_ptr,  # [B, H], or None and the rest too: content addressing
    shift_ptr,  # [B, H, S]
    gamma_ptr,  # [B, H]
    prev_ptr,  # [B, H, N]
    weights_ptr,  # [B, H, N]
    count,  # H
    slots, width, taps,
    ACC: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One head of one row."""
    at = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    m = tl.arange(0, BW)
    there = n < slots
    block, inside = block_of(memory_ptr + at // count * slots * width, slots, width, BN, BW)
    memory = tl.load(block, mask=inside, other=0.0).to(ACC)
    key = tl.load(key_ptr + at * width + m, mask=m < width, other=0.0).to(ACC)
    K, _norms, _key_norm = similarity(memory, key)
    w = softmax_of(tl.load(beta_ptr + at).to(ACC) * K, there)
    if gate_ptr is not None:
        prev = tl.load(prev_ptr + at * slots + n, mask=there, other=0.0).to(ACC)
        s = tl.arange(0, BS)
        shift = tl.load(shift_ptr + at * taps + s, mask=s < taps, other=0.0).to(ACC)
        u = gated(w, tl.load(gate_ptr + at).to(ACC), prev)
        v = shifted(u, shift, taps, slots, BN, BS)
        w, _log = sharpened(v, tl.load(gamma_ptr + at).to(ACC))
    tl.store(weights_ptr + at * slots + n, w.to(weights_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=VARYING)
def ntm_address_backward(
    grad_ptr,  # [B, H, N]
    memory_ptr, key_ptr, beta_ptr, gate_ptr, shift_ptr, gamma_ptr, prev_ptr,
    # The gradients, dense, as what they belong to.
    d_memory_ptr, d_key_ptr, d_beta_ptr, d_gate_ptr, d_shift_ptr, d_gamma_ptr, d_prev_ptr,
    count, slots, width, taps,
    ACC: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """All heads of one row, in order: the memory's gradient is their sum."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    m = tl.arange(0, BW)
    s = tl.arange(0, BS)
    there = n < slots
    block, inside = block_of(memory_ptr + b * slots * width, slots, width, BN, BW)
    memory = tl.load(block, mask=inside, other=0.0).to(ACC)
    d_memory = tl.zeros([BN, BW], ACC)
    out = d_key_ptr.dtype.element_ty
    for h in range(count):
        at = b * count + h
        key = tl.load(key_ptr + at * width + m, mask=m < width, other=0.0).to(ACC)
        beta = tl.load(beta_ptr + at).to(ACC)
        dw = tl.load(grad_ptr + at * slots + n, mask=there, other=0.0).to(ACC)
        K, norms, key_norm = similarity(memory, key)
        c = softmax_of(beta * K, there)
        if gate_ptr is not None:
            prev = tl.load(prev_ptr + at * slots + n, mask=there, other=0.0).to(ACC)
            shift = tl.load(shift_ptr + at * taps + s, mask=s < taps, other=0.0).to(ACC)
            gate = tl.load(gate_ptr + at).to(ACC)
            gamma = tl.load(gamma_ptr + at).to(ACC)
            u = gated(c, gate, prev)
            v = shifted(u, shift, taps, slots, BN, BS)
            w, log = sharpened(v, gamma)
            dv, d_gamma = sharpened_backward(dw, v, w, log, gamma)
            du, d_shift = shifted_backward(dv, u, shift, taps, slots, BN, BS)
            tl.store(d_gamma_ptr + at, d_gamma.to(out))
            tl.store(d_shift_ptr + at * taps + s, d_shift.to(out), mask=s < taps)
            tl.store(d_gate_ptr + at, tl.sum(du * (c - prev), axis=0).to(out))
            tl.store(d_prev_ptr + at * slots + n, ((1.0 - gate) * du).to(out), mask=there)
            dw = gate * du
        part, d_key, d_beta = content_backward(dw, c, K, norms, key_norm, beta, memory, key)
        d_memory += part
        tl.store(d_key_ptr + at * width + m, d_key.to(out), mask=m < width)
        tl.store(d_beta_ptr + at, d_beta.to(out))
    to, inside = block_of(d_memory_ptr + b * slots * width, slots, width, BN, BW)
    tl.store(to, d_memory.to(out), mask=inside)


@triton.jit
def _head(weights_ptr, erase_ptr, add_ptr, at, slots, width, ACC: tl.constexpr,
          BN: tl.constexpr, BW: tl.constexpr):  # fmt: skip
    n = tl.arange(0, BN)
    m = tl.arange(0, BW)
    w = tl.load(weights_ptr + at * slots + n, mask=n < slots, other=0.0).to(ACC)
    erase = tl.load(erase_ptr + at * width + m, mask=m < width, other=0.0).to(ACC)
    add = tl.load(add_ptr + at * width + m, mask=m < width, other=0.0).to(ACC)
    return w, erase, add


@triton.jit(do_not_specialize=VARYING)
def ntm_write_heads(
    memory_ptr,  # [B, N, M]
    weights_ptr,  # [B, H, N]
    erase_ptr,  # [B, H, M]
    add_ptr,  # [B, H, M]
    new_ptr,  # [B, N, M]
    count, slots, width,
    ACC: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    block, inside = block_of(memory_ptr + b * slots * width, slots, width, BN, BW)
    memory = tl.load(block, mask=inside, other=0.0).to(ACC)
    for h in range(count):
        w, erase, add = _head(
            weights_ptr, erase_ptr, add_ptr, b * count + h, slots, width, ACC, BN, BW
        )
        memory = written(memory, w, erase, add)
    to, inside = block_of(new_ptr + b * slots * width, slots, width, BN, BW)
    tl.store(to, memory.to(new_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def ntm_write_heads_backward(
    grad_ptr,  # [B, N, M]
    memory_ptr,  # [B, N, M]
    weights_ptr,  # [B, H, N]
    erase_ptr,  # [B, H, M]
    add_ptr,  # [B, H, M]
    d_memory_ptr,
    d_weights_ptr,
    d_erase_ptr,
    d_add_ptr,
    count, slots, width,
    ACC: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Heads in reverse, each with the memory that it met, written anew from the first."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    m = tl.arange(0, BW)
    out = d_weights_ptr.dtype.element_ty
    block, inside = block_of(memory_ptr + b * slots * width, slots, width, BN, BW)
    grad_block, inside = block_of(grad_ptr + b * slots * width, slots, width, BN, BW)
    grad = tl.load(grad_block, mask=inside, other=0.0).to(ACC)
    for back in range(count):
        h = count - 1 - back
        memory = tl.load(block, mask=inside, other=0.0).to(ACC)
        for before in range(h):
            w, erase, add = _head(
                weights_ptr, erase_ptr, add_ptr, b * count + before, slots, width, ACC, BN, BW
            )
            memory = written(memory, w, erase, add)
        at = b * count + h
        w, erase, add = _head(weights_ptr, erase_ptr, add_ptr, at, slots, width, ACC, BN, BW)
        grad, dw, d_erase, d_add = written_backward(grad, memory, w, erase, add)
        tl.store(d_weights_ptr + at * slots + n, dw.to(out), mask=n < slots)
        tl.store(d_erase_ptr + at * width + m, d_erase.to(out), mask=m < width)
        tl.store(d_add_ptr + at * width + m, d_add.to(out), mask=m < width)
    to, inside = block_of(d_memory_ptr + b * slots * width, slots, width, BN, BW)
    tl.store(to, grad.to(out), mask=inside)
