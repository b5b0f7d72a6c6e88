r"""Functional LSTM: one step, a whole sequence, and a whole sequence with its gates.

.. math::
    i, f, o &= \sigma(W_{ih}^{i,f,o} x_t + b_{ih} + W_{hh}^{i,f,o} h_{t-1} + b_{hh}) \\
    g &= \tanh(W_{ih}^g x_t + b_{ih} + W_{hh}^g h_{t-1} + b_{hh}) \\
    c_t &= f \odot c_{t-1} + i \odot g, \qquad h_t = W_{hr} (o \odot \tanh c_t)

Letters: T time, B batch, I input, H hidden; P = ``weight_hr.size(0)``, or H without ``weight_hr``.

Papers: Hochreiter & Schmidhuber, Long Short-Term Memory, Neural Computation 9(8), 1997; the forget
gate: Gers, Schmidhuber & Cummins, Learning to Forget, Neural Computation 12(10), 2000; the
projection: Sak, Senior & Beaufays, arXiv 1402.1128, 2014.

Common to all three functions. Every floating tensor is float32, float64, bfloat16 or float16, all
of one dtype and one device, and is differentiable, any number of times: the first derivative has
its own kernel, higher ones run in plain PyTorch. Strides are free. Inside a ``torch.func``
transform (grad, vmap, jacrev, ...) the whole call runs in plain PyTorch, since these transforms
cannot see into C++ functions: right, but slow.

Under ``torch.autocast`` the floating tensors are cast to its dtype. On CPU :func:`lstm_cell`
computes in the dtype that this and c promote to (without a state, this and the input), as torch's
cell does, so that a float32 state is not rounded at every step.

Raises:
    ValueError: a shape or value does not fit; the message names the argument, what was expected
        and what came. Also when T = 0 (B = 0 works).
    TypeError: a dtype, device or layout does not fit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..reference import lstm as reference
from .common import (
    Gradients,
    differentiate,
    dynamo_traces,
    fall_back,
    overridden,
    require_tensors,
    transform_active,
)
from .flops import Shape, count_products, of_weights

__all__ = ["lstm", "lstm_cell", "lstm_trace"]

State = tuple[Tensor, Tensor]
# weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
# lengths, reset, batch_sizes, batch_first, reverse
Options = tuple[Tensor | None, Tensor | None, Tensor | None, bool, bool]


def _plain_cell(
    input: Tensor, hx: Tensor | None, cx: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, None]:
    *weights, _ = rest
    return *reference.lstm_cell(input, _state(hx, cx), *weights), None


def _plain(
    input: Tensor, hx: Tensor | None, cx: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *weights, lengths, reset, batch_sizes, batch_first, reverse, _ = rest
    output, (hy, cy), gates, cells = reference.lstm_trace(
        input,
        _state(hx, cx),
        *weights,
        lengths=lengths,
        reset=reset,
        batch_sizes=batch_sizes,
        batch_first=batch_first,
        reverse=reverse,
    )
    return output, hy, cy, gates, cells


def _onnx(
    input: Tensor, hx: Tensor | None, cx: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ONNX's own LSTM where it can be, else one step after the other."""
    *weights, w_hr, lengths, reset, batch_sizes, batch_first, reverse, return_gates = rest
    if return_gates or any(each is not None for each in (w_hr, reset, batch_sizes)):
        return _plain(input, hx, cx, *rest)
    x = input.transpose(0, 1) if batch_first else input
    (time, batch), hidden = x.shape[:2], weights[1].size(1)
    # ONNX's order of the rows is i, o, f, g.
    w_ih, w_hh, *biases = (
        each.unflatten(0, (4, hidden))[[0, 3, 1, 2]].flatten(0, 1)
        for each in weights
        if each is not None
    )
    bias = torch.cat(biases)[None] if biases else None
    # ONNX Runtime refuses lengths of 0.
    ends = None if lengths is None else lengths.clamp(min=1).to(torch.int32)
    h, c = (None if state is None else state[None] for state in (hx, cx))
    output, hy, cy = torch.onnx.ops.symbolic_multi_out(
        "ai.onnx::LSTM",
        (x, w_ih[None], w_hh[None], bias, ends, h, c),
        {"hidden_size": hidden, "direction": "reverse" if reverse else "forward"},
        dtypes=[x.dtype] * 3,
        shapes=[(time, 1, batch, hidden), (1, batch, hidden), (1, batch, hidden)],
    )
    output, hy, cy = output[:, 0], hy[0], cy[0]
    if lengths is not None:
        runs = (lengths > 0)[:, None]
        output = output * runs
        hy = torch.where(runs, hy, 0 if hx is None else hx)
        cy = torch.where(runs, cy, 0 if cx is None else cx)
    empty = input.new_empty(0)
    return output.transpose(0, 1) if batch_first else output, hy, cy, empty, empty


def _state(hx: Tensor | None, cx: Tensor | None) -> State | None:
    return None if hx is None or cx is None else (hx, cx)


_lstm_cell = fall_back("lstm_cell", _plain_cell)
_lstm = fall_back("lstm", _plain, _onnx)


def _products(
    input: Shape, weight_ih: Shape, weight_hh: Shape, weight_hr: Shape | None = None
) -> int:
    return math.prod(input[:-1]) * of_weights(weight_ih, weight_hh, weight_hr or ())


count_products("lstm", _products)
count_products("lstm_cell", _products)


