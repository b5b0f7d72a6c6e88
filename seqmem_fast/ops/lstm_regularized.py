r"""One LSTM layer with zoneout and layer normalisation over a whole sequence.

.. math::
    (z_i, z_f, z_g, z_o) &= N(W_{ih} x_t; a_{ih}) + N(W_{hh} h_{t-1}; a_{hh}) + b_{ih} + b_{hh} \\
    \hat c_t &= \sigma(z_f) \odot c_{t-1} + \sigma(z_i) \odot \tanh(z_g) \\
    \hat h_t &= \sigma(z_o) \odot \tanh(N(\hat c_t; a_c) + s_c) \\
    c_t &= d^c_t \odot c_{t-1} + (1 - d^c_t) \odot \hat c_t \\
    h_t &= d^h_t \odot h_{t-1} + (1 - d^h_t) \odot \hat h_t

with N(v; a) = a (v - mean v) / sqrt(var v + 1e-5), over all 4H values of W x and of W h, and over
the H of c; without norms N is the identity and s_c zero. haste's LayerNormLSTM normalises the same
three; it has one bias, the order i, g, f, o, and zoneout of h alone.

Papers: layer normalisation: Ba, Kiros & Hinton, arXiv 1607.06450, 2016; zoneout: Krueger et al.,
arXiv 1606.01305, 2017.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import lstm_regularized as reference
from .common import by_fields, differentiate_through, fall_back, require_tensors
from .flops import Shape, count_products, of_weights
from .lstm import State, _zeros

__all__ = ["LSTMNorms", "lstm_regularized"]


class LSTMNorms(NamedTuple):
    """Gains of the norms of W_ih x and W_hh h, both [4H], gain and shift of c's norm, both [H]."""

    gain_ih: Tensor
    gain_hh: Tensor
    gain_c: Tensor
    shift_c: Tensor


class Operands(NamedTuple):
    """The first of the op, and of its backward after the incoming gradients."""

    input: Tensor
    hx: Tensor | None
    cx: Tensor | None
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None


class Norms(NamedTuple):
    """As :class:`LSTMNorms`, or None all four."""

    gain_ih: Tensor | None
    gain_hh: Tensor | None
    gain_c: Tensor | None
    shift_c: Tensor | None


class Zoneout(NamedTuple):
    seed: Tensor | None
    zoneout_h: float
    zoneout_c: float


class Steps(NamedTuple):
    """How a batch's steps are laid out."""

    lengths: Tensor | None
    reset: Tensor | None
    batch_sizes: Tensor | None
    batch_first: bool
    reverse: bool


@by_fields
def _plain(
    operands: Operands, norms: Norms, zoneout: Zoneout, steps: Steps
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given: Any = operands
    input, hx, cx, *weights = given
    state = None if hx is None or cx is None else (hx, cx)
    options: Any = {**zoneout._asdict(), **steps._asdict()}
    options["norms"] = None if norms.gain_ih is None else norms
    output, (hy, cy), gates, cells = reference.lstm_regularized(
        input, state, *weights, **options, return_gates=True
    )
    return output, hy, cy, gates, cells  # type: ignore[return-value]


def _plain_op(*arguments: Any) -> tuple[Tensor | None, ...]:
    *tensors, _ = arguments
    return *_plain(*tensors), None, None, None, None


_lstm_regularized = fall_back("lstm_regularized", _plain_op)
differentiate_through(
    "lstm_regularized", _plain, gradients=5, wanted=(0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2)
)


def _products(input: Shape, weight_ih: Shape, weight_hh: Shape) -> int:
    return math.prod(input[:-1]) * of_weights(weight_ih, weight_hh)


count_products("lstm_regularized", _products)


def lstm_regularized(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    norms: LSTMNorms | None = None,
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
    """The equation and the papers are in the module's docstring; all else as ``ops.lstm_trace``.

    Args:
        norms: None for an LSTM without layer normalisation.
        zoneout_h, zoneout_c: the probability, in 0..1, that a unit keeps its h, or c.
        seed: int64 [2], for training: d is a mask of 0 and 1, drawn with these probabilities, those
            of h from the first number and those of c from the second. A unit's mask depends on its
            number, time and place in the batch (of a packed input's longest first) alone. None, for
            evaluation: d is the probability itself, the expectation of such a mask.

    Returns:
        output, (hy, cy), and with ``return_gates`` gates (i, f, g, o) and cells (every c_t), else
        None and None; all differentiable, any number of times: the first derivative has its own
        kernel, higher ones run in plain PyTorch, as does everything inside a ``torch.func``
        transform. Results on the CPU are the same bits for any number of threads.

    Raises:
        ValueError: a shape or value does not fit. TypeError: a dtype, device or type does not.
    """
    rows = {"lengths": lengths, "reset": reset, "batch_sizes": batch_sizes}
    require_tensors("lstm_regularized", seed=seed, **rows)
    if norms is not None and len(norms) != len(LSTMNorms._fields):
        raise ValueError(
            f"seqmem::lstm_regularized: expected norms of {', '.join(LSTMNorms._fields)}, "
            f"got {len(norms)}"
        )
    if hx is None and batch_sizes is not None and torch.compiler.is_compiling():
        hx = _zeros(input, weight_hh, None, int(batch_sizes[0]))
    h, c = (None, None) if hx is None else hx
    found: Any = _lstm_regularized(
        *(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, *(norms or (None,) * 4)),
        *(seed, zoneout_h, zoneout_c),
        *(lengths, reset, batch_sizes, batch_first, reverse, return_gates),
    )
    output, hy, cy, gates, cells, *_ = found
    traced = (gates, cells) if return_gates else (None, None)
    return output, (hy, cy), *traced
