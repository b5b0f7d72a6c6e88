"""LSTM kernels that loop over time with the recurrent weights held on chip.

One program owns BLOCK_B batch rows for the whole sequence: W_hh is read once, h and c never leave
the registers, and the steps need no launch and no grid-wide barrier. What moves per step and row
is the 4H pre-activations in and h (when training also c and 4H gates) out.

Two ways to multiply by W_hh, chosen by the launcher; state and sums are float32 in both:
* DOT: tensor cores, 16 rows a program, W_hh in shared memory. 16-bit storage, and float32 where
  TF32 is allowed.
* otherwise plain float32 multiply-adds, one row a program, W_hh in registers (64 a thread at
  H = 64). The weights come packed with the four gates of a unit side by side, so that one
  reduction over k leaves each thread with all four gates of its units.

Rows of gates, output and cells are found by `row_of`; see lstm_step.py.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import lstm_point, lstm_point_backward
from .lstm_step import VARYING, row_of


@triton.jit
def _rows(lengths_ptr, steps, batch, H, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """A program's batch rows and their lengths, 0 beyond the batch; its units, which of them there
    are [1, BLOCK_H], and the same of rows that there are [BLOCK_B, BLOCK_H]."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.arange(0, BLOCK_H)
    if lengths_ptr is None:
        length = tl.where(b < batch, steps, 0)
    else:
        length = tl.load(lengths_ptr + b, mask=b < batch, other=0).to(tl.int32)
    unit = (n < H)[None, :]
    return b, length, n, unit, (b < batch)[:, None] & unit


@triton.jit
def _load_units(ptr, row, n, mask, H, width: tl.constexpr, gate: tl.constexpr):
    """[BLOCK_B, BLOCK_H] of one gate out of rows of width * H elements."""
    return tl.load(ptr + row[:, None] * (width * H) + (gate * H + n)[None, :], mask=mask, other=0.0)


@triton.jit
def _store_units(ptr, value, row, n, mask, H, width: tl.constexpr, gate: tl.constexpr):
    offset = row[:, None] * (width * H) + (gate * H + n)[None, :]
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_gates(ptr, row, n, mask, H):
    """All four gates out of rows of 4 * H elements."""
    i = _load_units(ptr, row, n, mask, H, 4, 0)
    f = _load_units(ptr, row, n, mask, H, 4, 1)
    g = _load_units(ptr, row, n, mask, H, 4, 2)
    return i, f, g, _load_units(ptr, row, n, mask, H, 4, 3)


@triton.jit
def _store_gates(ptr, i, f, g, o, row, n, mask, H):
    _store_units(ptr, i, row, n, mask, H, 4, 0)
    _store_units(ptr, f, row, n, mask, H, 4, 1)
    _store_units(ptr, g, row, n, mask, H, 4, 2)
    _store_units(ptr, o, row, n, mask, H, 4, 3)


@triton.jit
def _bias(bias_ih_ptr, bias_hh_ptr, n, H, gate: tl.constexpr):
    """b_ih + b_hh of one gate, [1, BLOCK_H]; either may be missing."""
    bias = tl.zeros(n.shape, tl.float32)
    if bias_ih_ptr is not None:
        bias += tl.load(bias_ih_ptr + gate * H + n, mask=n < H, other=0.0)
    if bias_hh_ptr is not None:
        bias += tl.load(bias_hh_ptr + gate * H + n, mask=n < H, other=0.0)
    return bias[None, :]


@triton.jit
def _weights(w_ptr, gate: tl.constexpr, H, BLOCK_H: tl.constexpr, TRANSPOSED: tl.constexpr):
    """W_hh of one gate as [n, k], or as [k, n] if TRANSPOSED; zero beyond H."""
    row = tl.arange(0, BLOCK_H)[:, None]
    col = tl.arange(0, BLOCK_H)[None, :]
    mask = (row < H) & (col < H)
    if TRANSPOSED:
        return tl.load(w_ptr + (gate * H + col) * H + row, mask=mask, other=0.0)
    else:
        return tl.load(w_ptr + (gate * H + row) * H + col, mask=mask, other=0.0)


