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

It has no kernel of its own: the products of all
steps that wait for no other are one each (W_ih x, and every weight's gradient), and between them a
few calls of torch a step, whose backward is written out. On any device, but on a GPU the launches
of these calls take longer than their work.

Papers: layer normalisation: Ba, Kiros & Hinton, arXiv 1607.06450, 2016; zoneout: Krueger et al.,
arXiv 1606.01305, 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import lstm_regularized as reference
from .common import autocast_dtype, overridden, transform_active
from .lstm_regularized_steps import ARGUMENTS, Steps

__all__ = ["LSTMNorms", "lstm_regularized"]

State = tuple[Tensor, Tensor]
NAME = "seqmem::lstm_regularized"


class LSTMNorms(NamedTuple):
    """Gains of the norms of W_ih x and W_hh h, both [4H], gain and shift of c's norm, both [H]."""

    gain_ih: Tensor
    gain_hh: Tensor
    gain_c: Tensor
    shift_c: Tensor


def lstm_regularized(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    norms: LSTMNorms | None = None,
    *,
    zoneout_h: Tensor | float = 0.0,
    zoneout_c: Tensor | float = 0.0,
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
        zoneout_h, zoneout_c: d of the equation: a bool tensor [T, B, H], whatever the input's
            layout, true where a unit keeps its value (training), or a number in 0..1, the
            expectation of such a mask (evaluation). A packed input has T = ``len(batch_sizes)``
            and B = ``batch_sizes[0]``.

    Returns:
        output, (hy, cy), and with ``return_gates`` gates (i, f, g, o) and cells (every c_t), else
        None and None; all differentiable, any number of times: the first derivative is written
        out, higher ones run in plain PyTorch, as does everything inside a ``torch.func``
        transform, torch.compile and torch.export.

    Raises:
        ValueError: a shape or value does not fit. TypeError: a dtype, device or type does not.
    """
    h, c = (None, None) if hx is None else hx
    tensors = (input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, *(norms or (None,) * 4))
    layout = lengths, reset, batch_sizes, batch_first, reverse
    _check(tensors, zoneout_h, zoneout_c, *layout)
    rest = zoneout_h, zoneout_c, *layout, return_gates
    lower = autocast_dtype(input)
    if lower is None or input.dtype == torch.float64:
        results = _run(*tensors, *rest)
    else:
        cast = (None if each is None else each.to(lower) for each in tensors)
        with torch.autocast(input.device.type, enabled=False):
            results = _run(*cast, *rest)
    output, hy, cy, gates, cells = results
    return output, (hy, cy), gates, cells


def _run(*arguments: Any) -> reference.Results:
    plain = transform_active() or torch.compiler.is_compiling()
    if plain or overridden(*arguments[: len(ARGUMENTS)]):
        return reference.lstm_regularized(*arguments)
    results: reference.Results = Steps.apply(*arguments)
    return results


def _check(
    tensors: Sequence[Any],
    zoneout_h: Tensor | float,
    zoneout_c: Tensor | float,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    batch_first: bool,
    reverse: bool,
) -> None:
    input, weight_hh = tensors[0], tensors[4]
    packed = batch_sizes is not None
    if input.dim() != 3 - packed:
        raise ValueError(
            f"{NAME}: expected input of {3 - packed} dimensions, got shape {list(input.shape)}"
        )
    if not input.is_floating_point():
        raise TypeError(f"{NAME}: expected a floating input, got {input.dtype}")
    if batch_sizes is not None:
        if lengths is not None or reset is not None or batch_first:
            raise ValueError(
                f"{NAME}: expected a packed input (batch_sizes) without lengths, reset and "
                "batch_first, got one of them"
            )
        steps, batch = batch_sizes.numel(), int(batch_sizes[0]) if batch_sizes.numel() else 0
    else:
        steps, batch = input.shape[:2][:: -1 if batch_first else 1]
    if steps == 0:
        raise ValueError(
            f"{NAME}: expected at least one time step, got input of shape {list(input.shape)}"
        )
    hidden, width = weight_hh.size(-1), input.size(-1)
    gates, state = [4 * hidden], [batch, hidden]
    shapes = [[*input.shape], state, state, [*gates, width], [*gates, hidden]]
    shapes += [gates] * 4 + [[hidden]] * 2
    for name, tensor, shape in zip(ARGUMENTS, tensors, shapes, strict=True):
        if tensor is None:
            continue
        if list(tensor.shape) != shape:
            raise ValueError(f"{NAME}: expected {name} of shape {shape}, got {list(tensor.shape)}")
        if tensor.dtype != input.dtype and autocast_dtype(input) is None:
            raise TypeError(f"{NAME}: expected {name} of {input.dtype}, got {tensor.dtype}")
        if tensor.device != input.device:
            raise TypeError(f"{NAME}: expected {name} on {input.device}, got {tensor.device}")
    _check_zoneout("zoneout_h", zoneout_h, [steps, *state], input.device)
    _check_zoneout("zoneout_c", zoneout_c, [steps, *state], input.device)
    _check_layout(lengths, reset, batch, steps, batch_first)


def _check_zoneout(
    name: str, zoneout: Tensor | float, shape: list[int], device: torch.device
) -> None:
    if not isinstance(zoneout, Tensor):
        if not 0 <= zoneout <= 1:
            raise ValueError(f"{NAME}: expected {name} in 0..1, got {zoneout}")
        return
    if zoneout.dtype != torch.bool or zoneout.device != device:
        got = f"{zoneout.dtype} on {zoneout.device}"
        raise TypeError(f"{NAME}: expected a bool {name} on {device}, got {got}")
    if list(zoneout.shape) != shape:
        raise ValueError(f"{NAME}: expected {name} of shape {shape}, got {list(zoneout.shape)}")


def _check_layout(
    lengths: Tensor | None, reset: Tensor | None, batch: int, steps: int, batch_first: bool
) -> None:
    if reset is not None:
        shape = [batch, steps] if batch_first else [steps, batch]
        if reset.dtype != torch.bool:
            raise TypeError(f"{NAME}: expected reset of dtype bool, got {reset.dtype}")
        if list(reset.shape) != shape:
            raise ValueError(f"{NAME}: expected reset of shape {shape}, got {list(reset.shape)}")
    if lengths is None:
        return
    if lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{NAME}: expected lengths of dtype int64 or int32, got {lengths.dtype}")
    if list(lengths.shape) != [batch]:
        raise ValueError(f"{NAME}: expected lengths of shape {[batch]}, got {list(lengths.shape)}")
    if batch and lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > steps:
            raise ValueError(f"{NAME}: expected lengths in 0..{steps}, got {low}..{high}")
