"""The Differentiable Neural Computer as a layer, over :mod:`seqmem_fast.ops.dnc`.

Papers: Graves et al., Hybrid computing using a neural network with dynamic external memory, Nature
538, 471, 2016; of the options, those that :mod:`seqmem_fast.ops.dnc` names; bypass dropout: Franke,
Niehues & Waibel, Robust and scalable differentiable neural computer for question answering, arXiv
1807.02658, 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops import DNCOptions, DNCState, DNCTrace
from .common import MemoryNetwork

__all__ = ["DNC"]


class DNC(MemoryNetwork[DNCState]):
    """A Differentiable Neural Computer over a sequence: controller, memory and an output layer.

    Args:
        input_size: I, the width of the input.
        output_size: O, the width of the output.
        controller_size: C, the units of each controller layer.
        memory_size: N, the slots.
        memory_dim: M, the width of a slot.
        read_heads: R.
        write_heads: W.
        controller: "lstm", or "feedforward" (layers of tanh).
        num_layers: L, the controller's layers.
        batch_first: input, output, reset, trace and links are [B, T, *] instead of [T, B, *].
        squash: tanh on keys and write vectors.
        strength: "oneplus" (1 + softplus, as the paper) or "softplus".
        norm_floor: added under the roots of the norms that content compares by, >= 0.
        eps: added to their product, >= 0; one of the two is positive.
        usage_gradient: gradients also flow through what was written in the step before to usage.
        masks: every key has a mask that says which part of a slot it asks for (Csordás).
        mask_min: the least value of a mask, 0 <= mask_min < 1.
        deallocate: what is freed is erased, too (Csordás).
        sharpen: links lead on with a sharpness of their own, against their blur (Csordás).
        links: False leaves the link matrices out: reads by content alone (Franke), no N² anywhere.
        allocation: "sort", or "softmax" of a learned strength times 1 - usage (Ben-Ari).
        layer_norm: on the interface vector (Franke).
        bypass_dropout: chance to drop a controller unit on its way to the output layer, in
            training, 0 <= bypass_dropout < 1 (Franke: 0.1). Memory and reads never miss any.
        hidden_init: hidden and cell start at "zeros", or are "learned". The rest starts at zero.
        output_activation: None, "sigmoid", "tanh" or "relu", on the output.
        device, dtype: of the parameters.

    ``dnc(input, state=None, *, lengths=None, reset=None, return_trace=False, links_at=())``:

    - input: [T, B, I]; [T, I] unbatched.
    - state: :class:`DNCState` of the call before, for running a sequence in chunks or for keeping
      the memory across episodes; None for the initial state (:meth:`init_state`). Unbatched, its
      tensors have no B.
    - lengths: [B] int64, row b ends after ``lengths[b]`` steps, 0 <= lengths <= T; later outputs
      and trace are zero and the final state is that at the length.
    - reset: bool [T, B]: true where step t starts from the initial state, as after an episode.
    - return_trace: what the heads did in every step comes back as a third: :class:`DNCTrace`, its
      tensors [T, B, *], differentiable.
    - links_at: steps, 0 <= step < T. The link matrices after each of them come back as a fourth,
      [len(links_at), B, W, N, N] ([i, j]: how far slot i was written right after slot j), zero for
      rows that have ended. The trace comes back as well.
    - returns output [T, B, O], the DNCState after the last step, and what was asked for.

    Errors are a ValueError for shapes and values, a TypeError for dtypes and devices. Equations:
    :mod:`seqmem_fast.ops.dnc`.

    Parameters: of LSTM layer k weight_ih_l[k] [4C, I + R * M] ([4C, C] above the first),
    weight_hh_l[k], bias_ih_l[k], bias_hh_l[k], rows i, f, g, o, drawn as torch.nn.LSTM's; of a
    feed-forward layer weight_l[k] and bias_l[k], drawn as torch.nn.Linear's; interface_weight
    [P, C] (normal, deviation C^-1/2, cut at two of them) and interface_bias [P] (zeros);
    norm_weight (ones) and norm_bias (zeros) [P] with ``layer_norm``; output.weight and output.bias;
    initial_hidden and initial_cell [L, C] (zeros) where learned.
    """

    _op, _state = "dnc", DNCState
    interface_weight: Tensor
    interface_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    initial_hidden: Tensor
    initial_cell: Tensor

    def __init__(
        self,
        input_size: int,
        output_size: int,
        controller_size: int,
        memory_size: int,
        memory_dim: int,
        read_heads: int = 4,
        write_heads: int = 1,
        controller: str = "lstm",
        num_layers: int = 1,
        batch_first: bool = False,
        *,
        squash: bool = False,
        strength: str = "oneplus",
        norm_floor: float = 1e-6,
        eps: float = 1e-6,
        usage_gradient: bool = False,
        masks: bool = False,
        mask_min: float = 0.0,
        deallocate: bool = False,
        sharpen: bool = False,
        links: bool = True,
        allocation: str = "sort",
        layer_norm: bool = False,
        bypass_dropout: float = 0.0,
        hidden_init: str = "zeros",
        output_activation: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = input_size, output_size, controller_size, memory_size, memory_dim
        super().__init__(sizes, controller, num_layers, batch_first, output_activation)
        self.read_heads, self.write_heads = read_heads, write_heads
        self.squash, self.strength, self.norm_floor, self.eps = squash, strength, norm_floor, eps
        self.usage_gradient, self.masks, self.mask_min = usage_gradient, masks, mask_min
        self.deallocate, self.sharpen, self.links = deallocate, sharpen, links
        self.allocation, self.layer_norm = allocation, layer_norm
        self.bypass_dropout, self.hidden_init = bypass_dropout, hidden_init
        self._positive("read_heads", "write_heads")
        self._one_of("strength", "oneplus", "softplus")
        self._one_of("allocation", "sort", "softmax")
        self._one_of("hidden_init", "zeros", "learned")
        for name in ("mask_min", "bypass_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"seqmem::dnc: expected 0 <= {name} < 1, got {getattr(self, name)}"
                )
        if norm_floor < 0 or eps < 0 or norm_floor + eps == 0:
            raise ValueError(
                "seqmem::dnc: expected norm_floor >= 0 and eps >= 0, one of them positive, got "
                f"{norm_floor} and {eps}"
            )
        made = {"device": device, "dtype": dtype}
        self._add_controller(made, read_heads)
        rows = DNCOptions(**self._options()).interface_size(memory_dim, read_heads, write_heads)
        self._keep(made, "interface_weight", True, rows, controller_size)
        self._keep(made, "interface_bias", True, rows)
        if layer_norm:
            self._keep(made, "norm_weight", True, rows)
            self._keep(made, "norm_bias", True, rows)
        if self._learned():
            self._keep(made, "initial_hidden", True, num_layers, controller_size)
            self._keep(made, "initial_cell", True, num_layers, controller_size)
        self.reset_parameters()

    @classmethod
    def from_pytorch_dnc(cls, module: nn.Module, *, fed_back: bool = True) -> DNC:
        """The same machine as a ``DNC`` of the package dnc 1.1.0 (pytorch-dnc), weights copied.

        That module never shows its controller what was read: every step of a call is given the
        reads from before the call. With ``fed_back`` the result is the paper's machine with these
        weights, which the step before's reads are fed to. Without, the columns for reads are zero,
        and it computes what the module's call does, given no reads to start with.

        Also unlike the module, it starts from hidden and cell zero, where the module draws them at
        random in every call. To compare, pass it ``hx=([(zeros, zeros)], None, None)``.

        Raises:
            ValueError: what has no equal here: rnn_type other than "lstm", num_layers > 1 (a memory
                access per layer; num_hidden_layers, the layers of the LSTM, may be any), the sparse
                memories of SAM and SDNC, 0 < clip < 1 (any other never acts on an LSTM), dropout in
                training mode.
        """
        source = cast(Any, module)
        for what, fits, found in (
            ('rnn_type "lstm"', source.rnn_type.lower() == "lstm", source.rnn_type),
            ("num_layers 1", source.num_layers == 1, source.num_layers),
            ("clip 0 or at least 1", not 0 < source.clip < 1, source.clip),
            (
                "dropout 0, or eval mode",
                source.dropout == 0 or not source.training,
                source.dropout,
            ),
            (
                "a dense Memory",
                [type(memory).__name__ for memory in source.memories] == ["Memory"],
                [type(memory).__name__ for memory in source.memories],
            ),
        ):
            if not fits:
                raise ValueError(f"DNC.from_pytorch_dnc: expected {what}, got {found!r}")
        memory, lstm = source.memories[0], source.rnns[0]
        dnc = cls(
            source.input_size,
            source.output.out_features,
            source.output_size,
            memory.mem_size,
            memory.cell_size,
            read_heads=memory.read_heads,
            num_layers=lstm.num_layers,
            batch_first=source.batch_first,
            squash=True,
            strength="softplus",
            norm_floor=0.0,
            usage_gradient=True,
            device=source.output.weight.device,
            dtype=source.output.weight.dtype,
        )
        parts = [getattr(memory, name, None) for name in _TRANSFORMS]
        linears = parts if memory.independent_linears else [memory.interface_weights]
        with torch.no_grad():
            for name in dnc._controller_names:
                given = getattr(lstm, name, None)
                getattr(dnc, name).copy_(0 if given is None else given)
            if not fed_back:
                dnc._controller()[0][:, source.input_size :] = 0
            for name in ("weight", "bias"):
                rows = torch.cat([getattr(linear, name) for linear in linears])
                getattr(dnc, f"interface_{name}").copy_(_exchanged_modes(rows, memory.read_heads))
            dnc.output.load_state_dict(source.output.state_dict())
        return dnc.train(module.training)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self._reset_controller()
        deviation = self.controller_size**-0.5
        ends = {"a": -2 * deviation, "b": 2 * deviation}
        nn.init.trunc_normal_(self.interface_weight, std=deviation, **ends)
        nn.init.zeros_(self.interface_bias)
        self._reset_output()
        if self.layer_norm:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)
        if self._learned():
            nn.init.zeros_(self.initial_hidden)
            nn.init.zeros_(self.initial_cell)

    def _learned(self) -> bool:
        return self.hidden_init == "learned" and self.controller == "lstm"

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in DNCOptions._fields}

    def _first_state(self) -> DNCState:
        zero = self.interface_weight.new_zeros(())
        kept = self.num_layers if self.controller == "lstm" else 0
        slots, width, reads, writes = (
            self.memory_size,
            self.memory_dim,
            self.read_heads,
            self.write_heads,
        )
        linked = writes if self.links else 0
        hidden = cell = zero.expand(kept, self.controller_size)
        if self._learned():
            hidden, cell = self.initial_hidden, self.initial_cell
        return DNCState(
            hidden,
            cell,
            memory=zero.expand(slots, width),
            usage=zero.expand(slots),
            link=zero.expand(linked, slots, slots),
            precedence=zero.expand(linked, slots),
            write_weights=zero.expand(writes, slots),
            read_weights=zero.expand(reads, slots),
            reads=zero.expand(reads, width),
        )

    def forward(
        self,
        input: Tensor,
        state: DNCState | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_trace: bool = False,
        links_at: Sequence[int] = (),
    ) -> (
        tuple[Tensor, DNCState]
        | tuple[Tensor, DNCState, DNCTrace]
        | tuple[Tensor, DNCState, DNCTrace, Tensor]
    ):
        batched = input.dim() != 2
        input, state, arguments = self._enter(input, state, lengths, reset)
        arguments |= self._options()
        if self.layer_norm:
            arguments["norm"] = (self.norm_weight, self.norm_bias)
        rest: list[Any]
        if len(links_at):
            features, *rest = self._in_chunks(input, state, arguments, links_at)
        elif return_trace:
            features, *rest = ops.dnc_trace(input, state, *self._weights(), **arguments)
        else:
            features, *rest = ops.dnc(input, state, *self._weights(), **arguments)
        if self.training and self.bypass_dropout:
            top, reads = features.tensor_split([self.controller_size], -1)
            features = torch.cat((F.dropout(top, self.bypass_dropout), reads), -1)
        found: (
            tuple[Tensor, DNCState]
            | tuple[Tensor, DNCState, DNCTrace]
            | tuple[Tensor, DNCState, DNCTrace, Tensor]
        ) = self._results(batched, lengths, features, *rest)
        return found

    def _weights(self) -> tuple[list[Tensor], Tensor, Tensor]:
        return self._controller(), self.interface_weight, self.interface_bias

    def _in_chunks(
        self, input: Tensor, state: DNCState, arguments: dict[str, Any], links_at: Sequence[int]
    ) -> tuple[Tensor, DNCState, DNCTrace, Tensor]:
        """As ops.dnc_trace, a call up to each of these steps, whose links come back as well."""
        time = input.size(0)
        if not self.links:
            raise ValueError("seqmem::dnc: expected links_at of a DNC with links, got links=False")
        if not all(0 <= step < time for step in links_at):
            raise ValueError(
                f"seqmem::dnc: expected steps of 0..{time - 1} in links_at, got {list(links_at)}"
            )
        lengths, reset = arguments["lengths"], arguments["reset"]
        start, parts, links = 0, [], {}
        for end in sorted({step + 1 for step in links_at} | {time}):
            if lengths is not None:  # only what lies in other chunks is cut: wrong ones are found
                rest = (lengths - start).clamp(min=0) if start else lengths
                arguments["lengths"] = rest if end == time else rest.clamp(max=end - start)
            if reset is not None:
                arguments["reset"] = reset[start:] if end == time else reset[start:end]
            found = ops.dnc_trace(input[start:end], state, *self._weights(), **arguments)
            features, state, trace = found
            parts.append((features, *trace))
            link, last = state.link, end - 1
            if lengths is not None:
                ended = lengths.to(link.device) <= last
                link = link.masked_fill(ended[:, None, None, None], 0)
            start, links[last] = end, link
        features, *steps = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        chosen = torch.stack([links[step] for step in links_at])
        return features, state, DNCTrace(*steps), chosen


# the layers of pytorch-dnc's Memory that make the parts of the interface, in our order
_TRANSFORMS = (
    "read_keys_transform",
    "read_strengths_transform",
    "write_key_transform",
    "write_strength_transform",
    "erase_vector_transform",
    "write_vector_transform",
    "free_gates_transform",
    "allocation_gate_transform",
    "write_gate_transform",
    "read_modes_transform",
)


def _exchanged_modes(rows: Tensor, reads: int) -> Tensor:
    """Interface parameters whose read modes, the last rows, are backward, forward, content."""
    modes = rows[-3 * reads :].unflatten(0, (reads, 3))[:, [0, 2, 1]]
    return torch.cat((rows[: -3 * reads], modes.flatten(0, 1)))
