r"""The LSTM with zoneout and layer normalisation in plain PyTorch.

.. math::
    (z_i, z_f, z_g, z_o) &= N(W_{ih} x_t; a_{ih}) + N(W_{hh} h_{t-1}; a_{hh}) + b_{ih} + b_{hh} \\
    i = \sigma(z_i), \quad f &= \sigma(z_f), \quad g = \tanh(z_g), \quad o = \sigma(z_o) \\
    \hat c_t &= f \odot c_{t-1} + i \odot g \\
    \hat h_t &= o \odot \tanh(N(\hat c_t; a_c) + s_c) \\
    c_t &= d^c_t \odot c_{t-1} + (1 - d^c_t) \odot \hat c_t \\
    h_t &= d^h_t \odot h_{t-1} + (1 - d^h_t) \odot \hat h_t

with N(v; a) = a (v - mean v) / sqrt(var v + 1e-5) over all of v; without norms N is the identity
and s_c zero. d is a mask of 0 and 1 in training (zoneout), its expectation, a number, otherwise.

Layer normalisation: Ba, Kiros & Hinton 2016 (arXiv 1607.06450), whose two shifts within z are one
with the biases here. Zoneout: Krueger et al. 2017 (arXiv 1606.01305).

Letters and the rest: ``reference/lstm.py``. Nothing here is fast; arguments are not checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .lstm import Layout

EPSILON = 1e-5  # as nn.LayerNorm

Results = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def lstm_regularized(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    gain_ih: Tensor | None,
    gain_hh: Tensor | None,
    gain_c: Tensor | None,
    shift_c: Tensor | None,
    zoneout_h: Tensor | float = 0.0,
    zoneout_c: Tensor | float = 0.0,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    batch_first: bool = False,
    reverse: bool = False,
    return_gates: bool = True,
) -> Results:
    """output, hy, cy, gates and cells; a zoneout is bool [T, B, H] or the share that is kept."""
    layout = Layout(input, lengths, reset, batch_sizes, batch_first, reverse)
    x = layout.to_padded(input)  # [T, B, I]
    zeros = x.new_zeros(x.size(1), weight_hh.size(1))
    h, c = zeros if hx is None else hx, zeros if cx is None else cx
    projected = normalized(F.linear(x, weight_ih), gain_ih)
    for bias in (bias_ih, bias_hh):
        projected = projected if bias is None else projected + bias

    steps: list[Sequence[Tensor]] = [()] * x.size(0)
    for t in layout.order:
        h_in, c_in = layout.enter(t, h), layout.enter(t, c)
        z = projected[t] + normalized(F.linear(h_in, weight_hh), gain_hh)
        z_i, z_f, z_g, z_o = z.chunk(4, -1)
        i, f, g, o = torch.sigmoid(z_i), torch.sigmoid(z_f), torch.tanh(z_g), torch.sigmoid(z_o)
        c_new = f * c_in + i * g
        h_new = o * torch.tanh(normalized(c_new, gain_c, shift_c))
        h_new, c_new = _mixed(zoneout_h, t, h_in, h_new), _mixed(zoneout_c, t, c_in, c_new)
        h, c = layout.keep(t, h_new, h), layout.keep(t, c_new, c)
        new = h_new, torch.cat((i, f, g, o), -1), c_new
        steps[t] = [layout.keep(t, each, each.new_zeros(())) for each in new]
    columns = zip(*steps, strict=True)
    output, gates, cells = (layout.from_padded(torch.stack(column)) for column in columns)
    if not return_gates:
        return output, h, c, None, None
    return output, h, c, gates, cells


def normalized(v: Tensor, gain: Tensor | None, shift: Tensor | None = None) -> Tensor:
    """N of the formulas; v itself without a gain."""
    if gain is None:
        return v
    centred = v - v.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    scaled = centred * torch.rsqrt(variance + EPSILON) * gain
    return scaled if shift is None else scaled + shift


def _mixed(zoneout: Tensor | float, t: int, old: Tensor, new: Tensor) -> Tensor:
    if isinstance(zoneout, Tensor):
        return torch.where(zoneout[t], old, new)
    return new + zoneout * (old - new) if zoneout else new
