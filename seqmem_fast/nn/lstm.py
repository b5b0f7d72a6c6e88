"""LSTM and LSTMCell as torch.nn has them, over :mod:`seqmem_fast.ops.lstm`.

Constructor, call forms, attributes, parameter names and initialisation are torch.nn's, and
state_dicts load both ways. They are no subclasses of ``torch.nn.LSTM``, whose every instance
torch.compile refuses to trace.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import ops
from ..ops.lstm import lone_layer

__all__ = ["LSTM", "LSTMCell", "LSTMGates"]

State = tuple[Tensor, Tensor]


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


class LSTMCell(nn.Module):
    """One LSTM step, a drop-in for :class:`torch.nn.LSTMCell`.

    Args:
        input_size: I, the width of the input.
        hidden_size: H, the width of h and c.
        bias: with bias_ih and bias_hh.
        device, dtype: of the parameters.

    ``cell(input, hx=None) -> (hy, cy)`` with input [B, I] and hx = (h, c), both [B, H]; or
    unbatched, [I] and [H]. hx None means zeros. Equation, errors and papers:
    :mod:`seqmem_fast.ops.lstm`.

    Parameters: weight_ih [4H, I], weight_hh [4H, H], bias_ih and bias_hh [4H], rows i, f, g, o,
    drawn from U(-1/sqrt(H), 1/sqrt(H)).
    """

    __constants__: ClassVar[list[str]] = ["input_size", "hidden_size", "bias"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        shapes = [(4 * hidden_size, input_size), (4 * hidden_size, hidden_size)]
        shapes += [(4 * hidden_size,)] * 2  # type: ignore[list-item]
        for name, shape in zip(_cell_names, shapes, strict=True):
            absent = not bias and name.startswith("bias")
            parameter = (
                None if absent else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            )
            self.register_parameter(name, parameter)
        self.reset_parameters()

    @classmethod
    def from_torch(cls, module: nn.LSTMCell) -> LSTMCell:
        """The same cell over the very Parameters of a ``torch.nn.LSTMCell``."""
        cell = cls(module.input_size, module.hidden_size, module.bias, device="meta")
        cell._parameters = module._parameters
        return cell.train(module.training)

    def reset_parameters(self) -> None:
        _uniform(self, self.hidden_size)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        weights: Any = self._parameters
        try:
            w_ih, w_hh = weights["weight_ih"], weights["weight_hh"]
            b_ih, b_hh = weights["bias_ih"], weights["bias_hh"]
        except KeyError:  # a parametrization (weight_norm, ...) computes some of them
            w_ih, w_hh, b_ih, b_hh = (getattr(self, name) for name in _cell_names)
        if hx is not None:
            _check_pair("lstm_cell", hx)
        if input.dim() != 1:
            return ops.lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)
        if hx is not None:
            _check_dims("lstm_cell", hx, 1)
            hx = hx[0].unsqueeze(0), hx[1].unsqueeze(0)
        hy, cy = ops.lstm_cell(input.unsqueeze(0), hx, w_ih, w_hh, b_ih, b_hh)
        return hy.squeeze(0), cy.squeeze(0)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")


class LSTM(nn.Module):
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

    ``lstm(input, hx=None, *, lengths=None, reset=None, return_gates=False)``:

    - input: [T, B, I]; [T, I] unbatched; or a ``PackedSequence``.
    - hx: (h_0, c_0), [L*D, B, P] and [L*D, B, H] ([L*D, P] and [L*D, H] unbatched); None for zeros.
    - lengths: [B] int64, row b ends after ``lengths[b]`` steps, 0 <= lengths <= T. No sorting or
      packing is needed; later outputs are zero and the final states are those at the length.
    - reset: bool [T, B] ([B, T] with batch_first): true where step t starts with a zero state,
      as after the end of an episode.
    - returns output [T, B, D*P] (or a PackedSequence) and (h_n, c_n), shaped as hx; with
      ``return_gates`` a third, :class:`LSTMGates`.

    Errors are a ValueError for shapes and values, a TypeError for types, dtypes and devices.
    Equation and papers: :mod:`seqmem_fast.ops.lstm`.

    Parameters of layer k (``_reverse`` appended for the second direction), rows i, f, g, o, drawn
    from U(-1/sqrt(H), 1/sqrt(H)): weight_ih_l[k] [4H, I] ([4H, D*P] above the first layer),
    weight_hh_l[k] [4H, P], bias_ih_l[k] and bias_hh_l[k] [4H], weight_hr_l[k] [P, H].
    """

    __constants__: ClassVar[list[str]] = [
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    ]
    mode = "LSTM"

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
    ) -> None:
        super().__init__()
        _check_options(input_size, hidden_size, num_layers, bias, batch_first, dropout, proj_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        directions = 2 if bidirectional else 1
        out = proj_size or hidden_size
        self._names: list[tuple[str, str, str | None, str | None, str | None]] = []
        for layer in range(num_layers):
            width = input_size if layer == 0 else out * directions
            for suffix in ("", "_reverse")[:directions]:
                end = f"_l{layer}{suffix}"
                ih, hh, hr = "weight_ih" + end, "weight_hh" + end, "weight_hr" + end
                b_ih, b_hh = "bias_ih" + end, "bias_hh" + end
                shapes: dict[str, tuple[int, ...]] = {
                    ih: (4 * hidden_size, width),
                    hh: (4 * hidden_size, out),
                }
                if bias:
                    shapes |= {b_ih: (4 * hidden_size,), b_hh: (4 * hidden_size,)}
                if proj_size:
                    shapes[hr] = (proj_size, hidden_size)
                for name, shape in shapes.items():
                    value = torch.empty(shape, device=device, dtype=dtype)
                    self.register_parameter(name, nn.Parameter(value))
                biases = (b_ih, b_hh) if bias else (None, None)
                self._names.append((ih, hh, *biases, hr if proj_size else None))
        self.reset_parameters()

    @classmethod
    def from_torch(cls, module: nn.LSTM) -> LSTM:
        """The same layers over the very Parameters of a ``torch.nn.LSTM``."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dropout on one layer: said when `module` was made
            lstm = cls(
                module.input_size,
                module.hidden_size,
                module.num_layers,
                module.bias,
                module.batch_first,
                module.dropout,
                module.bidirectional,
                module.proj_size,
                device="meta",
            )
        lstm._parameters = module._parameters
        return lstm.train(module.training)

    def reset_parameters(self) -> None:
        _uniform(self, self.hidden_size)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The weights of each layer and direction."""
        return [[getattr(self, name) for name in names if name] for names in self._names]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [weight for weights in self.all_weights for weight in weights]

    def flatten_parameters(self) -> None:
        """Nothing to do: weights are read where they lie."""

    def get_expected_hidden_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """Shape of h_0 for a batched input, or for packed data with its batch sizes."""
        layers, batch, _ = self.get_expected_cell_size(input, batch_sizes)
        return layers, batch, self.proj_size or self.hidden_size

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """Shape of c_0, likewise."""
        if batch_sizes is not None:
            batch = int(batch_sizes[0])
        else:
            batch = input.size(0 if self.batch_first else 1)
        return len(self._names), batch, self.hidden_size

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
            _check_pair("lstm", hx)
        if lengths is not None or reset is not None:
            _check_tensors("lstm", lengths=lengths, reset=reset)
        if not isinstance(input, Tensor):
            if isinstance(input, PackedSequence):
                return self._forward_packed(input, hx, lengths, reset, return_gates)
            raise TypeError(
                f"seqmem::lstm: expected input to be a tensor or a PackedSequence, "
                f"got {type(input).__name__}"
            )
        if input.dim() == 2:
            return self._forward_unbatched(input, hx, lengths, reset, return_gates)
        first = self.batch_first
        if hx is not None and input.dim() == 3:  # else the op refuses the input
            self._check_state(hx, input.size(0 if first else 1))
        if len(self._names) == 1 and not return_gates:
            return lone_layer(input, hx, *self._weights(0), lengths, reset, first)
        options = {"lengths": lengths, "reset": reset, "batch_first": first}
        output, state, gates = self._run(input, hx, return_gates, options)
        return (output, state, gates) if return_gates else (output, state)

    def _forward_unbatched(
        self,
        input: Tensor,
        hx: State | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        return_gates: bool,
    ) -> Any:
        if hx is not None:
            _check_dims("lstm", hx, 2)
            hx = hx[0].unsqueeze(1), hx[1].unsqueeze(1)
            self._check_state(hx, 1)
        options = {
            "lengths": lengths.unsqueeze(0)
            if lengths is not None and lengths.dim() == 0
            else lengths,
            "reset": reset.unsqueeze(1) if reset is not None and reset.dim() == 1 else reset,
        }
        output, (h_n, c_n), gates = self._run(input.unsqueeze(1), hx, return_gates, options)
        result = output.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        if gates is None:
            return result
        return *result, LSTMGates(*(each.squeeze(2) for each in gates))

    def _forward_packed(
        self,
        input: PackedSequence,
        hx: State | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        return_gates: bool,
    ) -> Any:
        data, batch_sizes, order, undo = input
        name, extra = ("reset", reset) if lengths is None else ("lengths", lengths)
        if extra is not None:
            raise ValueError(
                f"seqmem::lstm: expected no {name} with a PackedSequence, "
                f"got {name} of shape {list(extra.shape)}"
            )
        if hx is not None:
            self._check_state(hx, int(batch_sizes[0]))
            if order is not None:
                hx = hx[0].index_select(1, order), hx[1].index_select(1, order)
        options = {"batch_sizes": batch_sizes}
        output, state, gates = self._run(data, hx, return_gates, options)
        if undo is not None:
            state = state[0].index_select(1, undo), state[1].index_select(1, undo)
        packed = PackedSequence(output, batch_sizes, order, undo)
        return (packed, state, gates) if return_gates else (packed, state)

    def _run(
        self, x: Tensor, hx: State | None, trace: bool, options: dict[str, Any]
    ) -> tuple[Tensor, State, LSTMGates | None]:
        """All layers and directions over a batched or packed input."""
        directions = 2 if self.bidirectional else 1
        final_h: list[Tensor] = []
        final_c: list[Tensor] = []
        gates: list[Tensor] = []
        cells: list[Tensor] = []
        for layer in range(self.num_layers):
            outputs: list[Tensor] = []
            for direction in range(directions):
                k = layer * directions + direction
                state = None if hx is None else (hx[0][k], hx[1][k])
                arguments = (x, state, *self._weights(k))
                if trace:
                    output, (h, c), z, cell = ops.lstm_trace(
                        *arguments, reverse=direction == 1, **options
                    )
                    gates.append(z)
                    cells.append(cell)
                else:
                    output, (h, c) = ops.lstm(*arguments, reverse=direction == 1, **options)
                outputs.append(output)
                final_h.append(h)
                final_c.append(c)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout)
        state = torch.stack(final_h), torch.stack(final_c)
        if not trace:
            return x, state, None
        i, f, g, o = torch.stack(gates).chunk(4, -1)
        return x, state, LSTMGates(i, f, g, o, torch.stack(cells))

    def _weights(
        self, k: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        ih, hh, b_ih, b_hh, hr = self._names[k]
        weights = cast("dict[str, Tensor]", self._parameters)
        try:
            return (
                weights[ih],
                weights[hh],
                weights[b_ih] if b_ih else None,
                weights[b_hh] if b_hh else None,
                weights[hr] if hr else None,
            )
        except KeyError:  # a parametrization (weight_norm, ...) computes some of them
            found = (getattr(self, name) if name else None for name in self._names[k])
            return tuple(found)  # type: ignore[return-value]

    def _check_state(self, hx: State, batch: int) -> None:
        """hx against [L*D, B, P] and [L*D, B, H]; the op itself sees one layer's rows only."""
        _check_dims("lstm", hx, 3)
        widths = self.proj_size or self.hidden_size, self.hidden_size
        for name, tensor, width in zip(("hx", "cx"), hx, widths, strict=True):
            layers, rows, columns = tensor.shape
            if layers != len(self._names) or rows != batch or columns != width:
                expected = [len(self._names), batch, width]
                raise ValueError(
                    f"seqmem::lstm: expected {name} of shape {expected}, got {list(tensor.shape)}"
                )

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {
            "proj_size": 0,
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0,
            "bidirectional": False,
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}={value}")
        return ", ".join(parts)


_cell_names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _uniform(module: nn.Module, hidden_size: int) -> None:
    bound = 1.0 / math.sqrt(hidden_size) if hidden_size > 0 else 0.0
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -bound, bound)


