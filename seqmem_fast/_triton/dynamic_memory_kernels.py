"""Dynamic memory kernels: all hops of a batch row in one program, forward and backward.

A program keeps A and B (the memory after k hops is A * M_0 + B) and both gate matrices' products in
registers; what it reloads in each hop is the row's memory, from cache, and the two matrices.
Scores, maximum, sum and the read go over the slots once; the attention is written in a second,
light pass over scores. Formulas of the backward: csrc/autograd/dynamic_memory.cpp. Sums over the
batch (weights, a shared memory) are left to matrix products over what the kernel writes.

Letters: m slot width (BD its power of two), N slots in blocks of BN, K hops.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import sigmoid, tanh

# Sizes that change from call to call: specialising on them would only compile the same code twice.
VARYING = ("batch", "slots", "hops")


@triton.jit
def _slots(memory_ptr, mask_ptr, n, slots, width, BD: tl.constexpr, ACC: tl.constexpr):
    """[BN, BD] of a row's memory and [BN], which slots are there; what is masked reads as zero."""
    there = n < slots
    if mask_ptr is not None:
        there = there & (tl.load(mask_ptr + n, mask=there, other=0) != 0)
    d = tl.arange(0, BD)
    at = memory_ptr + n[:, None].to(tl.int64) * width + d[None, :]
    block = tl.load(at, mask=there[:, None] & (d < width)[None, :], other=0.0)
    return block.to(ACC), there


@triton.jit
def _matrix(ptr, stride, width, BD: tl.constexpr, ACC: tl.constexpr):
    """The [m, m] part of a gate's weight that multiplies the read."""
    o = tl.arange(0, BD)[:, None]
    d = tl.arange(0, BD)[None, :]
    mask = (o < width) & (d < width)
    return tl.load(ptr + o * stride + d, mask=mask, other=0.0).to(ACC)


