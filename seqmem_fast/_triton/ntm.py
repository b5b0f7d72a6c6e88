r"""The whole-sequence NTM on GPU: launchers of `ntm` and `ntm_backward`.

Formulas, shapes and errors: `ops/ntm.py`. Forward: one product for all inputs, then one
kernel, a program a row, for all steps; backward: one kernel back over the steps, then one product
per weight. What training keeps are per step the gates, cells, head values and weightings, and the
memory every `segment` (about the root of T) steps; nothing grows with T N M.

The kernels take up to `ntm.fits` values of memory a row and 31 heads. Beyond that, the plain path:
the reference on the GPU, its gradient by autograd through the reference, which keeps every step's
memory. Arithmetic and state are float32 for 16-bit storage (float64 for float64); float32 is full
precision, TF32 allowed or not, but for the products over all steps, which are torch's.

State of proof: as in lstm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..ops.common import reference_vjp
from ..reference import ntm as reference
from ..reference.ntm_addressing import NTMState
from . import ntm_kernels as kernels
from .common import autograd_below, row_lengths, wide
from .machine import (
    SHORTEST_SEGMENT,
    Controller,
    Sizes,
    fits,
    padded,
    rows_of,
    to_dtype,
    weight_gradients,
    without_padding,
)

_MOST_HEADS = 31  # bits of an integer


@dataclass(frozen=True)
class _Options:
    """What is no tensor."""

    heads: str
    shift_range: int
    lstm: bool
    squash: bool

    @property
    def writes(self) -> int:
        return sum(1 << k for k, head in enumerate(self.heads) if head == "w")


class _Sizes(Sizes):
    def __init__(
        self,
        input: Tensor,
        memory: Tensor,
        head_weight: Tensor,
        controller: Sequence[Tensor],
        options: _Options,
    ) -> None:
        reads = options.heads.count("r")
        super().__init__(input, memory, head_weight, controller, options.lstm, reads)
        self.options, self.heads = options, len(options.heads)
        self.taps = 2 * options.shift_range + 1

    @property
    def on_chip(self) -> bool:
        return fits(self.slots, self.width) and self.heads <= _MOST_HEADS

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            **super().arguments(dtype),
            "heads": self.heads,
            "writes": self.options.writes,
            "taps": self.taps,
            "SQUASH": self.options.squash,
            "BS": max(2, triton.next_power_of_2(self.taps)),
        }


def ntm(
    input: Tensor,
    hidden: Tensor,
    cell: Tensor,
    memory: Tensor,
    weightings: Tensor,
    reads: Tensor,
    controller: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor,
    initial: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    heads: str,
    shift_range: int,
    lstm: bool,
    squash: bool,
    trace: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """`seqmem::ntm` on GPU."""
    torch.ops.seqmem.check_ntm(
        input, hidden, cell, memory, weightings, reads, controller, head_weight, head_bias,
        initial, lengths, reset, heads, shift_range, lstm, squash, trace, save,
    )  # fmt: skip
    options = _Options(heads, shift_range, lstm, squash)
    size = _Sizes(input, memory, head_weight, controller, options)
    state = NTMState(hidden, cell, memory, weightings, reads)
    dtype = wide(input.dtype)
    make = input.new_zeros if lengths is not None else input.new_empty  # of padding: zeros
    record = make(size.steps if save else 1, size.batch, size.record, dtype=dtype)
    parts = -(-size.steps // SHORTEST_SEGMENT) if save else 0
    checkpoints = input.new_empty(parts, size.batch, size.width, size.stride, dtype=dtype)
    none = input.new_empty(0, dtype=dtype)
    kept = (record, checkpoints) if save else (none, none)
    with torch.cuda.device_of(input):
        if lengths is not None:
            lengths = row_lengths("ntm", lengths, input.device, size.steps)
        if not size.on_chip:
            start = NTMState(*to_dtype(dtype, state))
            features, last, all_weightings = reference.ntm_trace(
                input.to(dtype), start, to_dtype(dtype, controller), head_weight.to(dtype),
                head_bias.to(dtype), **_keywords(options, to_dtype(dtype, initial), lengths, reset),
            )  # fmt: skip
            ends = (a.clone() if a is b else a for a, b in zip(last, start, strict=True))
            wanted = all_weightings if trace or save else none
            return *to_dtype(input.dtype, (features, *ends, wanted)), *kept
        features = make(size.steps, size.batch, size.control + size.read_width)
        every = make(size.steps, size.batch, size.heads, size.slots) if trace or save else None
        outs = _forward(
            size, input, state, Controller.of(controller, size.input, size.gates), head_weight,
            head_bias, initial, lengths, reset, features, every, record,
            checkpoints if save else None,
        )  # fmt: skip
    return features, *outs, input.new_empty(0) if every is None else every, *kept


def _forward(
    size: _Sizes,
    input: Tensor,
    state: NTMState,
    controller: Controller,
    head_weight: Tensor,
    head_bias: Tensor,
    initial: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    features: Tensor,
    trace: Tensor | None,
    record: Tensor,
    checkpoints: Tensor | None,
) -> tuple[Tensor, ...]:
    dtype = record.dtype
    # [2, B, L, C]: the state before even steps, and before odd ones
    hidden = record.new_zeros(2, size.batch, size.layers, size.control)
    hidden[0, :, : size.kept] = state.hidden.transpose(0, 1)
    # Copies: the kernel moves them on.
    cell, weightings, reads = (
        a.to(dtype, copy=True, memory_format=torch.contiguous_format)
        for a in (state.cell.transpose(0, 1), state.weightings, state.reads)
    )
    hidden_out = torch.empty_like(cell)
    memory_out = torch.empty_like(state.memory, memory_format=torch.contiguous_format)
    if size.batch:
        flat = without_padding(input, lengths).to(dtype).flatten(0, 1)
        kernels.ntm_forward[(size.batch,)](
            zx_ptr=torch.addmm(controller.biases[0], flat, controller.of_input.t()),
            weight_ptr=controller.packed(transposed=True),
            bias_ptr=torch.stack(controller.biases),
            head_weight_ptr=head_weight.to(dtype).t().contiguous(),
            head_bias_ptr=head_bias.to(dtype).contiguous(),
            hidden_ptr=hidden,
            cell_ptr=cell,
            weightings_ptr=weightings,
            reads_ptr=reads,
            memory_ptr=state.memory.contiguous(),
            features_ptr=features,
            hidden_out_ptr=hidden_out,
            memory_out_ptr=memory_out,
            trace_ptr=trace,
            record_ptr=record,
            checkpoints_ptr=checkpoints,
            record_rows=0 if record.shape[0] == 1 else size.batch,
            **_initial(initial, reset, dtype, all_five=True),
            **rows_of(lengths, reset),
            **size.arguments(input.dtype),
        )
    kept = (hidden_out.transpose(0, 1), cell.transpose(0, 1), memory_out, weightings, reads)
    return tuple(a.to(input.dtype).contiguous() for a in kept)


def _initial(
    initial: Sequence[Tensor], reset: Tensor | None, dtype: torch.dtype, all_five: bool
) -> dict[str, Tensor | None]:
    names = NTMState._fields if all_five else ("cell", "memory", "weightings")
    if reset is None:
        return {f"initial_{name}_ptr": None for name in names}
    parts = NTMState(*(a.to(dtype).contiguous() for a in initial))
    parts = parts._replace(memory=padded(parts.memory))
    return {f"initial_{name}_ptr": getattr(parts, name) for name in names}


def _keywords(
    options: _Options, initial: Sequence[Tensor], lengths: Tensor | None, reset: Tensor | None
) -> dict[str, Any]:
    """The reference's."""
    return {
        "heads": options.heads,
        "shift_range": options.shift_range,
        "squash": options.squash,
        "controller_type": "lstm" if options.lstm else "feedforward",
        "initial": NTMState(*initial) if initial else None,
        "lengths": lengths,
        "reset": reset,
    }


