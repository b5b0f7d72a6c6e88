"""LSTM and LSTMCell as torch.nn has them, over :mod:`seqmem_fast.ops.lstm`.

Constructor, parameters, initialisation and attributes are inherited from torch.nn's base classes,
the constructor's errors included; call forms are the same, and state_dicts load both ways. They
are no subclasses of ``torch.nn.LSTM``, whose every instance torch.compile refuses to trace.

Both ``forward`` use only attributes that torch.nn's modules have as well, so
:func:`seqmem_fast.accelerate` can run them on a ``torch.nn.LSTM`` or ``torch.nn.LSTMCell``.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import ops
from ..ops.common import autocast_dtype
from ..ops.lstm import State, Weights, lone_layer
from . import lstm_options
from .lstm_arguments import check_dims, check_pair, check_source, check_state, refuse_input, rows_of

__all__ = ["LSTM", "LSTMCell", "LSTMGates"]


class LSTMGates(NamedTuple):
    """Input, forget and output gates, candidate g and cell state c of every step.

    Each is [L*D, T, B, H] for L layers in D directions ([L*D, B, T, H] with ``batch_first``,
    [L*D, T, H] unbatched, [L*D, sum(batch_sizes), H] for a PackedSequence), differentiable.
    """

    i: Tensor
    f: Tensor
    g: Tensor
    o: Tensor
    c: Tensor


class LSTMCell(nn.RNNCellBase):
    """One LSTM step, a drop-in for :class:`torch.nn.LSTMCell`.

    Args:
        input_size: I, the width of the input.
        hidden_size: H, the width of h and c.
        bias: with bias_ih and bias_hh.
        device, dtype: of the parameters.
        forget_bias, zoneout_h, zoneout_c, layer_norm: as in :class:`LSTM`.

    ``cell(input, hx=None) -> (hy, cy)`` with input [B, I] and hx = (h, c), both [B, H]; or
    unbatched, [I] and [H]. hx None means zeros. Equation, errors and papers:
    :mod:`seqmem_fast.ops.lstm`.

    Parameters: weight_ih [4H, I], weight_hh [4H, H], bias_ih and bias_hh [4H], rows i, f, g, o,
    drawn from U(-1/sqrt(H), 1/sqrt(H)); with layer_norm those of :class:`LSTM` as well, without
    ``_l[k]``.
    """

    # Of the class too, where accelerate made a module ours.
    forget_bias: float | None = None
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    layer_norm: bool = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        forget_bias: float | None = None,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        lstm_options.check_forget_bias("lstm_cell", forget_bias, bias)
        lstm_options.check_regularization("lstm_cell", zoneout_h, zoneout_c, layer_norm)
        super().__init__(input_size, hidden_size, bias, 4, device, dtype)
        self.forget_bias, self.layer_norm = forget_bias, layer_norm
        self.zoneout_h, self.zoneout_c = zoneout_h, zoneout_c
        lstm_options.add_norms(self, [""], device, dtype)
        lstm_options.start(self)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        lstm_options.start(self)

    def extra_repr(self) -> str:
        return nn.RNNCellBase.extra_repr(self) + _said(self, LSTMCell, *_cell_options)

    @classmethod
    def from_torch(cls, module: nn.LSTMCell) -> LSTMCell:
        """The same cell over the very Parameters of a ``torch.nn.LSTMCell``.

        Raises a TypeError for another module, a ValueError where something computes a parameter
        (weight_norm, pruning, ...); :func:`seqmem_fast.accelerate` takes such modules as well.
        """
        sizes = module.input_size, module.hidden_size, module.bias
        check_source("lstm_cell", module, nn.LSTMCell, cls, _cell_names[: 4 if module.bias else 2])
        cell = cls(*sizes, device="meta", **_own_options(module, cls, *_cell_options))
        cell._parameters = module._parameters
        return cell.train(module.training)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        weights: Any = self._parameters
        try:
            w_ih, w_hh = weights["weight_ih"], weights["weight_hh"]
            b_ih, b_hh = weights["bias_ih"], weights["bias_hh"]
        except KeyError:  # a parametrization (weight_norm, ...) computes some of them
            w_ih, w_hh, b_ih, b_hh = (getattr(self, name) for name in _cell_names)
        if hx is not None:
            check_pair("lstm_cell", hx)
        if isinstance(self, LSTMCell) and lstm_options.is_regularized(self):
            step: Any = partial(_regularized_step, self)
        else:
            step = ops.lstm_cell
        dims = input.dim()
        if dims == 2:
            return step(input, hx, w_ih, w_hh, b_ih, b_hh)
        if dims != 1:
            refuse_input("lstm_cell", input, "B, I")
        if hx is not None:
            check_dims("lstm_cell", hx, 1)
            hx = hx[0].unsqueeze(0), hx[1].unsqueeze(0)
        hy, cy = step(input.unsqueeze(0), hx, w_ih, w_hh, b_ih, b_hh)
        return hy.squeeze(0), cy.squeeze(0)


class LSTM(nn.RNNBase):
    """A stack of LSTM layers over a sequence, a drop-in for :class:`torch.nn.LSTM`.

    Args:
        input_size: I, the width of the input.
        hidden_size: H, the width of the cell state.
        num_layers: L, layers on top of one another.
        bias: with bias_ih and bias_hh.
        batch_first: input and output are [B, T, *] instead of [T, B, *]; states stay [L*D, B, *].
        dropout: probability of zeroing, in training, an output of every layer but the last.
        bidirectional: D = 2 directions instead of 1, concatenated in the output.
        proj_size: P > 0 projects every h to width P < H; 0 means none, and P = H below.
        device, dtype: of the parameters.
        forget_bias: what the forget gates' two biases sum to at the start, often 1 (Gers,
            Schmidhuber & Cummins 2000; Jozefowicz, Zaremba & Sutskever 2015); None draws them as
            all others.
        locked_dropout: ``dropout`` has one mask for all steps of a row (Gal & Ghahramani 2016),
            where torch.nn draws one a step.
        weight_dropout: probability of zeroing, in training, an entry of each weight_hh, with one
            mask a call (DropConnect; Merity, Keskar & Socher 2017). The parameters stay what they
            are.
        zoneout_h, zoneout_c: probability that, in training, a unit's h, or c, stays what it was
            before a step, drawn for each unit, row and step; in evaluation it is the expectation
            (Krueger et al. 2017).
        layer_norm: W_ih x, W_hh h and the c within h = o tanh c are normalised over their units
            (Ba, Kiros & Hinton 2016). Excludes, as zoneout does, ``proj_size``.

    ``lstm(input, hx=None, *, lengths=None, reset=None, return_gates=False)``:

    - input: [T, B, I]; [T, I] unbatched; or a ``PackedSequence``.
    - hx: (h_0, c_0), [L*D, B, P] and [L*D, B, H] ([L*D, P] and [L*D, H] unbatched); None for zeros.
    - lengths: [B] int64, or a list: row b ends after ``lengths[b]`` steps, 0 <= lengths <= T. No
      sorting or packing is needed; later outputs are zero and the final states are those at the
      length.
    - reset: bool [T, B] ([B, T] with batch_first): true where step t starts with a zero state,
      as after the end of an episode.
    - returns output [T, B, D*P] (or a PackedSequence) and (h_n, c_n), shaped as hx; with
      ``return_gates`` a third, :class:`LSTMGates`.

    Errors are a ValueError for shapes and values, a TypeError for types, dtypes and devices.
    Equation and papers: :mod:`seqmem_fast.ops.lstm`, with zoneout or layer_norm
    :mod:`seqmem_fast.ops.lstm_regularized`.

    Parameters of layer k (``_reverse`` appended for the second direction), rows i, f, g, o, drawn
    from U(-1/sqrt(H), 1/sqrt(H)): weight_ih_l[k] [4H, I] ([4H, D*P] above the first layer),
    weight_hh_l[k] [4H, P], bias_ih_l[k] and bias_hh_l[k] [4H], weight_hr_l[k] [P, H].
    With layer_norm also gain_ih_l[k] and gain_hh_l[k] [4H], gain_c_l[k] [H], all 1, and
    shift_c_l[k] [H], 0; the shifts that the paper has for the first two are bias_ih and bias_hh.
    """

    # Of the class too, for modules that accelerate(replace=True) made ours.
    forget_bias: float | None = None
    locked_dropout: bool = False
    weight_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    layer_norm: bool = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        forget_bias: float | None = None,
        locked_dropout: bool = False,
        weight_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        lstm_options.check_share("lstm", "weight_dropout", weight_dropout)
        if not isinstance(locked_dropout, bool):
            raise TypeError(
                f"seqmem::lstm: expected locked_dropout to be a bool, got {locked_dropout}"
            )
        lstm_options.check_forget_bias("lstm", forget_bias, bias)
        lstm_options.check_regularization("lstm", zoneout_h, zoneout_c, layer_norm)
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.locked_dropout, self.weight_dropout = locked_dropout, weight_dropout
        self.forget_bias, self.layer_norm = forget_bias, layer_norm
        self.zoneout_h, self.zoneout_c = zoneout_h, zoneout_c
        lstm_options.check_no_projection(self)
        layers = [names[0].removeprefix("weight_ih") for names in self._all_weights]
        lstm_options.add_norms(self, layers, device, dtype)
        lstm_options.start(self)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        lstm_options.start(self)

    def extra_repr(self) -> str:
        return nn.RNNBase.extra_repr(self) + _said(self, LSTM, *_layer_options)

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    @classmethod
    def from_torch(cls, module: nn.LSTM) -> LSTM:
        """The same layers over the very Parameters of a ``torch.nn.LSTM``.

        Raises a TypeError for another module, a ValueError where something computes a parameter
        (weight_norm, pruning, ...); :func:`seqmem_fast.accelerate` takes such modules as well.
        """
        check_source("lstm", module, nn.LSTM, cls, module._flat_weights_names)
        own = _own_options(module, cls, *_layer_options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dropout on one layer: said when `module` was made
            options = {name: getattr(module, name) for name in cls.__constants__ if name != "mode"}
            lstm = cls(**options, **own, device="meta")
        lstm._parameters = module._parameters
        lstm._init_flat_weights()
        return lstm.train(module.training)

    def flatten_parameters(self) -> None:
        """Nothing to do: weights are read where they are stored."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_gates: bool = False,
    ) -> Any:
        if hx is not None:
            check_pair("lstm", hx)
        if lengths is not None or reset is not None:
            lengths, reset = rows_of(lengths, reset)
        if not isinstance(input, Tensor):
            return _packed(self, input, hx, return_gates, lengths=lengths, reset=reset)
        first = self.batch_first
        if input.dim() != 3:
            if input.dim() != 2:
                refuse_input("lstm", input, "B, T, I" if first else "T, B, I")
            return _unbatched(self, input, hx, return_gates, lengths, reset)
        if hx is not None:
            check_state(self, hx, input.size(0 if first else 1))
        ours = isinstance(self, LSTM)
        lone = self.num_layers == 1 and not self.bidirectional and not return_gates
        if lone and not (ours and lstm_options.is_regularized(self)):
            weights = _weights(self, 0)
            if ours and self.training and self.weight_dropout:
                weights = lstm_options.thinned(self.weight_dropout, weights)
            return lone_layer(input, hx, weights, lengths, reset, first)
        options = {"lengths": lengths, "reset": reset, "batch_first": first}
        return _run(self, input, hx, return_gates, options)


