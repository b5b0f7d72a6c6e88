"""Gate maths shared by the Triton kernels: sigmoid, tanh and the pointwise LSTM cell.

Everything here computes in the dtype it is given; callers widen 16-bit storage first. Written
with `tl.exp` alone (no libdevice), so that one source runs on NVIDIA, on AMD and in Triton's
interpreter.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exact 0 and 1 at the ends, NaN stays NaN."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """tanh by an odd minimax polynomial below 0.625 and by exp above.

    1 - 2/(exp(2x)+1) alone cancels near zero (error 5e-5 at x = 1e-3 in fp32); the polynomial's
    own relative error is 1.5e-8 in fp32 (5 terms) and 1.4e-18 in fp64 (12 terms).
    """
    a = tl.abs(x)
    s = x * x
    if x.dtype == tl.float64:
        p = 6.48516348279311315e-6 * s - 3.12011014257974e-5
        p = p * s + 9.25711612955676827e-5
        p = p * s - 2.37590649605556196e-4
        p = p * s + 5.89660657775704335e-4
        p = p * s - 1.45577541204780551e-3
        p = p * s + 3.59212175115496227e-3
        p = p * s - 8.86323510324087792e-3
        p = p * s + 2.18694885190083058e-2
        p = p * s - 5.39682539678969917e-2
        p = p * s + 1.33333333333330416e-1
        p = p * s - 3.33333333333333329e-1
    else:
        p = -6.09671416590819757e-3 * s + 2.09971789990747506e-2
        p = p * s - 5.38509095785135808e-2
        p = p * s + 1.33327697369763279e-1
        p = p * s - 3.33333289441342546e-1
    near = x + x * s * p
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def lstm_point(z_i, z_f, z_g, z_o, c_prev):
    """Pre-activations and c_{t-1} to (i, f, g, o, c, h): c = f c_{t-1} + i g, h = o tanh(c)."""
    i = sigmoid(z_i)
    f = sigmoid(z_f)
    g = tanh(z_g)
    o = sigmoid(z_o)
    c = f * c_prev + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def lstm_point_backward(i, f, g, o, c, c_prev, d_h, d_c, d_i, d_f, d_g, d_o):
    """Gradients of h, c and of the activated gates to those of the pre-activations and c_{t-1}.

    d_c' = d_c + d_h o (1 - tanh(c)^2); dz_i = (d_c' g + d_i) i (1-i);
    dz_f = (d_c' c_{t-1} + d_f) f (1-f); dz_g = (d_c' i + d_g) (1-g^2);
    dz_o = (d_h tanh(c) + d_o) o (1-o); dc_{t-1} = d_c' f.
    """
    tanh_c = tanh(c)
    d_c = d_c + d_h * o * (1.0 - tanh_c * tanh_c)
    dz_i = (d_c * g + d_i) * i * (1.0 - i)
    dz_f = (d_c * c_prev + d_f) * f * (1.0 - f)
    dz_g = (d_c * i + d_g) * (1.0 - g * g)
    dz_o = (d_h * tanh_c + d_o) * o * (1.0 - o)
    return dz_i, dz_f, dz_g, dz_o, d_c * f
