"""Pointwise LSTM kernels: all of one step but its matrix products, forward and backward.

They serve the single cell (one step of length 1) and the sequence whose recurrent weights do not
fit on chip, where each step is one recurrent GEMM and one of these.

Floor of the forward kernel per unit: it reads 4 pre-activations and c and writes h and c, and
when training 4 gates and c more: 7 to 12 elements for about 40 flops, so memory sets its speed:
B * H * 28 bytes in float32 without gates, 2.3 us for B = 4096, H = 64 at 3.2 TB/s. Below that size
the launch does. Backward: reads 4 gates, c, c_{t-1}, dh, dc, writes 4 dz and dc, 13 elements for
about 30 flops.

Row addressing: step t of batch element b is stored at row `start(t) + b * b_stride` of every
[rows, width] tensor. Time-major [T, B]: start t * B, stride 1; batch-major [B, T]: t and T;
packed: offsets[t] and 1. `length` is T where no lengths are given, and a step is active where
t < length[b].
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_gates, lstm_point, lstm_point_backward, store_gates

# Sizes that change from call to call: specialising on them would only compile the same code twice.
VARYING = (
    "t",
    "row0",
    "prev_row0",
    "steps",
    "batch",
    "blocks",
    "t_stride",
    "b_stride",
    "reverse",
)


@triton.jit
def row_of(offsets_ptr, t, b, t_stride, b_stride):
    """The row of batch element b at time t; 64-bit."""
    if offsets_ptr is None:
        return t.to(tl.int64) * t_stride + b * b_stride
    else:
        return tl.load(offsets_ptr + t) + b


@triton.jit
def _tile(lengths_ptr, block, steps, batch, width, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """Rows b of a block of the batch and their lengths, 0 beyond the batch, so that none there is
    ever active; units n [1, BLOCK_H] of the program, and which of both there are."""
    b = block.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    if lengths_ptr is None:
        length = tl.where(b < batch, steps, 0).to(tl.int64)
    else:
        length = tl.load(lengths_ptr + b, mask=b < batch, other=0)
    return b, length, n, (b < batch)[:, None] & (n < width)


@triton.jit
def _cut(reset_ptr, seam, b, length, t_stride, b_stride):
    """Whether reset cuts the state at `seam`, the boundary between steps seam - 1 and seam."""
    at = seam.to(tl.int64) * t_stride + b * b_stride
    return tl.load(reset_ptr + at, mask=(seam >= 0) & (seam < length), other=0) != 0


@triton.jit(do_not_specialize=VARYING)
def lstm_forward_step(
    z_ptr,  # [rows, 4H] pre-activations without biases
    bias_ih_ptr,  # [4H] or None
    bias_hh_ptr,  # [4H] or None
    c_in_ptr,  # [B, H] or None (zeros)
    c_out_ptr,  # [B, H], may be c_in_ptr; rows that are not active keep what they hold
    h_out_ptr,  # [B, H], likewise; with PROJECTED the h before its projection, every row
    output_ptr,  # [rows, H] or None
    gates_ptr,  # [rows, 4H] or None, may be z_ptr
    cells_ptr,  # [rows, H] or None
    lengths_ptr,  # [B] int64 or None
    reset_ptr,  # [rows] uint8 or None
    t, row0, steps, batch, t_stride, b_stride, reverse, width,
    PROJECTED: tl.constexpr, ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    b, length, n, known = _tile(
        lengths_ptr, tl.program_id(0), steps, batch, width, BLOCK_B, BLOCK_H
    )
    active = (t < length)[:, None]
    row = (row0.to(tl.int64) + b * b_stride)[:, None]
    unit = row * width + n
    gate = row * (4 * width) + n
    state = b[:, None] * width + n

    z_i, z_f, z_g, z_o = load_gates(z_ptr, gate, width, known, ACC)
    if bias_ih_ptr is not None:
        b_i, b_f, b_g, b_o = load_gates(bias_ih_ptr, n, width, n < width, ACC)
        z_i, z_f, z_g, z_o = z_i + b_i, z_f + b_f, z_g + b_g, z_o + b_o
    if bias_hh_ptr is not None:
        b_i, b_f, b_g, b_o = load_gates(bias_hh_ptr, n, width, n < width, ACC)
        z_i, z_f, z_g, z_o = z_i + b_i, z_f + b_f, z_g + b_g, z_o + b_o
    if c_in_ptr is None:
        c_prev = tl.zeros([BLOCK_B, BLOCK_H], ACC)
    else:
        c_prev = tl.load(c_in_ptr + state, mask=known, other=0.0).to(ACC)

    i, f, g, o, c, h = lstm_point(z_i, z_f, z_g, z_o, c_prev)

    if gates_ptr is not None:
        i, f = tl.where(active, i, 0.0), tl.where(active, f, 0.0)
        g, o = tl.where(active, g, 0.0), tl.where(active, o, 0.0)
        store_gates(gates_ptr, i, f, g, o, gate, width, known)
    if cells_ptr is not None:
        value = tl.where(active, c, 0.0).to(cells_ptr.dtype.element_ty)
        tl.store(cells_ptr + unit, value, mask=known)
    if output_ptr is not None:
        value = tl.where(active, h, 0.0).to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + unit, value, mask=known)
    live = known & active
    if reset_ptr is not None:
        # What the next step of this row gets; its last step has none, so the final state is whole.
        cut = _cut(reset_ptr, t + 1 - reverse, b, length, t_stride, b_stride)
        cut = (cut & (t + 1 - reverse > 0))[:, None]
        c = tl.where(cut, 0.0, c)
        if not PROJECTED:
            h = tl.where(cut, 0.0, h)
    tl.store(c_out_ptr + state, c.to(c_out_ptr.dtype.element_ty), mask=live)
    if PROJECTED:
        tl.store(h_out_ptr + state, h.to(h_out_ptr.dtype.element_ty), mask=known)
    else:
        tl.store(h_out_ptr + state, h.to(h_out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=VARYING)
def lstm_store_projected(
    p_ptr,  # [B, P] projected h of this step
    h_out_ptr,  # [B, P] state for the next step; rows that are not active keep theirs
    output_ptr,  # [rows, P]
    lengths_ptr,  # [B] int64 or None
    reset_ptr,  # [rows] uint8 or None
    t, row0, steps, batch, t_stride, b_stride, reverse, width,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What lstm_forward_step does with h where there is no projection."""
    b, length, n, known = _tile(
        lengths_ptr, tl.program_id(0), steps, batch, width, BLOCK_B, BLOCK_H
    )
    active = (t < length)[:, None]
    row = (row0.to(tl.int64) + b * b_stride)[:, None]
    state = b[:, None] * width + n
    p = tl.load(p_ptr + state, mask=known, other=0.0)
    tl.store(output_ptr + row * width + n, tl.where(active, p, tl.zeros_like(p)), mask=known)
    if reset_ptr is not None:
        cut = _cut(reset_ptr, t + 1 - reverse, b, length, t_stride, b_stride)
        cut = (cut & (t + 1 - reverse > 0))[:, None]
        p = tl.where(cut, tl.zeros_like(p), p)
    tl.store(h_out_ptr + state, p, mask=known & active)