def _said(module: Any, ours: Any, *options: str) -> str:
    """The options that are not the usual ones; torch.nn's module, asked as ours, has none."""
    given = _own_options(module, ours, *options)
    return "".join(f", {k}={v}" for k, v in given.items() if v != getattr(ours, k))


def _own_options(module: Any, ours: Any, *names: str) -> dict[str, Any]:
    """What a module of ours has beside torch.nn's options; torch.nn's has none."""
    return {name: getattr(module, name) for name in names} if isinstance(module, ours) else {}


def _unbatched(
    module: Any,
    input: Tensor,
    hx: State | None,
    return_gates: bool,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> Any:
    if hx is not None:
        check_dims("lstm", hx, 2)
        hx = hx[0].unsqueeze(1), hx[1].unsqueeze(1)
        check_state(module, hx, 1)
    if lengths is not None and lengths.dim() == 0:
        lengths = lengths.unsqueeze(0)
    if reset is not None and reset.dim() == 1:
        reset = reset.unsqueeze(1)
    options = {"lengths": lengths, "reset": reset}
    output, (h_n, c_n), *traced = _run(module, input.unsqueeze(1), hx, return_gates, options)
    gates = [LSTMGates(*(each.squeeze(2) for each in every)) for every in traced]
    return output.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1)), *gates


