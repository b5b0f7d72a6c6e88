"""A memory-augmented network with least recently used access, over :mod:`seqmem_fast.ops.lrua`.

Paper: Santoro, Bartunov, Botvinick, Wierstra & Lillicrap, One-shot learning with memory-augmented
neural networks, arXiv 1605.06065, 2016.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import LRUAState, LRUATrace
from .common import MemoryNetwork

__all__ = ["MANN"]

_MEMORY = 1e-6  # in every slot at the start


class MANN(MemoryNetwork[LRUAState]):
    """A controller whose heads write where they read last, or over what is used least.

    Args:
        input_size: I, the width of the input.
        output_size: O, the width of the output.
        controller_size: C, the units of each controller layer.
        memory_size: N, the slots.
        memory_dim: M, the width of a slot.
        read_heads: R, the heads, each of which reads and writes; at most N.
        controller: "lstm", or "feedforward" (layers of tanh).
        num_layers: L, the controller's layers.
        batch_first: input, output, reset and trace are [B, T, *] instead of [T, B, *].
        add: what a head writes: "own", a vector of its own; or "key", its key (the paper).
        strength: give each head a strength >= 1 for its softmax. Without one, as in the paper, 128
            slots get at most 5.5 % of the weight each; with one, heads learn to look at one slot.
        erase_all: set all R slots of least usage to zero in each step, not the first alone.
        gamma: what remains of a slot's usage after a step, in 0..1.
        memory_init: what a sequence starts with: "constant" (1e-6), "learned", or "random" (drawn
            once, kept as a buffer).
        output_activation: None, "sigmoid", "tanh" or "relu", on the output.
        device, dtype: of the parameters.

    ``mann(input, state=None, *, lengths=None, reset=None, return_trace=False)``:

    - input: [T, B, I]; [T, I] unbatched.
    - state: :class:`LRUAState` of the call before, for running a sequence in chunks; None for the
      initial state (:meth:`init_state`). Unbatched, its tensors have no B.
    - lengths: [B] int64, row b ends after ``lengths[b]`` steps, 0 <= lengths <= T; later outputs
      and traces are zero and the final state is that at the length.
    - reset: bool [T, B]: true where step t starts from the initial state, as after an episode.
    - returns output [T, B, O] and the LRUAState after the last step; with ``return_trace`` a third,
      an :class:`LRUATrace`: usage [T, B, N], write_weights and read_weights [T, B, R, N].

    Errors are a ValueError for shapes and values, a TypeError for dtypes and devices. Equations:
    :mod:`seqmem_fast.ops.lrua`.

    Parameters: of LSTM layer k weight_ih_l[k] [4C, I + R * M] ([4C, C] above the first),
    weight_hh_l[k], bias_ih_l[k], bias_hh_l[k], rows i, f, g, o, drawn as torch.nn.LSTM's; of a
    feed-forward layer weight_l[k] and bias_l[k], drawn as torch.nn.Linear's; head_weight [P, C]
    (Xavier, head by head) and head_bias [P] (zeros), per head key M, add M (with ``add="own"``),
    gate, strength (with ``strength``); output.weight and output.bias; initial_hidden, initial_cell
    [L, C] (zeros) and initial_memory [N, M]. Usage, weightings and reads start at zero.
    """

    _op, _state = "lrua", LRUAState

    def __init__(
        self,
        input_size: int,
        output_size: int,
        controller_size: int,
        memory_size: int,
        memory_dim: int,
        read_heads: int = 4,
        controller: str = "lstm",
        num_layers: int = 1,
        batch_first: bool = False,
        add: str = "own",
        strength: bool = False,
        erase_all: bool = False,
        gamma: float = 0.95,
        memory_init: str = "constant",
        output_activation: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = input_size, output_size, controller_size, memory_size, memory_dim
        super().__init__(sizes, controller, num_layers, batch_first, output_activation)
        if not 1 <= read_heads <= memory_size:
            raise ValueError(
                f"seqmem::lrua: expected read_heads in 1..{memory_size} for {memory_size} slots, "
                f"got {read_heads}"
            )
        if not 0 <= gamma <= 1:
            raise ValueError(f"seqmem::lrua: expected gamma in 0..1, got {gamma}")
        self.read_heads, self.add, self.strength = read_heads, add, strength
        self.erase_all, self.gamma, self.memory_init = erase_all, gamma, memory_init
        self._one_of("add", "own", "key")
        self._one_of("memory_init", "constant", "learned", "random")
        made = {"device": device, "dtype": dtype}
        self._add_controller(made, read_heads)
        self._add_heads(made, read_heads * self._head_rows())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters and buffers anew."""
        self._reset_controller()
        self._reset_heads([self._head_rows()] * self.read_heads, _MEMORY)

    def _first_state(self) -> LRUAState:
        zeros = self.initial_memory.new_zeros
        return LRUAState(
            self.initial_hidden,
            self.initial_cell,
            self.initial_memory,
            zeros(self.memory_size),
            zeros(self.read_heads, self.memory_size),
            zeros(self.read_heads, self.memory_dim),
        )

    def forward(
        self,
        input: Tensor,
        state: LRUAState | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_trace: bool = False,
    ) -> tuple[Tensor, LRUAState] | tuple[Tensor, LRUAState, LRUATrace]:
        batched = input.dim() != 2
        input, state, arguments = self._enter(input, state, lengths, reset)
        arguments |= {"add": self.add, "strength": self.strength, "erase_all": self.erase_all}
        arguments["gamma"] = self.gamma
        operands = (input, state, self._controller(), self.head_weight, self.head_bias)
        op: Any = ops.lrua_trace if return_trace else ops.lrua
        found: tuple[Tensor, LRUAState] | tuple[Tensor, LRUAState, LRUATrace]
        found = self._results(batched, lengths, *op(*operands, **arguments))
        return found

    def _head_rows(self) -> int:
        """How many rows of head_weight each head has."""
        return (1 + (self.add == "own")) * self.memory_dim + 1 + self.strength