@triton.jit
def _all_weights(w_ptr, H, BLOCK_H: tl.constexpr, TRANSPOSED: tl.constexpr):
    w_i = _weights(w_ptr, 0, H, BLOCK_H, TRANSPOSED)
    w_f = _weights(w_ptr, 1, H, BLOCK_H, TRANSPOSED)
    w_g = _weights(w_ptr, 2, H, BLOCK_H, TRANSPOSED)
    return w_i, w_f, w_g, _weights(w_ptr, 3, H, BLOCK_H, TRANSPOSED)


@triton.jit(do_not_specialize=VARYING)
def lstm_forward_on_chip(
    z_ptr,  # [rows, 4H] input's part of the pre-activations, without biases
    w_ptr,  # DOT: weight_hh [4H, H]; else float32 [H(k), H(n), 4]
    bias_ih_ptr,  # [4H] or None
    bias_hh_ptr,  # [4H] or None
    hx_ptr,  # [B, H] or None
    cx_ptr,  # [B, H] or None
    lengths_ptr,  # [B] int64 or None
    reset_ptr,  # [rows] uint8 or None
    offsets_ptr,  # [T] int64 for packed rows, or None
    output_ptr,  # [rows, H]
    hy_ptr,  # [B, H]
    cy_ptr,  # [B, H]
    gates_ptr,  # [rows, 4H] or None; may be z_ptr
    cells_ptr,  # [rows, H] or None
    steps, batch, t_stride, b_stride, reverse, H,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, length, n, unit, known = _rows(lengths_ptr, steps, batch, H, BLOCK_B, BLOCK_H)

    if DOT:
        w_i, w_f, w_g, w_o = _all_weights(w_ptr, H, BLOCK_H, True)
    else:
        k = tl.arange(0, BLOCK_H)[:, None]
        lane = tl.arange(0, 4 * BLOCK_H)[None, :]
        w = tl.load(w_ptr + k * (4 * H) + lane, mask=(k < H) & (lane < 4 * H), other=0.0)

    b_i = _bias(bias_ih_ptr, bias_hh_ptr, n, H, 0)
    b_f = _bias(bias_ih_ptr, bias_hh_ptr, n, H, 1)
    b_g = _bias(bias_ih_ptr, bias_hh_ptr, n, H, 2)
    b_o = _bias(bias_ih_ptr, bias_hh_ptr, n, H, 3)

    if hx_ptr is None:
        h = tl.zeros([BLOCK_B, BLOCK_H], output_ptr.dtype.element_ty)
        c = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    else:
        h = _load_units(hx_ptr, b, n, known, H, 1, 0)
        c = _load_units(cx_ptr, b, n, known, H, 1, 0).to(tl.float32)

    t = reverse * (steps - 1)
    row = row_of(offsets_ptr, t, b, t_stride, b_stride)
    live = (t < length)[:, None] & unit
    z_i, z_f, z_g, z_o = _load_gates(z_ptr, row, n, live, H)

    for step in range(steps):
        # Ask for the next step's pre-activations now: they arrive while this step computes.
        t_next = tl.minimum(tl.maximum(t + 1 - 2 * reverse, 0), steps - 1)
        row_next = row_of(offsets_ptr, t_next, b, t_stride, b_stride)
        live_next = (t_next < length)[:, None] & unit & (step + 1 < steps)
        next_i, next_f, next_g, next_o = _load_gates(z_ptr, row_next, n, live_next, H)

        active = (t < length)[:, None]
        if reset_ptr is not None:
            # Forward: reset[t] clears what enters step t; in reverse that is reset[t + 1].
            seam = t + reverse
            at = seam.to(tl.int64) * t_stride + b * b_stride
            cut = tl.load(reset_ptr + at, mask=seam < length, other=0)[:, None] != 0
            h = tl.where(cut, tl.zeros_like(h), h)
            c = tl.where(cut, tl.zeros_like(c), c)

        if DOT:
            a_i = tl.dot(h, w_i, z_i.to(tl.float32) + b_i, input_precision=PRECISION)
            a_f = tl.dot(h, w_f, z_f.to(tl.float32) + b_f, input_precision=PRECISION)
            a_g = tl.dot(h, w_g, z_g.to(tl.float32) + b_g, input_precision=PRECISION)
            a_o = tl.dot(h, w_o, z_o.to(tl.float32) + b_o, input_precision=PRECISION)
        else:
            a = tl.reshape(tl.sum(tl.trans(h.to(tl.float32)) * w, axis=0), [1, BLOCK_H, 2, 2])
            a_ig, a_fo = tl.split(a)
            a_i, a_g = tl.split(a_ig)
            a_f, a_o = tl.split(a_fo)
            a_i += z_i + b_i
            a_f += z_f + b_f
            a_g += z_g + b_g
            a_o += z_o + b_o
        i, f, g, o, c_new, h_new = lstm_point(a_i, a_f, a_g, a_o, c)

        if offsets_ptr is None:
            seen = known
        else:
            seen = active & unit
        _store_units(output_ptr, tl.where(active, h_new, 0.0), row, n, seen, H, 1, 0)
        if gates_ptr is not None:
            i, f = tl.where(active, i, 0.0), tl.where(active, f, 0.0)
            g, o = tl.where(active, g, 0.0), tl.where(active, o, 0.0)
            _store_gates(gates_ptr, i, f, g, o, row, n, seen, H)
        if cells_ptr is not None:
            _store_units(cells_ptr, tl.where(active, c_new, 0.0), row, n, seen, H, 1, 0)

        h = tl.where(active, h_new.to(h.dtype), h)
        c = tl.where(active, c_new, c)
        t = t_next
        row = row_next
        z_i = next_i
        z_f = next_f
        z_g = next_g
        z_o = next_o

    _store_units(hy_ptr, h, b, n, known, H, 1, 0)
    _store_units(cy_ptr, c, b, n, known, H, 1, 0)


@triton.jit(do_not_specialize=VARYING)
def lstm_backward_on_chip(
    grad_output_ptr,  # [rows, H] or None
    grad_hy_ptr,  # [B, H] or None
    grad_cy_ptr,  # [B, H] or None
    grad_gates_ptr,  # [rows, 4H] or None
    grad_cells_ptr,  # [rows, H] or None
    w_ptr,  # DOT: weight_hh [4H, H]; else float32 [H(n), 4, H(k)]
    cx_ptr,  # [B, H] or None
    gates_ptr,  # [rows, 4H]
    cells_ptr,  # [rows, H]
    lengths_ptr,  # [B] int64 or None
    reset_ptr,  # [rows] uint8 or None
    offsets_ptr,  # [T] int64 for packed rows, or None
    dz_ptr,  # [rows, 4H]
    grad_hx_ptr,  # [B, H] or None
    grad_cx_ptr,  # [B, H] or None
    steps, batch, t_stride, b_stride, reverse, H,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, length, n, unit, known = _rows(lengths_ptr, steps, batch, H, BLOCK_B, BLOCK_H)

    if DOT:
        w_i, w_f, w_g, w_o = _all_weights(w_ptr, H, BLOCK_H, False)
    else:
        lane = tl.arange(0, 4 * BLOCK_H)[:, None]
        w = tl.load(w_ptr + lane * H + n[None, :], mask=(lane < 4 * H) & unit, other=0.0)

    # Rows shorter than the sequence keep these until their last step comes up.
    if grad_hy_ptr is None:
        d_h = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    else:
        d_h = _load_units(grad_hy_ptr, b, n, known, H, 1, 0).to(tl.float32)
    if grad_cy_ptr is None:
        d_c = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    else:
        d_c = _load_units(grad_cy_ptr, b, n, known, H, 1, 0).to(tl.float32)
    if cx_ptr is None:
        cx = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    else:
        cx = _load_units(cx_ptr, b, n, known, H, 1, 0).to(tl.float32)

    back = 2 * reverse - 1  # the way from a step to the one before it
    first = tl.where(reverse != 0, length - 1, 0)
    t = (1 - reverse) * (steps - 1)
    row = row_of(offsets_ptr, t, b, t_stride, b_stride)
    live = (t < length)[:, None] & unit
    c = _load_units(cells_ptr, row, n, live, H, 1, 0)
    for _ in range(steps):
        active = (t < length)[:, None]
        live = active & unit
        t_prev = tl.minimum(tl.maximum(t + back, 0), steps - 1)
        row_prev = row_of(offsets_ptr, t_prev, b, t_stride, b_stride)
        live_prev = (t_prev < length)[:, None] & unit
        c_saved = _load_units(cells_ptr, row_prev, n, live_prev, H, 1, 0)
        c_prev = tl.where((t == first)[:, None], cx, c_saved.to(tl.float32))
        if reset_ptr is not None:
            # Forward: reset[t] clears what enters step t; in reverse that is reset[t + 1].
            seam = t + reverse
            at = seam.to(tl.int64) * t_stride + b * b_stride
            cut = tl.load(reset_ptr + at, mask=seam < length, other=0)[:, None] != 0
            c_prev = tl.where(cut, 0.0, c_prev)

        i, f, g, o = _load_gates(gates_ptr, row, n, live, H)
        if grad_gates_ptr is None:
            d_i = 0.0
            d_f = 0.0
            d_g = 0.0
            d_o = 0.0
        else:
            d_i, d_f, d_g, d_o = _load_gates(grad_gates_ptr, row, n, live, H)
        d_h_in = d_h
        if grad_output_ptr is not None:
            d_h_in += _load_units(grad_output_ptr, row, n, live, H, 1, 0)
        d_c_in = d_c
        if grad_cells_ptr is not None:
            d_c_in += _load_units(grad_cells_ptr, row, n, live, H, 1, 0)

        dz_i, dz_f, dz_g, dz_o, d_c_prev = lstm_point_backward(
            i.to(tl.float32),
            f.to(tl.float32),
            g.to(tl.float32),
            o.to(tl.float32),
            c.to(tl.float32),
            c_prev,
            d_h_in,
            d_c_in,
            d_i,
            d_f,
            d_g,
            d_o,
        )
        dz_i = tl.where(active, dz_i, 0.0).to(dz_ptr.dtype.element_ty)
        dz_f = tl.where(active, dz_f, 0.0).to(dz_ptr.dtype.element_ty)
        dz_g = tl.where(active, dz_g, 0.0).to(dz_ptr.dtype.element_ty)
        dz_o = tl.where(active, dz_o, 0.0).to(dz_ptr.dtype.element_ty)
        if offsets_ptr is None:
            seen = known
        else:
            seen = live
        _store_gates(dz_ptr, dz_i, dz_f, dz_g, dz_o, row, n, seen, H)

        if DOT:
            d_h_prev = tl.dot(dz_i, w_i, input_precision=PRECISION)
            d_h_prev = tl.dot(dz_f, w_f, d_h_prev, input_precision=PRECISION)
            d_h_prev = tl.dot(dz_g, w_g, d_h_prev, input_precision=PRECISION)
            d_h_prev = tl.dot(dz_o, w_o, d_h_prev, input_precision=PRECISION)
        else:
            dz = tl.join(tl.join(dz_i, dz_g), tl.join(dz_f, dz_o)).to(tl.float32)
            d_h_prev = tl.sum(tl.reshape(dz, [4 * BLOCK_H, 1]) * w, axis=0)[None, :]
        if reset_ptr is not None:
            d_h_prev = tl.where(cut, 0.0, d_h_prev)
            d_c_prev = tl.where(cut, 0.0, d_c_prev)
        d_h = tl.where(active, d_h_prev, d_h)
        d_c = tl.where(active, d_c_prev, d_c)
        c = c_saved
        t = t_prev
        row = row_prev

    if grad_hx_ptr is not None:
        _store_units(grad_hx_ptr, d_h, b, n, known, H, 1, 0)
    if grad_cx_ptr is not None:
        _store_units(grad_cx_ptr, d_c, b, n, known, H, 1, 0)