def _packed(
    module: Any, input: object, hx: State | None, return_gates: bool, **absent: Tensor | None
) -> Any:
    if not isinstance(input, PackedSequence):
        raise TypeError(
            f"seqmem::lstm: expected input to be a tensor or a PackedSequence, "
            f"got {type(input).__name__}"
        )
    data, batch_sizes, order, undo = input
    for name, value in absent.items():
        if value is not None:
            raise ValueError(
                f"seqmem::lstm: expected no {name} with a PackedSequence, "
                f"got {name} of shape {list(value.shape)}"
            )
    if hx is not None:
        check_state(module, hx, int(batch_sizes[0]))
        if order is not None:
            hx = hx[0].index_select(1, order), hx[1].index_select(1, order)
    output, state, *gates = _run(module, data, hx, return_gates, {"batch_sizes": batch_sizes})
    if undo is not None:
        state = state[0].index_select(1, undo), state[1].index_select(1, undo)
    return PackedSequence(output, batch_sizes, order, undo), state, *gates


def _run(
    module: Any, x: Tensor, hx: State | None, return_gates: bool, options: dict[str, Any]
) -> Any:
    """All layers and directions over a batched or packed input: (output, state[, gates])."""
    op: Any = ops.lstm_trace if return_gates else ops.lstm
    ours = isinstance(module, LSTM)
    regularized = ours and lstm_options.is_regularized(module)
    directions = 2 if module.bidirectional else 1
    states: list[State] = []
    traces: list[Any] = []
    for layer in range(module.num_layers):
        outputs: list[Tensor] = []
        for direction in range(directions):
            k = layer * directions + direction
            state = None if hx is None else (hx[0][k], hx[1][k])
            weights = _weights(module, k)
            if ours and module.training and module.weight_dropout:
                weights = lstm_options.thinned(module.weight_dropout, weights)
            layout = {"reverse": direction == 1, **options}
            if regularized:
                name = module._all_weights[k][0].removeprefix("weight_ih")
                result = lstm_options.run_regularized(
                    module, name, x, state, weights, return_gates, **layout
                )
            else:
                result = op(x, state, *weights, **layout)
            outputs.append(result[0])
            states.append(result[1])
            traces.append(result[2:])
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if module.dropout and module.training and layer + 1 < module.num_layers:
            if ours and module.locked_dropout:
                x = lstm_options.locked(x, module.dropout, **options)
            else:
                x = lstm_options.dropout(x, module.dropout, options.get("batch_first", False))
    final = torch.stack([h for h, _ in states]), torch.stack([c for _, c in states])
    if not return_gates:
        return x, final
    gates, cells = (torch.stack(each) for each in zip(*traces, strict=True))
    i, f, g, o = gates.chunk(4, -1)
    return x, final, LSTMGates(i, f, g, o, cells)