def ntm_backward(
    grad_features: Tensor | None,
    grad_hidden: Tensor | None,
    grad_cell: Tensor | None,
    grad_memory: Tensor | None,
    grad_weightings: Tensor | None,
    grad_reads: Tensor | None,
    grad_trace: Tensor | None,
    input: Tensor,
    hidden: Tensor,
    cell: Tensor,
    memory: Tensor,
    weightings: Tensor,
    reads: Tensor,
    controller: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor,
    initial: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    features: Tensor,
    trace: Tensor,
    saved: Tensor,
    checkpoints: Tensor,
    heads: str,
    shift_range: int,
    lstm: bool,
    squash: bool,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """`seqmem::ntm_backward` on GPU."""
    torch.ops.seqmem.check_ntm_backward(
        grad_features, grad_hidden, grad_cell, grad_memory, grad_weightings, grad_reads,
        grad_trace, input, hidden, cell, memory, weightings, reads, controller, head_weight,
        head_bias, initial, lengths, reset, features, trace, saved, checkpoints, heads,
        shift_range, lstm, squash, output_mask,
    )  # fmt: skip
    options = _Options(heads, shift_range, lstm, squash)
    size = _Sizes(input, memory, head_weight, controller, options)
    state = NTMState(hidden, cell, memory, weightings, reads)
    grads = (grad_hidden, grad_cell, grad_memory, grad_weightings, grad_reads)
    of_input, of_state, of_weights, of_initial = output_mask
    wanted = [of_input, *[of_state] * 5, *[of_weights] * 2, *[of_initial] * len(initial)]
    wanted += [of_weights] * len(controller)
    with torch.cuda.device_of(input):
        if lengths is not None:
            lengths = row_lengths("ntm", lengths, input.device, size.steps)
        if size.on_chip:
            back = _Backward(size, input, state, controller, head_weight, initial, lengths, reset)
            found = back.run(grad_features, grads, grad_trace, features, trace, saved, checkpoints)
        else:
            dtype = wide(input.dtype)
            inputs = to_dtype(dtype, (input, *state, head_weight, head_bias, *initial, *controller))
            count = len(initial)

            def function(*args: Tensor) -> tuple[Tensor, ...]:
                first, *rest = args
                outputs = reference.ntm_trace(
                    first, NTMState(*rest[:5]), rest[7 + count :], rest[5], rest[6],
                    **_keywords(options, rest[7 : 7 + count], lengths, reset),
                )  # fmt: skip
                return outputs[0], *outputs[1], outputs[2]

            seeds = [
                None if a is None else a.to(dtype) for a in (grad_features, *grads, grad_trace)
            ]
            with autograd_below():
                found = [
                    None if a is None else a.detach()
                    for a in reference_vjp(function, inputs, seeds, wanted)
                ]
    pairs = zip(found, wanted, strict=True)
    none = input.new_empty(0)
    return [none if a is None or not is_wanted else a.to(input.dtype) for a, is_wanted in pairs]


class _Backward:
    """The kernel's backward of one call."""

    def __init__(
        self,
        size: _Sizes,
        input: Tensor,
        state: NTMState,
        controller: Sequence[Tensor],
        head_weight: Tensor,
        initial: Sequence[Tensor],
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> None:
        self.size, self.input, self.state, self.initial = size, input, state, initial
        self.dtype = wide(input.dtype)
        self.controller = Controller.of(controller, size.input, size.gates)
        self.head_weight = head_weight.to(self.dtype).contiguous()
        self.lengths, self.reset = lengths, reset

    def run(
        self,
        grad_features: Tensor | None,
        grads: Sequence[Tensor | None],
        grad_trace: Tensor | None,
        features: Tensor,
        trace: Tensor,
        record: Tensor,
        checkpoints: Tensor,
    ) -> list[Tensor | None]:
        """Gradients in the op's order; those of initial are missing where there is no reset."""
        size, dtype = self.size, self.dtype
        steps, batch = size.steps, size.batch
        make = self.input.new_zeros if self.lengths is not None else self.input.new_empty
        gates = size.control * size.gates
        dz = make(steps, batch, size.layers, gates, dtype=dtype)  # of padding: zeros
        dp = make(steps, batch, size.values, dtype=dtype)
        carried = [self._carried(grad, a) for grad, a in zip(grads, self.state, strict=True)]
        carried[2] = padded(carried[2])
        parts = None
        if self.reset is not None:
            parts = [torch.zeros_like(a) for a in carried]
        if batch:
            self._launch(
                grad_features, grad_trace, carried, parts, features, trace, record, checkpoints,
                dz, dp,
            )  # fmt: skip
        carried[0], carried[1] = (a.transpose(0, 1) for a in carried[:2])
        for memories in (carried, parts or []):
            memories[2:3] = [a[:, : size.slots, : size.width] for a in memories[2:3]]
        of_initial: list[Tensor | None] = [None] * len(self.initial)
        if parts is not None:
            of_initial = [a.sum(0) for a in parts]
        elif self.initial:
            of_initial = [torch.zeros_like(a) for a in self.initial]
        heads, weights = weight_gradients(
            size, self.input, self.state, self.initial, self.lengths, self.reset, features, record,
            dz.flatten(0, 1), dp.flatten(0, 1),
        )  # fmt: skip
        of_input = (dz[:, :, 0] @ self.controller.of_input).view_as(self.input)
        return [of_input, *carried, *heads, *of_initial, *weights]

    def _carried(self, grad: Tensor | None, like: Tensor) -> Tensor:
        """A state's gradient, wide, batch first; the kernel takes it from the last to the first."""
        a = torch.zeros_like(like, dtype=self.dtype) if grad is None else grad.to(self.dtype)
        by_layer = like is self.state.hidden or like is self.state.cell
        return (a.transpose(0, 1) if by_layer else a).clone(memory_format=torch.contiguous_format)

    def _launch(
        self,
        grad_features: Tensor | None,
        grad_trace: Tensor | None,
        carried: Sequence[Tensor],
        parts: Sequence[Tensor] | None,
        features: Tensor,
        trace: Tensor,
        record: Tensor,
        checkpoints: Tensor,
        dz: Tensor,
        dp: Tensor,
    ) -> None:
        size = self.size
        names = NTMState._fields
        f_t, f_b, f_c = (0, 0, 0) if grad_features is None else grad_features.stride()
        memories = dz.new_empty(size.batch, size.segment, *carried[2].shape[1:])
        kernels.ntm_backward[(size.batch,)](
            grad_features_ptr=grad_features,
            grad_trace_ptr=None if grad_trace is None else grad_trace.contiguous(),
            weight_ptr=self.controller.packed(transposed=False),
            head_weight_ptr=self.head_weight,
            cell_ptr=self.state.cell.contiguous(),
            weightings_ptr=self.state.weightings.contiguous(),
            features_ptr=features.contiguous(),
            trace_ptr=trace.contiguous(),
            record_ptr=record.contiguous(),
            checkpoints_ptr=checkpoints.contiguous(),
            memories_ptr=memories,
            below_ptr=dz.new_empty(size.batch, size.control),
            **{f"d_{name}_ptr": a for name, a in zip(names, carried, strict=True)},
            **{
                f"i_{name}_ptr": None if parts is None else parts[k] for k, name in enumerate(names)
            },
            dz_ptr=dz,
            dp_ptr=dp,
            f_t=f_t,
            f_b=f_b,
            f_c=f_c,
            **_initial(self.initial, self.reset, self.dtype, all_five=False),
            **rows_of(self.lengths, self.reset),
            **size.arguments(self.input.dtype),
        )
