"""The Neural Turing Machine as a layer, over :mod:`seqmem_fast.ops.ntm`.

Papers: Graves, Wayne & Danihelka, Neural Turing Machines, arXiv 1410.5401, 2014; the initial
memory: Collier & Beel, Implementing Neural Turing Machines, arXiv 1807.08518, 2018.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _C, ops
from ..ops import NTMState
from ..ops.common import dynamo_traces, overridden
from .common import MemoryNetwork

__all__ = ["NTM"]

_MEMORY = 1e-6  # Collier & Beel's constant
_INITIAL = [f"initial_{name}" for name in NTMState._fields]
_FOCUS = 4.0  # a new head holds e^4 times as much weight on its first slot as on all others


class NTM(MemoryNetwork[NTMState]):
    """A Neural Turing Machine over a sequence: controller, heads, memory and an output layer.

    Args:
        input_size: I, the width of the input.
        output_size: O, the width of the output.
        controller_size: C, the units of each controller layer.
        memory_size: N, the slots.
        memory_dim: M, the width of a slot.
        heads: the heads in the order in which they act within a step, "w" or "r" each. A read sees
            the writes before it.
        shift_range: r, the farthest move of a shift, which has 2r + 1 taps; 0 <= r <= N / 2.
        controller: "lstm", or "feedforward" (layers of tanh).
        num_layers: L, the controller's layers.
        batch_first: input, output, reset and weightings are [B, T, *] instead of [T, B, *].
        squash: tanh on keys and adds.
        memory_init: what a sequence starts with: "constant" (1e-6, which Collier & Beel found to
            train fastest), "learned", or "random" (drawn once, kept as a buffer).
        weightings_init: "learned" (the softmax of a parameter, which begins focused on the first
            slot; equal weights on equal slots would always stay equal) or "zeros".
        reads_init: "learned" or "random" (drawn once, kept as a buffer).
        output_activation: None, "sigmoid", "tanh" or "relu", on the output.
        device, dtype: of the parameters.

    ``ntm(input, state=None, *, lengths=None, reset=None, return_weightings=False)``:

    - input: [T, B, I]; [T, I] unbatched.
    - state: :class:`NTMState` of the call before, for running a sequence in chunks; None for the
      learned initial state (:meth:`init_state`). Unbatched, its tensors have no B.
    - lengths: [B] int64, row b ends after ``lengths[b]`` steps, 0 <= lengths <= T; later outputs
      and weightings are zero and the final state is that at the length.
    - reset: bool [T, B]: true where step t starts from the initial state, as after an episode.
    - returns output [T, B, O] and the NTMState after the last step; with ``return_weightings`` a
      third, the weightings [T, B, Hd, N] of all Hd heads, differentiable.

    Errors are a ValueError for shapes and values, a TypeError for dtypes and devices. Equations:
    :mod:`seqmem_fast.ops.ntm`.

    Parameters: of LSTM layer k weight_ih_l[k] [4C, I + R * M] ([4C, C] above the first),
    weight_hh_l[k], bias_ih_l[k], bias_hh_l[k], rows i, f, g, o, drawn as torch.nn.LSTM's; of a
    feed-forward layer weight_l[k] and bias_l[k], drawn as torch.nn.Linear's; head_weight [P, C]
    (Xavier, head by head) and head_bias [P] (zeros), per head key M, beta, gate, shift 2r + 1,
    gamma and, for "w", erase M, add M; output.weight and output.bias; initial_hidden,
    initial_cell [L, C], initial_memory [N, M], initial_weightings [Hd, N] (before the softmax) and
    initial_reads [R, M].
    """

    _op, _state = "ntm", NTMState
    initial_weightings: Tensor
    initial_reads: Tensor

    def __init__(
        self,
        input_size: int,
        output_size: int,
        controller_size: int,
        memory_size: int,
        memory_dim: int,
        heads: str = "wr",
        shift_range: int = 1,
        controller: str = "lstm",
        num_layers: int = 1,
        batch_first: bool = False,
        squash: bool = True,
        memory_init: str = "constant",
        weightings_init: str = "learned",
        reads_init: str = "learned",
        output_activation: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = input_size, output_size, controller_size, memory_size, memory_dim
        super().__init__(sizes, controller, num_layers, batch_first, output_activation)
        if not isinstance(heads, str) or not heads or set(heads) - set("wr"):
            raise ValueError(
                f'seqmem::ntm: expected heads as a string of "w" and "r", got {heads!r}'
            )
        if not 0 <= shift_range <= memory_size // 2:
            raise ValueError(
                f"seqmem::ntm: expected shift_range in 0..{memory_size // 2} for {memory_size} "
                f"slots, got {shift_range}"
            )
        self.heads, self.shift_range, self.squash = heads, shift_range, squash
        self.memory_init, self.weightings_init = memory_init, weightings_init
        self.reads_init = reads_init
        self._one_of("memory_init", "constant", "learned", "random")
        self._one_of("weightings_init", "learned", "zeros")
        self._one_of("reads_init", "learned", "random")
        made = {"device": device, "dtype": dtype}
        reads = heads.count("r")
        self._add_controller(made, reads)
        self._add_heads(made, sum(self._head_rows()))
        learned = weightings_init == "learned"
        self._keep(made, "initial_weightings", learned, len(heads), memory_size)
        self._keep(made, "initial_reads", reads_init == "learned", reads, memory_dim)
        self.reset_parameters()

    @classmethod
    def from_pytorch_ntm(cls, encapsulated: nn.Module) -> NTM:
        """The same machine as an ``EncapsulatedNTM`` of the package pytorch-ntm, weights copied.

        ``ntm(input)`` then gives what ``init_sequence`` and a call per step of the original give.
        """
        source = cast(Any, encapsulated)
        inner, lstm = source.ntm, source.ntm.controller.lstm
        reading = [head.is_read_head() for head in inner.heads]
        layers = [
            head.fc_read if reads else head.fc_write
            for head, reads in zip(inner.heads, reading, strict=True)
        ]
        slots, width = inner.memory.mem_bias.shape
        taps = layers[0].out_features - 3 - width * (1 if reading[0] else 3)
        weight = inner.fc.weight
        ntm = cls(
            lstm.input_size - width * sum(reading),
            inner.fc.out_features,
            lstm.hidden_size,
            slots,
            width,
            heads="".join("r" if reads else "w" for reads in reading),
            shift_range=taps // 2,
            num_layers=lstm.num_layers,
            squash=False,
            memory_init="random",
            weightings_init="zeros",
            reads_init="random",
            output_activation="sigmoid",
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            for name in ntm._controller_names:
                getattr(ntm, name).copy_(getattr(lstm, name))
            ntm.head_weight.copy_(torch.cat([_flipped_taps(h.weight, width, taps) for h in layers]))
            ntm.head_bias.copy_(torch.cat([_flipped_taps(h.bias, width, taps) for h in layers]))
            ntm.output.load_state_dict(inner.fc.state_dict())
            ntm.initial_hidden.copy_(inner.controller.lstm_h_bias[:, 0])
            ntm.initial_cell.copy_(inner.controller.lstm_c_bias[:, 0])
            ntm.initial_memory.copy_(inner.memory.mem_bias)
            ntm.initial_reads.copy_(torch.cat(list(inner.init_r)))
        return ntm.train(encapsulated.training)

    def reset_parameters(self) -> None:
        """Draw all parameters and buffers anew."""
        self._reset_controller()
        self._reset_heads(self._head_rows(), _MEMORY)
        nn.init.zeros_(self.initial_weightings)
        if self.weightings_init == "learned":
            with torch.no_grad():
                self.initial_weightings[:, 0] = _FOCUS + math.log(max(self.memory_size - 1, 1))
        nn.init.normal_(self.initial_reads, std=0.01)

    def _first_state(self) -> NTMState:
        weightings = self.initial_weightings
        if self.weightings_init == "learned":
            weightings = torch.softmax(weightings, -1)
        return NTMState(
            self.initial_hidden,
            self.initial_cell,
            self.initial_memory,
            weightings,
            self.initial_reads,
        )

    def forward(
        self,
        input: Tensor,
        state: NTMState | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_weightings: bool = False,
    ) -> tuple[Tensor, NTMState] | tuple[Tensor, NTMState, Tensor]:
        batched = input.dim() != 2
        found: tuple[Tensor, NTMState] | tuple[Tensor, NTMState, Tensor]
        if lengths is None and reset is None:
            done = self._at_once(input, state, return_weightings)
            if done is not None:
                output, *parts, weightings = done
                traces = [weightings] if return_weightings else []
                found = self._left(batched, output, NTMState(*parts), *traces)
                return found
        input, state, arguments = self._enter(input, state, lengths, reset)
        arguments |= {"heads": self.heads, "shift_range": self.shift_range, "squash": self.squash}
        operands = (input, state, self._controller(), self.head_weight, self.head_bias)
        op: Any = ops.ntm_trace if return_weightings else ops.ntm
        found = self._results(batched, lengths, *op(*operands, **arguments))
        return found

    def _at_once(self, input: Tensor, state: NTMState | None, trace: bool) -> list[Tensor] | None:
        """Output, state and weightings by the compiled module; None where it cannot be asked."""
        layer = None if dynamo_traces() else self._usual_output()
        if layer is None:
            return None
        input, state, _ = self._turn(input, state, None, None)
        shared = state is None  # by all rows
        parts = self._tensors(*_INITIAL) if state is None else list(NTMState(*state))
        controller, rest = self._controller(), [*self._tensors("head_weight", "head_bias"), *layer]
        if overridden(input, *parts, *controller, *rest):
            return None
        return _C.ntm_module(
            input,
            parts,
            controller,
            rest,
            self.heads,
            self.shift_range,
            self.controller == "lstm",
            self.squash,
            shared,
            shared and self.weightings_init == "learned",
            self.output_activation,
            trace,
        )

    def _head_rows(self) -> list[int]:
        """How many rows of head_weight each head has."""
        read = self.memory_dim + 2 * self.shift_range + 4
        return [read + 2 * self.memory_dim * (head == "w") for head in self.heads]


def _flipped_taps(rows: Tensor, width: int, taps: int) -> Tensor:
    """Head parameters whose first shift tap moves up, as ours, whose first moves down."""
    before, shift, after = rows.split([width + 2, taps, rows.size(0) - width - 2 - taps])
    return torch.cat((before, shift.flip(0), after))