def _check_pair(op: str, hx: object) -> None:
    if (
        not isinstance(hx, (tuple, list))
        or len(hx) != 2
        or not isinstance(hx[0], Tensor)
        or not isinstance(hx[1], Tensor)
    ):
        raise TypeError(
            f"seqmem::{op}: expected hx to be a pair of tensors (h, c), got {type(hx).__name__}"
        )


def _check_tensors(op: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"seqmem::{op}: expected {name} to be a tensor, got {type(value).__name__}"
            )


def _check_dims(op: str, hx: State, dims: int) -> None:
    for name, tensor in zip(("hx", "cx"), hx, strict=True):
        if tensor.dim() != dims:
            raise ValueError(
                f"seqmem::{op}: expected {name} of {dims} dimensions beside this input, "
                f"got shape {list(tensor.shape)}"
            )


def _check_options(
    input_size: int,
    hidden_size: int,
    num_layers: int,
    bias: bool,
    batch_first: bool,
    dropout: float,
    proj_size: int,
) -> None:
    for name, flag in (("bias", bias), ("batch_first", batch_first)):
        if not isinstance(flag, bool):
            raise TypeError(f"LSTM: expected {name} to be a bool, got {type(flag).__name__}")
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        if not isinstance(size, int):
            raise TypeError(f"LSTM: expected {name} to be an int, got {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"LSTM: expected {name} > 0, got {size}")
    if num_layers <= 0:
        raise ValueError(f"LSTM: expected num_layers > 0, got {num_layers}")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"LSTM: expected dropout in [0, 1], got {dropout!r}")
    if not 0 <= proj_size < hidden_size:
        raise ValueError(f"LSTM: expected 0 <= proj_size < hidden_size, got {proj_size}")
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            f"LSTM: dropout={dropout} acts between layers, so it does nothing with num_layers=1",
            stacklevel=3,
        )