def _weights(module: Any, k: int) -> Weights:
    """weight_ih, weight_hh, bias_ih, bias_hh, weight_hr of one layer in one direction.

    They are those that nn.LSTM would use: ``_flat_weights``, whose items a user may have set,
    unless an attribute is not the Parameter that it was (weight_norm, functional_call, ...); then
    they are the attributes.
    """
    names, parameters = module._all_weights[k], module._parameters
    size = len(names)
    weights = module._flat_weights[k * size : (k + 1) * size]
    try:
        if size == 4:  # written out: for the usual layer this costs no more than a look-up
            a, b, c, d = names
            w_ih, w_hh, b_ih, b_hh = weights
            if (
                parameters[a] is w_ih
                and parameters[b] is w_hh
                and parameters[c] is b_ih
                and parameters[d] is b_hh
            ):
                return w_ih, w_hh, b_ih, b_hh, None
    except KeyError:
        pass
    now = [getattr(module, name, None) for name in names]
    refs = zip(module._flat_weight_refs[k * size : (k + 1) * size], now, strict=True)
    if any(ref is not None and w is not None and ref() is not w for ref, w in refs):
        weights = now
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if size > 3 else (None, None)
    return w_ih, w_hh, b_ih, b_hh, rest[-1] if size in (3, 5) else None


def _regularized_step(cell: LSTMCell, input: Tensor, hx: State | None, *weights: Any) -> State:
    step = partial(lstm_options.run_regularized, cell, "")
    state = input if hx is None else hx[1]
    if autocast_dtype(input) is None or input.device.type != "cpu" or state.dtype != torch.float32:
        return step(input[None], hx, (*weights, None))[1]
    # As the plain cell, and torch's: a state in float32 is not rounded at every step.
    with torch.autocast("cpu", enabled=False):
        wide = None if hx is None else (hx[0].float(), hx[1])
        return step(input[None].float(), wide, (*weights, None))[1]


_cell_options = "forget_bias", "zoneout_h", "zoneout_c", "layer_norm"
_layer_options = "forget_bias", "locked_dropout", "weight_dropout", *_cell_options[1:]
_cell_names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