def lstm_cell(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> State:
    """One LSTM step; the equation, dtypes and errors are in the module's docstring.

    Args:
        input: [B, I].
        hx: (h, c), both [B, H]; None means zeros.
        weight_ih: [4H, I], rows in the order i, f, g, o.
        weight_hh: [4H, H].
        bias_ih, bias_hh: [4H], optional.

    Returns:
        (hy, cy), both [B, H].
    """
    h, c = (None, None) if hx is None else hx
    tensors = (input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)
    if not (transform_active() or dynamo_traces() or overridden(*tensors)):
        return _C.lstm_cell(*tensors)
    hy, cy, _ = _lstm_cell(*tensors, False)
    return hy, cy


def lstm(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    batch_first: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, State]:
    """One layer in one direction over a whole sequence, as a single op.

    The equation, dtypes and errors are in the module's docstring.

    Args:
        input: [T, B, I]; [B, T, I] with ``batch_first``; [sum(batch_sizes), I] packed.
        hx: (h, c) of shapes [B, P] and [B, H]; None means zeros.
        weight_ih: [4H, I], rows in the order i, f, g, o.
        weight_hh: [4H, P].
        bias_ih, bias_hh: [4H], optional.
        weight_hr: [P, H], projects each step's hidden state.
        lengths: [B], int64 or int32, 0 <= lengths <= T, on the CPU or the input's device. Row b
            ends after ``lengths[b]`` steps: later outputs are zero, the final state is that of its
            last step (the initial state for length 0). What the padding holds does not matter.
            On a GPU they are clamped to 0..T, as a check would wait for it; while a CUDA graph is
            captured they must be there, and the input may not be packed.
        reset: bool [T, B] ([B, T] with ``batch_first``): where true, no state passes from step
            t - 1 to step t (nor, with ``reverse``, from t to t - 1). ``reset[0]`` cuts off hx,
            except in reverse, where it does nothing.
        batch_sizes: [T], int64, CPU, as in ``torch.nn.utils.rnn.PackedSequence``: positive and
            never growing. Excludes ``lengths``, ``reset`` and ``batch_first``.
        batch_first: batch before time in input, output and reset.
        reverse: run from the last step of each row to its first.

    Returns:
        output (laid out as input, width P) and (hy, cy), of shapes [B, P] and [B, H].
    """
    weights = weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
    options = lengths, reset, batch_sizes, batch_first, reverse
    output, hy, cy, _, _ = _run(input, hx, weights, options, False)
    return output, (hy, cy)


def lstm_trace(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    batch_first: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, State, Tensor, Tensor]:
    """As :func:`lstm`, and the gates and cell states of every step come back as well.

    Returns:
        output, (hy, cy), gates [T, B, 4H] (i, f, g, o after their sigmoid or tanh) and cells
        [T, B, H] (every c_t), the last two laid out as input; all of them differentiable. Beyond
        ``lengths`` gates and cells are zero.
    """
    weights = weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
    options = lengths, reset, batch_sizes, batch_first, reverse
    output, hy, cy, gates, cells = _run(input, hx, weights, options, True)
    return output, (hy, cy), gates, cells


def lone_layer(
    input: Tensor,
    hx: State | None,
    weights: Weights,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
) -> tuple[Tensor, State]:
    """:func:`lstm` for a stack of this one layer: states come and go as [1, B, *].

    The modules' short way: for one step of one row, half the time of the long one.
    """
    h, c = (None, None) if hx is None else hx
    if not (transform_active() or dynamo_traces() or overridden(input, h, c, *weights)):
        return _C.lstm_layer(input, h, c, *weights, lengths, reset, batch_first)
    state = None if hx is None else (hx[0].squeeze(0), hx[1].squeeze(0))
    options = lengths, reset, None, batch_first, False
    output, hy, cy, _, _ = _run(input, state, weights, options, False)
    return output, (hy.unsqueeze(0), cy.unsqueeze(0))


def _run(
    input: Tensor, hx: State | None, weights: Weights, options: Options, return_gates: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op on a state that may be missing."""
    lengths, reset, batch_sizes, *_ = options
    if lengths is not None or reset is not None or batch_sizes is not None:
        require_tensors("lstm", lengths=lengths, reset=reset, batch_sizes=batch_sizes)
    if hx is None and batch_sizes is not None and torch.compiler.is_compiling():
        hx = _zeros(input, weights[1], weights[4], int(batch_sizes[0]))
    h, c = (None, None) if hx is None else hx
    return _lstm(input, h, c, *weights, *options, return_gates)


def _zeros(input: Tensor, weight_hh: Tensor, weight_hr: Tensor | None, batch: int) -> State:
    """What hx None means, for a compiler: to it, the batch of a packed input is unknown data."""
    hidden = weight_hh.size(0) // 4
    out = hidden if weight_hr is None else weight_hr.size(0)
    return input.new_zeros(batch, out), input.new_zeros(batch, hidden)


def _cell_vjp(*args: Any) -> Gradients:
    has_bias, wanted = args[-2:]
    return _masked(reference.lstm_cell_backward(*args[:-2]), args[4], has_bias, wanted)


def _lstm_vjp(*args: Any) -> Gradients:
    *tensors, has_bias, batch_first, reverse, wanted = args
    layout = {"batch_first": batch_first, "reverse": reverse}
    grads = reference.lstm_backward(*tensors, **layout)
    return _masked(grads, tensors[6], has_bias, wanted)


def _masked(grads: Gradients, hx: Tensor | None, has_bias: bool, wanted: list[bool]) -> Gradients:
    """None in the places that the backward op leaves empty."""
    input, state, weights = wanted[0], wanted[1] and hx is not None, wanted[2]
    kept = (input, state, state, weights, weights, weights and has_bias, weights)
    return tuple(grad if keep else None for grad, keep in zip(grads, kept, strict=False))


differentiate("lstm_cell_backward", _cell_vjp)
differentiate("lstm_backward", _lstm_vjp)