@triton.jit
def _grad_h(grad_output_ptr, grad_hy_ptr, from_next_ptr, reset_ptr, row, b, n, mask, t, length,
            t_stride, b_stride, reverse, width, ACC: tl.constexpr):  # fmt: skip
    """dL/dh_t: from the output, and from the step after it, or from hy at the row's last step."""
    d_h = tl.zeros(mask.shape, ACC)
    if grad_output_ptr is not None:
        d_h += tl.load(grad_output_ptr + row * width + n, mask=mask, other=0.0).to(ACC)
    last = t == tl.where(reverse != 0, 0, length - 1)
    state = b[:, None] * width + n
    if grad_hy_ptr is not None:
        d_h += tl.load(grad_hy_ptr + state, mask=mask & last[:, None], other=0.0).to(ACC)
    if from_next_ptr is not None:
        joined = last == 0
        if reset_ptr is not None:
            joined = joined & (_cut(reset_ptr, t + 1 - reverse, b, length, t_stride, b_stride) == 0)
        d_h += tl.load(from_next_ptr + state, mask=mask & joined[:, None], other=0.0).to(ACC)
    return d_h


@triton.jit(do_not_specialize=VARYING)
def lstm_gather_grad_projected(
    grad_output_ptr,  # [rows, P] or None
    grad_hy_ptr,  # [B, P] or None
    from_next_ptr,  # [B, P] next step's dz times weight_hh
    dp_ptr,  # [rows, P]
    lengths_ptr,  # [B] int64 or None
    reset_ptr,  # [rows] uint8 or None
    t, row0, steps, batch, t_stride, b_stride, reverse, width,
    ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Gradient of the projected h of one step."""
    b, length, n, known = _tile(
        lengths_ptr, tl.program_id(0), steps, batch, width, BLOCK_B, BLOCK_H
    )
    row = (row0.to(tl.int64) + b * b_stride)[:, None]
    d_p = _grad_h(grad_output_ptr, grad_hy_ptr, from_next_ptr, reset_ptr, row, b, n,
                  known & (t < length)[:, None], t, length, t_stride, b_stride, reverse, width,
                  ACC)  # fmt: skip
    tl.store(dp_ptr + row * width + n, d_p.to(dp_ptr.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=VARYING)
def lstm_backward_step(
    grad_output_ptr,  # [rows, H] or None
    grad_hy_ptr,  # [B, H] or None
    from_next_ptr,  # [B, H] next step's dz times weight_hh, or None; PROJECTED: all of dh
    d_c_in_ptr,  # [B, H] or None (zeros)
    d_c_out_ptr,  # [B, H] or None, may be d_c_in_ptr; rows that are not active keep what they hold
    grad_gates_ptr,  # [rows, 4H] or None
    grad_cells_ptr,  # [rows, H] or None
    cx_ptr,  # [B, H] or None (zeros)
    gates_ptr,  # [rows, 4H]
    cells_ptr,  # [rows, H]
    lengths_ptr,  # [B] int64 or None
    reset_ptr,  # [rows] uint8 or None
    dz_ptr,  # [rows, 4H]
    t, row0, prev_row0, steps, batch, t_stride, b_stride, reverse, width,
    PROJECTED: tl.constexpr, ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    b, length, n, known = _tile(
        lengths_ptr, tl.program_id(0), steps, batch, width, BLOCK_B, BLOCK_H
    )
    active = (t < length)[:, None]
    live = known & active
    row = (row0.to(tl.int64) + b * b_stride)[:, None]
    gate = row * (4 * width) + n
    state = b[:, None] * width + n

    if PROJECTED:
        d_h = tl.load(from_next_ptr + state, mask=live, other=0.0).to(ACC)
    else:
        d_h = _grad_h(grad_output_ptr, grad_hy_ptr, from_next_ptr, reset_ptr, row, b, n, live, t,
                      length, t_stride, b_stride, reverse, width, ACC)  # fmt: skip
    d_c = tl.zeros([BLOCK_B, BLOCK_H], ACC)
    if d_c_in_ptr is not None:
        d_c += tl.load(d_c_in_ptr + state, mask=live, other=0.0).to(ACC)
    if grad_cells_ptr is not None:
        d_c += tl.load(grad_cells_ptr + row * width + n, mask=live, other=0.0).to(ACC)
    d_i = 0.0
    d_f = 0.0
    d_g = 0.0
    d_o = 0.0
    if grad_gates_ptr is not None:
        d_i, d_f, d_g, d_o = load_gates(grad_gates_ptr, gate, width, live, ACC)

    first = (t == tl.where(reverse != 0, length - 1, 0))[:, None]
    prev_row = (prev_row0.to(tl.int64) + b * b_stride)[:, None]
    c_prev = tl.load(cells_ptr + prev_row * width + n, mask=live & (first == 0), other=0.0).to(ACC)
    if cx_ptr is not None:
        c_prev += tl.load(cx_ptr + state, mask=live & first, other=0.0).to(ACC)
    if reset_ptr is not None:
        cut = _cut(reset_ptr, t + reverse, b, length, t_stride, b_stride)[:, None]
        c_prev = tl.where(cut, 0.0, c_prev)
    i, f, g, o = load_gates(gates_ptr, gate, width, live, ACC)
    c = tl.load(cells_ptr + row * width + n, mask=live, other=0.0).to(ACC)

    # All loads of rows that are not active gave 0, and so their dz is 0.
    dz_i, dz_f, dz_g, dz_o, d_c_prev = lstm_point_backward(
        i, f, g, o, c, c_prev, d_h, d_c, d_i, d_f, d_g, d_o
    )
    store_gates(dz_ptr, dz_i, dz_f, dz_g, dz_o, gate, width, known)
    if d_c_out_ptr is not None:
        if reset_ptr is not None:
            d_c_prev = tl.where(cut, 0.0, d_c_prev)
        tl.store(d_c_out_ptr + state, d_c_prev.to(d_c_out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=VARYING)
def lstm_entering_state(
    hx_ptr,  # [B, P] or None (zeros)
    output_ptr,  # [rows, P]
    lengths_ptr,  # [B] int64 or None
    reset_ptr,  # [rows] uint8 or None
    offsets_ptr,  # [T] int64 for packed rows, or None
    entering_ptr,  # [rows, P]
    steps, batch,
    blocks,  # programs that share one time step
    t_stride, b_stride, reverse, width,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """h as it enters every step: what the gradient of weight_hh multiplies dz with."""
    t = tl.program_id(0) // blocks
    b, length, n, known = _tile(
        lengths_ptr, tl.program_id(0) % blocks, steps, batch, width, BLOCK_B, BLOCK_H
    )
    active = (t < length)[:, None]
    row = row_of(offsets_ptr, t, b, t_stride, b_stride)[:, None]
    t_prev = tl.minimum(tl.maximum(t + 2 * reverse - 1, 0), steps - 1)
    prev_row = row_of(offsets_ptr, t_prev, b, t_stride, b_stride)[:, None]
    first = (t == tl.where(reverse != 0, length - 1, 0))[:, None]
    mine = known & active
    h = tl.load(output_ptr + prev_row * width + n, mask=mine & (first == 0), other=0.0)
    if hx_ptr is not None:
        h += tl.load(hx_ptr + b[:, None] * width + n, mask=mine & first, other=0.0)
    if reset_ptr is not None:
        cut = _cut(reset_ptr, t + reverse, b, length, t_stride, b_stride)[:, None]
        h = tl.where(cut, tl.zeros_like(h), h)
    if offsets_ptr is None:
        tl.store(entering_ptr + row * width + n, h, mask=known)
    else:
        tl.store(entering_ptr + row * width + n, h, mask=mine)
