"""One step of the LSTM with zoneout and layer normalisation, all but its matrix products.

One program a row, which holds all of the row's units: a norm's sums stay on chip. Without norms
gain_ih_ptr and what belongs to it are None. Per unit, with norms, the forward reads 8 products, h
and c and writes 4 gates, 9 normalised values, c and h twice: 27 elements, or 108 bytes in float32,
so that a step of B = 64, H = 512 takes 1.2 us at 3 TB/s and its launch takes longer. The backward
reads 4 gates, 9 normalised values, 4 states and writes 12 gradients and 3 states.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_gates, lstm_point, signed, store_gates, tanh

VARYING = ("t", "batch")


@triton.jit
def _share(seed_ptr, row, n, SHARE: tl.constexpr, BELOW: tl.constexpr, ACC: tl.constexpr):
    """How much of its old value each unit keeps."""
    if seed_ptr is None:
        return tl.full(n.shape, SHARE, ACC)
    else:
        drawn = signed(tl.full(n.shape, 1.0, tl.float32), seed_ptr, row, n, BELOW)
        return (drawn < 0).to(ACC)


@triton.jit
def _second(seed_ptr):
    """The seed of c's masks follows that of h's."""
    second = seed_ptr  # Triton 3.6 returns no argument that is None
    if seed_ptr is not None:
        second = seed_ptr + 1
    return second


@triton.jit
def _mixed(seed_ptr, share, before, fresh):
    if seed_ptr is None:
        return fresh + share * (before - fresh)
    else:
        return tl.where(share > 0, before, fresh)


@triton.jit
def _load(ptr, at, known, ACC: tl.constexpr):
    """Zero where there is no tensor."""
    if ptr is None:
        return tl.zeros(at.shape, ACC)
    else:
        return tl.load(ptr + at, mask=known, other=0.0).to(ACC)


@triton.jit
def _sum4(a, b, c, d):
    return tl.sum(a, 0) + tl.sum(b, 0) + tl.sum(c, 0) + tl.sum(d, 0)


@triton.jit
def _centred(x, mean, known):
    return tl.where(known, x - mean, 0.0)


@triton.jit
def _moments(a, b, c, d, known, width, EPSILON: tl.constexpr):
    """Mean and 1 / deviation of four times `width` values."""
    mean = _sum4(a, b, c, d) / (4 * width)
    a, b, c, d = (
        _centred(a, mean, known),
        _centred(b, mean, known),
        _centred(c, mean, known),
        _centred(d, mean, known),
    )
    variance = _sum4(a * a, b * b, c * c, d * d) / (4 * width)
    return mean, 1.0 / tl.sqrt(variance + EPSILON)


@triton.jit(do_not_specialize=VARYING)
def lstm_regularized_step(
    products_ptr,  # [B, 4H]: W_ih x
    recurrent_ptr,  # [B, 4H]: W_hh h
    bias_ih_ptr,  # [4H] or None
    bias_hh_ptr,  # [4H] or None
    gain_ih_ptr,  # [4H] or None
    gain_hh_ptr,  # [4H] or None
    gain_c_ptr,  # [H] or None
    shift_c_ptr,  # [H] or None
    seed_ptr,  # [2] or None
    valid_ptr,  # [B] uint8 or None: rows that have this step
    h_ptr,  # [B, H], what enters the step; then what leaves it
    c_ptr,  # [B, H] of the compute type, likewise
    output_ptr,  # [B, H]
    gates_ptr,  # [B, 4H] or None
    cells_ptr,  # [B, H] or None
    x_hat_ptr,  # [B, 4H] or None, as are the next three: W_ih x, normalised
    v_hat_ptr,  # [B, 4H], of W_hh h
    c_hat_ptr,  # [B, H], of the new c
    scales_ptr,  # [B, 3] of the compute type: 1 / deviation of the three
    t, batch, width,
    SHARE_H: tl.constexpr, SHARE_C: tl.constexpr, BELOW_H: tl.constexpr, BELOW_C: tl.constexpr,
    EPSILON: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    known = n < width
    gate, unit = b * 4 * width + n, b * width + n
    z_i, z_f, z_g, z_o = load_gates(recurrent_ptr, gate, width, known, ACC)
    x_i, x_f, x_g, x_o = load_gates(products_ptr, gate, width, known, ACC)
    if gain_ih_ptr is not None:
        x_mean, x_scale = _moments(x_i, x_f, x_g, x_o, known, width, EPSILON)
        v_mean, v_scale = _moments(z_i, z_f, z_g, z_o, known, width, EPSILON)
        x_i, x_f = (x_i - x_mean) * x_scale, (x_f - x_mean) * x_scale
        x_g, x_o = (x_g - x_mean) * x_scale, (x_o - x_mean) * x_scale
        z_i, z_f = (z_i - v_mean) * v_scale, (z_f - v_mean) * v_scale
        z_g, z_o = (z_g - v_mean) * v_scale, (z_o - v_mean) * v_scale
        if x_hat_ptr is not None:
            store_gates(x_hat_ptr, x_i, x_f, x_g, x_o, gate, width, known)
            store_gates(v_hat_ptr, z_i, z_f, z_g, z_o, gate, width, known)
        a_i, a_f, a_g, a_o = load_gates(gain_ih_ptr, n, width, known, ACC)
        x_i, x_f, x_g, x_o = x_i * a_i, x_f * a_f, x_g * a_g, x_o * a_o
        a_i, a_f, a_g, a_o = load_gates(gain_hh_ptr, n, width, known, ACC)
        z_i, z_f, z_g, z_o = z_i * a_i, z_f * a_f, z_g * a_g, z_o * a_o
    z_i += x_i + _load(bias_ih_ptr, n, known, ACC) + _load(bias_hh_ptr, n, known, ACC)
    f_at = n + width
    z_f += x_f + _load(bias_ih_ptr, f_at, known, ACC) + _load(bias_hh_ptr, f_at, known, ACC)
    g_at = n + 2 * width
    z_g += x_g + _load(bias_ih_ptr, g_at, known, ACC) + _load(bias_hh_ptr, g_at, known, ACC)
    o_at = n + 3 * width
    z_o += x_o + _load(bias_ih_ptr, o_at, known, ACC) + _load(bias_hh_ptr, o_at, known, ACC)

    h_in, c_in = _load(h_ptr, unit, known, ACC), _load(c_ptr, unit, known, ACC)
    i, f, g, o, c, h = lstm_point(z_i, z_f, z_g, z_o, c_in)
    if gain_ih_ptr is not None:
        c_mean = tl.sum(tl.where(known, c, 0.0), 0) / width
        centred = _centred(c, c_mean, known)
        c_scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + EPSILON)
        gain, shift = _load(gain_c_ptr, n, known, ACC), _load(shift_c_ptr, n, known, ACC)
        c_hat = centred * c_scale
        h = o * tanh(c_hat * gain + shift)
        if scales_ptr is not None:
            tl.store(c_hat_ptr + unit, c_hat.to(c_hat_ptr.dtype.element_ty), mask=known)
            tl.store(scales_ptr + b * 3, x_scale)
            tl.store(scales_ptr + b * 3 + 1, v_scale)
            tl.store(scales_ptr + b * 3 + 2, c_scale)
    row = t.to(tl.int64) * batch + b
    h = _mixed(seed_ptr, _share(seed_ptr, row, n, SHARE_H, BELOW_H, ACC), h_in, h)
    c = _mixed(seed_ptr, _share(_second(seed_ptr), row, n, SHARE_C, BELOW_C, ACC), c_in, c)

    live = known
    if valid_ptr is not None:
        live = known & (tl.load(valid_ptr + b) != 0)
    tl.store(h_ptr + unit, h.to(h_ptr.dtype.element_ty), mask=live)
    tl.store(c_ptr + unit, c.to(c_ptr.dtype.element_ty), mask=live)
    out_type = output_ptr.dtype.element_ty
    tl.store(output_ptr + unit, tl.where(live, h, 0.0).to(out_type), mask=known)
    if gates_ptr is not None:
        i, f = tl.where(live, i, 0.0), tl.where(live, f, 0.0)
        g, o = tl.where(live, g, 0.0), tl.where(live, o, 0.0)
        store_gates(gates_ptr, i, f, g, o, gate, width, known)
        tl.store(cells_ptr + unit, tl.where(live, c, 0.0).to(out_type), mask=known)


@triton.jit
def _through_norm(saved_ptr, out_ptr, gate, known, live, z_i, z_f, z_g, z_o, gain_ptr, scale,
                  n, width, ACC: tl.constexpr):  # fmt: skip
    """From the gradient of a norm's result, four gates wide, to that of its argument."""
    d_i, d_f = z_i * _load(gain_ptr, n, known, ACC), z_f * _load(gain_ptr, n + width, known, ACC)
    d_g = z_g * _load(gain_ptr, n + 2 * width, known, ACC)
    d_o = z_o * _load(gain_ptr, n + 3 * width, known, ACC)
    x_i, x_f, x_g, x_o = load_gates(saved_ptr, gate, width, known, ACC)
    total = _sum4(d_i, d_f, d_g, d_o) / (4 * width)
    slope = _sum4(d_i * x_i, d_f * x_f, d_g * x_g, d_o * x_o) / (4 * width)
    d_i = tl.where(live, scale * (d_i - total - x_i * slope), 0.0)
    d_f = tl.where(live, scale * (d_f - total - x_f * slope), 0.0)
    d_g = tl.where(live, scale * (d_g - total - x_g * slope), 0.0)
    d_o = tl.where(live, scale * (d_o - total - x_o * slope), 0.0)
    store_gates(out_ptr, d_i, d_f, d_g, d_o, gate, width, known)


