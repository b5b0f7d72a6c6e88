r"""The memory with least recently used access on GPU: launchers of `lrua` and `lrua_backward`.

Formulas, shapes and errors: `ops/lrua.py`. Forward: one product for all inputs, then one kernel, a
program a row, for all steps; backward: one kernel back over the steps, then one product per weight.
What training keeps are per step the gates, cells, head values, chosen slots and weightings, and the
memory every `segment` (about the root of T) steps; nothing grows with T N M.

The kernels take up to `machine.fits` values of memory a row. Beyond that, the plain path: the
reference on the GPU, its gradient by autograd through the reference, which keeps every step's
memory. Arithmetic and state are float32 for 16-bit storage (float64 for float64); float32 is full
precision, TF32 allowed or not, but for the products over all steps, which are torch's.

State of proof: interpreted and compiled, not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.lrua import _plain, _vjp
from ..reference.lrua import LRUAState
from . import lrua_kernels as kernels
from . import machine
from .common import dense, launcher

_LEARNS = [name for name in LRUAState._fields if name != "usage"]  # parts that have a gradient


class Options(NamedTuple):
    """What is no tensor."""

    lstm: bool
    own_add: bool
    strength: bool
    erase_all: bool
    gamma: float


class _Sizes(machine.Sizes):
    def __init__(
        self, input: Tensor, state: LRUAState, given: machine.Machine, options: Options
    ) -> None:
        self.heads, self.options = state.read_weights.shape[1], options
        weights = given.head_weight, given.controller
        super().__init__(input, state.memory, *weights, options.lstm, self.heads)

    @property
    def on_chip(self) -> bool:
        return machine.fits(self.slots, self.width)

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        found = super().arguments(dtype)
        return {
            **found,
            "BC": min(64, found["BC"]),  # wider ones spill
            "heads": self.heads,
            "erased": self.heads if self.options.erase_all else 1,
            "OWN": self.options.own_add,
            "STRENGTH": self.options.strength,
        }


@launcher
def lrua(
    input: Tensor,
    state: Sequence[Tensor],
    given: machine.Machine,
    options: Options,
    trace: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """`seqmem::lrua` on GPU."""
    first = LRUAState(*state)
    size = _Sizes(input, first, given, options)
    parts = -(-size.steps // machine.SHORTEST_SEGMENT) if save else 0
    rows = size.steps if save else 1, size.batch
    call = machine.Call("lrua", input, first, given)
    record = call.make(*rows, size.record, dtype=call.dtype)
    chosen = call.make(*rows, size.heads, dtype=torch.int64)
    checkpoints = record.new_empty(parts, size.batch, size.width, size.stride)
    if size.on_chip:
        features = call.make(size.steps, size.batch, size.control + size.read_width)
        weightings = size.steps, size.batch, size.heads, size.slots
        usage_trace = call.make(*weightings[:2], size.slots) if trace else None
        write_trace = call.make(*weightings) if trace else None
        read_trace = call.make(*weightings) if trace or save else None
        forward = machine.Forward(size, call, "cell", "usage", "read_weights", "reads")
        memory = machine.padded(first.memory.to(call.dtype))
        if size.batch:
            kernels.lrua_forward[(size.batch,)](
                **forward.arguments(),
                memory_ptr=memory,
                features_ptr=features,
                usage_trace_ptr=usage_trace,
                write_trace_ptr=write_trace,
                read_trace_ptr=read_trace,
                slots_ptr=chosen,
                record_ptr=record,
                checkpoints_ptr=checkpoints if save else None,
                record_rows=size.batch if save else 0,
                GAMMA=options.gamma,
                **size.arguments(input.dtype),
            )
        last = forward.last(memory[:, : size.slots, : size.width])
        traces = [usage_trace, write_trace, read_trace]
    else:
        arguments = input, state, *given._replace(lengths=call.lengths), *options, trace, save
        found = machine.plain_forward(_plain, call, arguments)
        features, last = found[0], found[1:-3]
        traces = [*(a if trace else None for a in found[-3:-1])]
        traces.append(found[-1] if trace or save else None)
    none = input.new_empty(0)
    nothing = none.long(), none.to(call.dtype), none.to(call.dtype)
    kept = (chosen, record, checkpoints) if save else nothing
    return features, *last, *(none if a is None else a for a in traces), *kept


@launcher
def lrua_backward(
    grad_features: Tensor | None,
    grad_hidden: Tensor | None,
    grad_cell: Tensor | None,
    grad_memory: Tensor | None,
    grad_read_weights: Tensor | None,
    grad_reads: Tensor | None,
    grad_write_trace: Tensor | None,
    grad_read_trace: Tensor | None,
    input: Tensor,
    state: Sequence[Tensor],
    given: machine.Machine,
    features: Tensor,
    read_trace: Tensor,
    slots: Tensor,
    saved: Tensor,
    checkpoints: Tensor,
    options: Options,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """`seqmem::lrua_backward` on GPU."""
    grads = grad_hidden, grad_cell, grad_memory, grad_read_weights, grad_reads
    first = LRUAState(*state)
    size = _Sizes(input, first, given, options)
    of_input, of_state, of_weights, of_initial = output_mask
    learns = [name in _LEARNS for name in LRUAState._fields]
    wanted = [of_input, *(of_state and part for part in learns), of_weights, of_weights]
    wanted += [of_initial and part for part in learns[: len(given.initial)]]
    wanted += [of_weights] * len(given.controller)
    call = machine.Call("lrua", input, first, given)
    if size.on_chip:
        back = machine.Backward(size, call, _LEARNS, grads)
        if size.batch:
            kernels.lrua_backward[(size.batch,)](
                **back.arguments(grad_features, features, saved),
                grad_write_trace_ptr=dense(grad_write_trace),
                grad_read_trace_ptr=dense(grad_read_trace),
                read_weights_ptr=first.read_weights.contiguous(),
                trace_ptr=read_trace.contiguous(),
                slots_ptr=slots.contiguous(),
                checkpoints_ptr=checkpoints.contiguous(),
                memories_ptr=back.memories(),
                **call.pointers("cell", "memory", "read_weights"),
                **size.arguments(input.dtype),
            )
        first_grad, parts, starts, of_heads, weights = back.results(features, saved)
        found = [first_grad, *parts, *of_heads, *starts, *weights]
    else:
        of_traces = grad_write_trace, grad_read_trace
        clamped = given._replace(lengths=call.lengths)
        arguments = grad_features, *grads, *of_traces, input, state, *clamped
        rest = features, read_trace, slots, saved, checkpoints, *options, output_mask
        found = machine.plain_backward(_vjp, call, (*arguments, *rest))
    return machine.answer(found, wanted, input)
