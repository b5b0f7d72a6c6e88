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

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Draw, Sample, dropped, samples
from .lstm import Layout, State
from .lstm import sample_inputs as lstm_samples

EPSILON = 1e-5  # as nn.LayerNorm


def lstm_regularized(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    norms: Sequence[Tensor] | None = None,
    *,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    seed: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    batch_first: bool = False,
    reverse: bool = False,
    return_gates: bool = False,
) -> tuple[Tensor, State, Tensor | None, Tensor | None]:
    """norms: gain_ih, gain_hh [4H], gain_c, shift_c [H]; a seed [2] draws the masks."""
    layout = Layout(input, lengths, reset, batch_sizes, batch_first, reverse)
    x = layout.to_padded(input)  # [T, B, I]
    zeros = x.new_zeros(x.size(1), weight_hh.size(1))
    h, c = (zeros, zeros) if hx is None else hx
    gain_ih, gain_hh, gain_c, shift_c = (None,) * 4 if norms is None else norms
    keep_h, keep_c = kept(x, zeros, seed, zoneout_h, zoneout_c)
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
        h_new, c_new = mixed(keep_h, t, h_in, h_new), mixed(keep_c, t, c_in, c_new)
        h, c = layout.keep(t, h_new, h), layout.keep(t, c_new, c)
        new = h_new, torch.cat((i, f, g, o), -1), c_new
        steps[t] = [layout.keep(t, each, each.new_zeros(())) for each in new]
    columns = zip(*steps, strict=True)
    output, gates, cells = (layout.from_padded(torch.stack(column)) for column in columns)
    return output, (h, c), gates if return_gates else None, cells if return_gates else None


def kept(
    x: Tensor, state: Tensor, seed: Tensor | None, zoneout_h: float, zoneout_c: float
) -> tuple[Tensor | float, Tensor | float]:
    """What each unit keeps of h and of c: bool [T, B, H], or the share that is its expectation."""
    if seed is None:
        return zoneout_h, zoneout_c
    shape = (x.size(0), *state.shape)
    return dropped(shape, zoneout_h, seed[:1]), dropped(shape, zoneout_c, seed[1:])


def normalized(v: Tensor, gain: Tensor | None, shift: Tensor | None = None) -> Tensor:
    """N of the formulas; v itself without a gain."""
    if gain is None:
        return v
    centred = v - v.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    scaled = centred * torch.rsqrt(variance + EPSILON) * gain
    return scaled if shift is None else scaled + shift


def mixed(zoneout: Tensor | float, t: int, old: Tensor, new: Tensor) -> Tensor:
    """State of step t from the one that enters it and the new one."""
    if isinstance(zoneout, Tensor):
        return torch.where(zoneout[t], old, new)
    return new + zoneout * (old - new) if zoneout else new


@samples(5, 3, 4, 6)
def sample_inputs(draw: Draw, sizes: Sequence[int]) -> Iterator[Sample]:
    """Calls of :func:`lstm_regularized`: those of the LSTM without projection, with norms, zoneout
    or both; sizes = (T, B, I, H)."""
    of_lstm = lstm_samples(draw.device, draw.dtype, sizes=sizes, seed=draw.first)
    draw = Draw(draw.device, draw.dtype, draw.first + 1)
    hidden = sizes[-1]
    shares = {"zoneout_h": 0.3, "zoneout_c": 0.2}

    def options() -> Iterator[tuple[str, tuple[Tensor, ...] | None, dict[str, float | Tensor]]]:
        while True:
            norms = tuple(draw(n * hidden) for n in (4, 4, 1, 1))
            yield "norm zoneout", norms, {**shares, "seed": draw.seed(2)}
            yield "zoneout", None, {**shares, "seed": draw.seed(2)}
            yield "norm", norms, {}
            yield "norm expected", norms, dict(shares)
            yield "expected", None, {"zoneout_h": 0.3}

    chosen = options()
    for layout, args, kwargs, _ in of_lstm:
        input, hx, weight_ih, weight_hh, *biases, projection = args
        if projection is not None:
            hx = draw(sizes[1], hidden), draw(sizes[1], hidden)
            weight_hh = draw(4 * hidden, hidden, scale=hidden**-0.5)
        name, norms, more = next(chosen)
        operands = input, hx, weight_ih, weight_hh, *biases, norms
        yield Sample(f"{layout} {name}", operands, {**kwargs, **more})