@triton.jit(do_not_specialize=VARYING)
def lstm_regularized_step_backward(
    grad_output_ptr,  # [B, H] or None, as are the next two
    grad_gates_ptr,  # [B, 4H]
    grad_cells_ptr,  # [B, H]
    gates_ptr,  # [B, 4H]
    c_in_ptr,  # [B, H]: what entered the step
    x_hat_ptr,  # [B, 4H]; None without norms, as is all that belongs to them
    v_hat_ptr,  # [B, 4H]
    c_hat_ptr,  # [B, H]
    scales_ptr,  # [B, 3]
    gain_ih_ptr,  # [4H]
    gain_hh_ptr,  # [4H]
    gain_c_ptr,  # [H]
    shift_c_ptr,  # [H]
    seed_ptr,  # [2] or None
    valid_ptr,  # [B] uint8 or None
    dh_ptr,  # [B, H] of the compute type: of what leaves the step; then what zoneout handed on
    dc_ptr,  # [B, H] of the compute type: of what leaves the step; then of what entered it
    dz_ptr,  # [B, 4H], of the pre-activations
    dx_ptr,  # [B, 4H], of W_ih x
    dv_ptr,  # [B, 4H], of W_hh h
    dn_ptr,  # [B, H], of the normalised c with gain and shift
    t, batch, width,
    SHARE_H: tl.constexpr, SHARE_C: tl.constexpr, BELOW_H: tl.constexpr, BELOW_C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    known = n < width
    live = known
    if valid_ptr is not None:
        live = known & (tl.load(valid_ptr + b) != 0)
    gate, unit = b * 4 * width + n, b * width + n
    i, f, g, o = load_gates(gates_ptr, gate, width, known, ACC)
    c_in = _load(c_in_ptr, unit, known, ACC)
    if gain_ih_ptr is not None:
        gain, c_hat = _load(gain_c_ptr, n, known, ACC), _load(c_hat_ptr, unit, known, ACC)
        y = tanh(c_hat * gain + _load(shift_c_ptr, n, known, ACC))
    else:
        y = tanh(f * c_in + i * g)

    row = t.to(tl.int64) * batch + b
    old_h, old_c = _load(dh_ptr, unit, known, ACC), _load(dc_ptr, unit, known, ACC)
    dh = old_h + _load(grad_output_ptr, unit, known, ACC)
    dc = old_c + _load(grad_cells_ptr, unit, known, ACC)
    share_h = _share(seed_ptr, row, n, SHARE_H, BELOW_H, ACC)
    share_c = _share(_second(seed_ptr), row, n, SHARE_C, BELOW_C, ACC)
    kept_h, kept_c = dh * share_h, dc * share_c
    dh, dc = dh * (1.0 - share_h), dc * (1.0 - share_c)
    dn = dh * o * (1.0 - y * y)
    if gain_ih_ptr is not None:
        p = dn * gain
        total, slope = tl.sum(p, 0) / width, tl.sum(p * c_hat, 0) / width
        dc += tl.load(scales_ptr + b * 3 + 2) * (p - total - c_hat * slope)
        tl.store(dn_ptr + unit, tl.where(live, dn, 0.0).to(dn_ptr.dtype.element_ty), mask=known)
    else:
        dc += dn
    z_i = (dc * g + _load(grad_gates_ptr, gate, known, ACC)) * i * (1.0 - i)
    z_f = (dc * c_in + _load(grad_gates_ptr, gate + width, known, ACC)) * f * (1.0 - f)
    z_g = (dc * i + _load(grad_gates_ptr, gate + 2 * width, known, ACC)) * (1.0 - g * g)
    z_o = (dh * y + _load(grad_gates_ptr, gate + 3 * width, known, ACC)) * o * (1.0 - o)
    z_i, z_f = tl.where(live, z_i, 0.0), tl.where(live, z_f, 0.0)
    z_g, z_o = tl.where(live, z_g, 0.0), tl.where(live, z_o, 0.0)
    store_gates(dz_ptr, z_i, z_f, z_g, z_o, gate, width, known)
    if gain_ih_ptr is not None:
        _through_norm(x_hat_ptr, dx_ptr, gate, known, live, z_i, z_f, z_g, z_o, gain_ih_ptr,
                      tl.load(scales_ptr + b * 3), n, width, ACC)  # fmt: skip
        _through_norm(v_hat_ptr, dv_ptr, gate, known, live, z_i, z_f, z_g, z_o, gain_hh_ptr,
                      tl.load(scales_ptr + b * 3 + 1), n, width, ACC)  # fmt: skip
    tl.store(dh_ptr + unit, tl.where(live, kept_h, old_h), mask=known)
    tl.store(dc_ptr + unit, tl.where(live, dc * f + kept_c, old_c), mask=known)