@triton.jit(do_not_specialize=VARYING)
def dynamic_memory_forward(
    score_ptr,  # [B, m]
    memory_ptr,  # [B, N, m]
    z_ptr,  # [B, 2, m] wide: gate's and write's pre-activations without the read's part
    gate_weight_ptr,  # [m, m or more], its first m columns
    write_weight_ptr,
    mask_ptr,  # [B, N] uint8 or None
    attention_ptr,  # [K, B, N]
    scores_ptr,  # [B, N] wide, scratch
    saved_ptr,  # [K, B, 3, m] wide: gate, write, read of M_0; or None
    maps_ptr,  # [B, 2, m] wide: A and B after the last hop
    batch, slots, hops,
    memory_b,  # stride of the memory's rows, 0 where shared
    weight_t,  # from a weight's row to the next
    width,
    ACC: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    inside = d < width
    memory_ptr += b * memory_b
    scores_ptr += b * slots
    if mask_ptr is not None:
        mask_ptr += b * slots
    s = tl.load(score_ptr + b * width + d, mask=inside, other=0.0).to(ACC)
    z_gate = tl.load(z_ptr + 2 * b * width + d, mask=inside, other=0.0)
    z_write = tl.load(z_ptr + (2 * b + 1) * width + d, mask=inside, other=0.0)
    A = tl.full([BD], 1.0, ACC)
    B = tl.zeros([BD], ACC)
    to = attention_ptr + b * slots
    if saved_ptr is not None:
        saved_ptr += 3 * b * width
    for _ in range(hops):
        p = A * s
        top = tl.max(tl.full([BN], float("-inf"), ACC), axis=0)
        total = tl.sum(tl.zeros([BN], ACC), axis=0)
        u = tl.zeros([BD], ACC)
        for start in range(0, slots, BN):
            n = start + tl.arange(0, BN)
            block, there = _slots(memory_ptr, mask_ptr, n, slots, width, BD, ACC)
            e = tl.where(there, tl.sum(block * p[None, :], axis=1), float("-inf"))
            tl.store(scores_ptr + n, e, mask=n < slots)
            higher = tl.maximum(top, tl.max(e, axis=0))
            least = tl.where(higher == float("-inf"), 0.0, higher)
            share = tl.exp(top - least)
            weight = tl.exp(e - least)
            total = total * share + tl.sum(weight, axis=0)
            u = u * share + tl.sum(weight[:, None] * block, axis=0)
            top = higher
        least = tl.where(top == float("-inf"), 0.0, top)
        inverse = tl.where(total == 0.0, 0.0, 1.0 / total)  # no slot at all: nothing is read
        u = u * inverse
        tl.debug_barrier()  # scores are read by other threads than wrote them
        for start in range(0, slots, BN):
            n = start + tl.arange(0, BN)
            e = tl.load(scores_ptr + n, mask=n < slots, other=float("-inf"))
            w = tl.exp(e - least) * inverse
            tl.store(to + n, w.to(attention_ptr.dtype.element_ty), mask=n < slots)
        tl.debug_barrier()
        to += batch * slots

        r = tl.where(total == 0.0, 0.0, A * u + B)
        gate_rows = _matrix(gate_weight_ptr, weight_t, width, BD, ACC)
        g = sigmoid(z_gate + tl.sum(gate_rows * r[None, :], axis=1))
        write_rows = _matrix(write_weight_ptr, weight_t, width, BD, ACC)
        w = tanh(z_write + tl.sum(write_rows * r[None, :], axis=1))
        if saved_ptr is not None:
            tl.store(saved_ptr + d, g, mask=inside)
            tl.store(saved_ptr + width + d, w, mask=inside)
            tl.store(saved_ptr + 2 * width + d, u, mask=inside)
            saved_ptr += 3 * batch * width
        A = (1.0 - g) * A
        B = (1.0 - g) * B + g * w
    tl.store(maps_ptr + 2 * b * width + d, A, mask=inside)
    tl.store(maps_ptr + (2 * b + 1) * width + d, B, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def dynamic_memory_final(
    memory_ptr,  # [B, N, m]
    maps_ptr,  # [B, 2, m]
    final_ptr,  # [B, N, m]
    slots, blocks, memory_b, width,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A * M_0 + B of one row and BN slots."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks).to(tl.int64) * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    inside = d < width
    A = tl.load(maps_ptr + 2 * b * width + d, mask=inside, other=0.0)
    B = tl.load(maps_ptr + (2 * b + 1) * width + d, mask=inside, other=0.0)
    mask = (n < slots)[:, None] & inside[None, :]
    at = n[:, None] * width + d[None, :]
    block = tl.load(memory_ptr + b * memory_b + at, mask=mask, other=0.0)
    out = A[None, :] * block.to(A.dtype) + B[None, :]
    tl.store(final_ptr + b * slots * width + at, out.to(final_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def dynamic_memory_backward(
    score_ptr,  # [B, m]
    memory_ptr,  # [B, N, m]
    gate_weight_ptr,  # [m, m or more], its first m columns
    write_weight_ptr,
    mask_ptr,  # [B, N] uint8 or None
    attention_ptr,  # [K, B, N]
    saved_ptr,  # [K, B, 3, m] wide
    grad_attention_ptr,  # [K, B, N] or None
    grad_final_ptr,  # [B, N, m] or None
    maps_ptr,  # [K + 1, B, 2, m] wide: A_k and B_k before hop k, and after the last
    dz_ptr,  # [K, B, 2, m] wide
    du_ptr,  # [K, B, m] wide
    de_ptr,  # [K, B, N] wide
    ds_ptr,  # [B, m] wide
    batch, slots, hops, memory_b, weight_t, width,
    a_0, a_1, a_2,  # strides of grad_attention
    f_0, f_1, f_2,  # strides of grad_final
    ACC: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    inside = d < width
    memory_ptr += b * memory_b
    if mask_ptr is not None:
        mask_ptr += b * slots
    s = tl.load(score_ptr + b * width + d, mask=inside, other=0.0).to(ACC)
    d_s = tl.zeros([BD], ACC)
    d_A = tl.zeros([BD], ACC)
    d_B = tl.zeros([BD], ACC)
    filled = mask_ptr is None  # whether the mask leaves a slot to read
    if mask_ptr is not None:
        allowed = tl.zeros([BN], tl.int32)
        for start in range(0, slots, BN):
            n = start + tl.arange(0, BN)
            allowed += (tl.load(mask_ptr + n, mask=n < slots, other=0) != 0).to(tl.int32)
        filled = tl.sum(allowed, axis=0) != 0
    if grad_final_ptr is not None:
        for start in range(0, slots, BN):
            n = start + tl.arange(0, BN)
            mask = (n < slots)[:, None] & inside[None, :]
            block = tl.load(memory_ptr + n[:, None] * width + d[None, :], mask=mask, other=0.0)
            at = grad_final_ptr + b * f_0 + n[:, None].to(tl.int64) * f_1 + d[None, :] * f_2
            grad = tl.load(at, mask=mask, other=0.0).to(ACC)
            d_A += tl.sum(grad * block.to(ACC), axis=0)
            d_B += tl.sum(grad, axis=0)
    for back in range(hops):
        k = hops - 1 - back
        row = k * batch + b  # b is 64-bit
        maps = maps_ptr + 2 * row * width + d
        A = tl.load(maps, mask=inside, other=0.0)
        B = tl.load(maps + width, mask=inside, other=0.0)
        kept = saved_ptr + 3 * row * width + d
        g = tl.load(kept, mask=inside, other=0.0)
        w = tl.load(kept + width, mask=inside, other=0.0)
        u = tl.load(kept + 2 * width, mask=inside, other=0.0)
        dz_gate = (d_B * (w - B) - d_A * A) * g * (1.0 - g)
        dz_write = d_B * g * (1.0 - w * w)
        tl.store(dz_ptr + 2 * row * width + d, dz_gate, mask=inside)
        tl.store(dz_ptr + (2 * row + 1) * width + d, dz_write, mask=inside)
        gate_rows = _matrix(gate_weight_ptr, weight_t, width, BD, ACC)
        dr = tl.sum(gate_rows * dz_gate[:, None], axis=0)
        write_rows = _matrix(write_weight_ptr, weight_t, width, BD, ACC)
        dr += tl.sum(write_rows * dz_write[:, None], axis=0)
        d_A = (1.0 - g) * d_A + dr * u
        d_B = (1.0 - g) * d_B + tl.where(filled, dr, 0.0)
        du = dr * A
        tl.store(du_ptr + row * width + d, du, mask=inside)

        mean = tl.sum(tl.zeros([BN], ACC), axis=0)
        for start in range(0, slots, BN):
            n = start + tl.arange(0, BN)
            block, _there = _slots(memory_ptr, mask_ptr, n, slots, width, BD, ACC)
            da = tl.sum(block * du[None, :], axis=1)
            if grad_attention_ptr is not None:
                at = grad_attention_ptr + k.to(tl.int64) * a_0 + b * a_1 + n * a_2
                da += tl.load(at, mask=n < slots, other=0.0).to(ACC)
            a = tl.load(attention_ptr + row * slots + n, mask=n < slots, other=0.0).to(ACC)
            mean += tl.sum(a * da, axis=0)
            tl.store(de_ptr + row * slots + n, da, mask=n < slots)
        tl.debug_barrier()  # read by other threads than wrote them
        dp = tl.zeros([BD], ACC)
        for start in range(0, slots, BN):
            n = start + tl.arange(0, BN)
            block, _there = _slots(memory_ptr, mask_ptr, n, slots, width, BD, ACC)
            a = tl.load(attention_ptr + row * slots + n, mask=n < slots, other=0.0).to(ACC)
            da = tl.load(de_ptr + row * slots + n, mask=n < slots, other=0.0)
            tl.debug_barrier()  # several threads have read da where one writes de
            de = a * (da - mean)
            tl.store(de_ptr + row * slots + n, de, mask=n < slots)
            dp += tl.sum(de[:, None] * block, axis=0)
        d_A += dp * s
        d_s += dp * A
    tl.store(ds_ptr + b * width + d, d_s, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def dynamic_memory_shared_grad(
    grad_final_ptr,  # [B, N, m]
    maps_ptr,  # [B, 2, m] wide: A and B after the last hop
    grad_ptr,  # [N, m] wide
    batch, slots, width,
    f_0, f_1, f_2,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """sum_b A_b * grad_final_b of BN slots: the final memory's part of a shared one's gradient."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    inside = d < width
    mask = (n < slots)[:, None] & inside[None, :]
    at = grad_final_ptr + n[:, None] * f_1 + d[None, :] * f_2
    total = tl.zeros([BN, BD], grad_ptr.dtype.element_ty)
    for _ in range(batch):
        A = tl.load(maps_ptr + d, mask=inside, other=0.0)
        total += A[None, :] * tl.load(at, mask=mask, other=0.0).to(A.dtype)
        maps_ptr += 2 * width
        at += f_0
    tl.store(grad_ptr + n[:, None] * width + d[None, :], total, mask=mask)
