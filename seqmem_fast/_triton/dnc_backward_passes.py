"""What one step of a DNC does in reverse, pass by pass; dnc_backward_kernels.py calls them in turn.

    read heads: reads, modes, sharpening, content of the new memory
    writes: links and precedence, then what was erased and added
    write heads, the last one first: gates, allocation, content of the memory before

q and dq are the step's head values, normalised where asked for, and their gradient.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import sigmoid
from .dnc_backward_parts import (
    allocation_backward,
    content_backward,
    direction_backward,
    erased,
    links_backward,
)
from .dnc_parts import content_of, element, head_parts
from .machine_kernels import padded, read_gradient, softmax_of, softplus, vector, with_trace


@triton.jit
def reads_backward(
    memory, d_memory, q, dq, w_ptr, direction, d_reads_ptr, d_read_weights_ptr,
    grad_read_trace_ptr, row, d_feature, f_c, d_direction, control, slots, width, reads, writes,
    SQUASH: tl.constexpr, MASKS: tl.constexpr, SHARPEN: tl.constexpr, LINKS: tl.constexpr,
    STRENGTH: tl.constexpr, NORM_FLOOR: tl.constexpr, EPS: tl.constexpr, MASK_MIN: tl.constexpr,
    ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The memory's gradient with that of the reads from it; those of directions to `d_direction`.

    w_ptr: the read weightings [R, N] after the step.
    """
    n = tl.arange(0, BN)
    d = tl.arange(0, BD)
    there = n < slots
    modes = 1 + 2 * writes
    (
        read_strength_at, _write_key_at, _write_strength_at, _erase_at, _add_at, _free_at,
        _allocation_gate_at, _write_gate_at, mode_at, _write_mask_at, read_mask_at, sharpness_at,
        _strength_at,
    ) = head_parts(reads, writes, width, MASKS, SHARPEN, LINKS)  # fmt: skip
    for r in tl.range(0, reads, disable_licm=True):
        d_read = read_gradient(d_reads_ptr, d_feature, f_c, control, r * width, width, ACC, BW)
        dw = tl.load(d_read_weights_ptr + r * slots + n, mask=there, other=0.0)
        at_trace = (row * reads + r) * slots
        dw = with_trace(dw, grad_read_trace_ptr, at_trace, there, ACC, BN)
        dw += tl.sum(memory * d_read[None, :], axis=1)
        at = w_ptr + r * slots + n
        w = tl.load(at, mask=there, other=0.0).to(ACC)
        d_memory += w[:, None] * d_read[None, :]
        dc = dw
        if LINKS:
            mode = tl.load(q + mode_at + r * modes + d, mask=d < modes, other=0.0)
            mode = softmax_of(mode, d < modes)
            content = content_of(
                memory, vector(q + r * width, width, SQUASH, BW),
                tl.load(q + read_strength_at + r), q + read_mask_at + r * width, slots,
                width, MASKS, STRENGTH, NORM_FLOOR, EPS, MASK_MIN, BN, BW,
            )  # fmt: skip
            d_mode = tl.where(d == writes, tl.sum(dw * content, axis=0), 0.0)
            of_ahead = tl.sum(tl.zeros([BD], ACC), axis=0)
            of_back = of_ahead
            for h in tl.range(0, writes, disable_licm=True):
                offset = 2 * (h * reads + r) * slots
                of_mode, of_sharpness = direction_backward(
                    direction + offset, dw, element(mode, h, BD),
                    q + sharpness_at + reads + r, d_direction + offset, slots, SHARPEN, BN,
                )  # fmt: skip
                d_mode += tl.where(d == h, of_mode, 0.0)
                of_back += of_sharpness
                offset += slots
                of_mode, of_sharpness = direction_backward(
                    direction + offset, dw, element(mode, writes + 1 + h, BD),
                    q + sharpness_at + r, d_direction + offset, slots, SHARPEN, BN,
                )  # fmt: skip
                d_mode += tl.where(d == writes + 1 + h, of_mode, 0.0)
                of_ahead += of_sharpness
            d_mode = mode * (d_mode - tl.sum(d_mode * mode, axis=0))
            tl.store(dq + mode_at + r * modes + d, d_mode, mask=d < modes)
            if SHARPEN:
                tl.store(dq + sharpness_at + r, of_ahead)
                tl.store(dq + sharpness_at + reads + r, of_back)
            dc = element(mode, writes, BD) * dw
        d_memory += content_backward(
            dc, memory, q + r * width, q + read_strength_at + r,
            q + read_mask_at + r * width, dq + r * width, dq + read_strength_at + r,
            dq + read_mask_at + r * width, slots, width, SQUASH, MASKS, STRENGTH,
            NORM_FLOOR, EPS, MASK_MIN, BN, BW,
        )  # fmt: skip
    return d_memory


@triton.jit
def writes_backward(
    memory_ptr, d_memory_ptr, kept, q, dq, w_ptr, link, precedence, read_before,
    d_write_weights_ptr, grad_write_trace_ptr, row, d_link_ptr, d_precedence_ptr, d_direction,
    d_along, d_across, d_rows, d_written, slots, width, reads, writes, SQUASH: tl.constexpr,
    MASKS: tl.constexpr, SHARPEN: tl.constexpr, LINKS: tl.constexpr, DEALLOCATE: tl.constexpr,
    ACC: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The write weightings' gradients [W, N] to `d_written`; those of links and precedence on.

    w_ptr: the write weightings [W, N] of the step; link, precedence: what entered it.
    """
    n = tl.arange(0, BN)
    m = tl.arange(0, BW)
    there = n < slots
    (
        _read_strength_at, _write_key_at, _write_strength_at, erase_at, add_at, _free_at,
        _allocation_gate_at, _write_gate_at, _mode_at, _write_mask_at, _read_mask_at, _sharpness_at,
        _strength_at,
    ) = head_parts(reads, writes, width, MASKS, SHARPEN, LINKS)  # fmt: skip
    for h in tl.range(0, writes, disable_licm=True):
        dw = tl.load(d_write_weights_ptr + h * slots + n, mask=there, other=0.0)
        at_trace = (row * writes + h) * slots
        dw = with_trace(dw, grad_write_trace_ptr, at_trace, there, ACC, BN)
        w = tl.load(w_ptr + h * slots + n, mask=there, other=0.0).to(ACC)
        if LINKS:
            d_since, d_p = links_backward(
                d_link_ptr + h * slots * slots, link + h * slots * slots,
                precedence + h * slots, w_ptr + h * slots, read_before,
                d_direction + 2 * h * reads * slots, d_along, d_across, d_rows, slots,
                reads, ACC, BN, BI,
            )  # fmt: skip
            tl.debug_barrier()
            dw += d_since + tl.load(d_rows + n, mask=there, other=0.0)
            p = tl.load(precedence + h * slots + n, mask=there, other=0.0)
            to = d_precedence_ptr + h * slots + n
            d_next = tl.load(to, mask=there, other=0.0)
            dw += tl.where(there, d_next - tl.sum(d_next * p, axis=0), 0.0)
            d_p += (1.0 - tl.sum(w, axis=0)) * d_next
            tl.debug_barrier()  # several threads load what one stores
            tl.store(to, d_p, mask=there)
        memory = tl.load(padded(memory_ptr, BN, BW))
        d_memory = tl.load(padded(d_memory_ptr, BN, BW))
        erase = sigmoid(tl.load(q + erase_at + h * width + m, mask=m < width, other=0.0))
        erase = tl.where(m < width, erase, 0.0)
        add = vector(q + add_at + h * width, width, SQUASH, BW)
        others = d_memory * memory * erased(
            kept, w_ptr, q + erase_at, h, writes, slots, width, DEALLOCATE, ACC, BN, BW
        )  # fmt: skip
        dw += tl.sum(d_memory * add[None, :] - others * erase[None, :], axis=1)
        d_erase = -tl.sum(others * w[:, None], axis=0) * erase * (1.0 - erase)
        tl.store(dq + erase_at + h * width + m, d_erase, mask=m < width)
        d_add = tl.sum(d_memory * w[:, None], axis=0)
        if SQUASH:
            d_add *= 1.0 - add * add
        tl.store(dq + add_at + h * width + m, d_add, mask=m < width)
        tl.store(d_written + h * slots + n, dw, mask=there)


@triton.jit
def write_heads_backward(
    memory, d_memory, q, dq, allocated, d_written, sorting, slots, width, reads, writes,
    SQUASH: tl.constexpr, MASKS: tl.constexpr, SHARPEN: tl.constexpr, LINKS: tl.constexpr,
    SOFTMAX: tl.constexpr, STRENGTH: tl.constexpr, NORM_FLOOR: tl.constexpr, EPS: tl.constexpr,
    MASK_MIN: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """Gradients of the memory before the step and of the usage that the first head sees."""
    n = tl.arange(0, BN)
    there = n < slots
    (
        _read_strength_at, write_key_at, write_strength_at, _erase_at, _add_at, _free_at,
        allocation_gate_at, write_gate_at, _mode_at, write_mask_at, _read_mask_at, _sharpness_at,
        strength_at,
    ) = head_parts(reads, writes, width, MASKS, SHARPEN, LINKS)  # fmt: skip
    du = tl.zeros([BN], ACC)
    for h_back in tl.range(0, writes, disable_licm=True):
        h = writes - 1 - h_back
        dw = tl.load(d_written + h * slots + n, mask=there, other=0.0)
        u = tl.load(allocated + 2 * h * slots + n, mask=there, other=0.0)
        a = tl.load(allocated + (2 * h + 1) * slots + n, mask=there, other=0.0)
        gate = sigmoid(tl.load(q + allocation_gate_at + h))
        write = sigmoid(tl.load(q + write_gate_at + h))
        content = content_of(
            memory, vector(q + write_key_at + h * width, width, SQUASH, BW),
            tl.load(q + write_strength_at + h), q + write_mask_at + h * width, slots,
            width, MASKS, STRENGTH, NORM_FLOOR, EPS, MASK_MIN, BN, BW,
        )  # fmt: skip
        used = tl.sum(du * (1.0 - u) * a, axis=0)
        d_write = tl.sum(dw * (gate * a + (1.0 - gate) * content), axis=0) + gate * used
        d_gate = write * (tl.sum(dw * (a - content), axis=0) + used)
        tl.store(dq + write_gate_at + h, d_write * write * (1.0 - write))
        tl.store(dq + allocation_gate_at + h, d_gate * gate * (1.0 - gate))
        da = gate * write * (dw + du * (1.0 - u))
        du *= 1.0 - gate * write * a
        if SOFTMAX:
            raw_strength = tl.load(q + strength_at + h)
            dy = a * (da - tl.sum(da * a, axis=0))
            d_strength = tl.sum(dy * (1.0 - u), axis=0) * sigmoid(raw_strength)
            tl.store(dq + strength_at + h, d_strength)
            du -= (1.0 + softplus(raw_strength)) * dy
        else:
            du += allocation_backward(da, a, u, sorting, slots, BN, BI)
        d_memory += content_backward(
            write * (1.0 - gate) * dw, memory, q + write_key_at + h * width,
            q + write_strength_at + h, q + write_mask_at + h * width,
            dq + write_key_at + h * width, dq + write_strength_at + h,
            dq + write_mask_at + h * width, slots, width, SQUASH, MASKS, STRENGTH,
            NORM_FLOOR, EPS, MASK_MIN, BN, BW,
        )  # fmt: skip
    return d_memory, du
