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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.common import reference_vjp
from ..reference import lrua as reference
from ..reference.lrua import LRUAState
from . import lrua_kernels as kernels
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

_USAGE = LRUAState._fields.index("usage")
_LEARNS = [name for name in LRUAState._fields if name != "usage"]  # parts that have a gradient


@dataclass(frozen=True)
class _Options:
    """What is no tensor."""

    lstm: bool
    own_add: bool
    strength: bool
    erase_all: bool
    gamma: float

    def keywords(
        self, initial: Sequence[Tensor], lengths: Tensor | None, reset: Tensor | None
    ) -> dict[str, Any]:
        """The reference's."""
        return {
            "add": "own" if self.own_add else "key",
            "strength": self.strength,
            "erase_all": self.erase_all,
            "gamma": self.gamma,
            "controller_type": "lstm" if self.lstm else "feedforward",
            "initial": LRUAState(*initial) if initial else None,
            "lengths": lengths,
            "reset": reset,
        }


class _Sizes(Sizes):
    def __init__(
        self,
        input: Tensor,
        state: LRUAState,
        head_weight: Tensor,
        controller: Sequence[Tensor],
        options: _Options,
    ) -> None:
        self.heads, self.options = state.read_weights.shape[1], options
        super().__init__(input, state.memory, head_weight, controller, options.lstm, self.heads)

    @property
    def on_chip(self) -> bool:
        return fits(self.slots, self.width)

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


def lrua(
    input: Tensor,
    state: Sequence[Tensor],
    controller: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor,
    initial: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    lstm: bool,
    own_add: bool,
    strength: bool,
    erase_all: bool,
    gamma: float,
    trace: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """`seqmem::lrua` on GPU."""
    torch.ops.seqmem.check_lrua(
        input, state, controller, head_weight, head_bias, initial, lengths, reset, lstm, own_add,
        strength, erase_all, gamma, trace, save,
    )  # fmt: skip
    options, first = _Options(lstm, own_add, strength, erase_all, gamma), LRUAState(*state)
    size = _Sizes(input, first, head_weight, controller, options)
    dtype = wide(input.dtype)
    make = input.new_zeros if lengths is not None else input.new_empty  # of padding: zeros
    kept_steps = size.steps if save else 1
    record = make(kept_steps, size.batch, size.record, dtype=dtype)
    chosen = make(kept_steps, size.batch, size.heads, dtype=torch.int64)
    parts = -(-size.steps // SHORTEST_SEGMENT) if save else 0
    checkpoints = input.new_empty(parts, size.batch, size.width, size.stride, dtype=dtype)
    none = input.new_empty(0)
    nothing = none.long(), none.to(dtype), none.to(dtype)
    kept = (chosen, record, checkpoints) if save else nothing
    with torch.cuda.device_of(input):
        if lengths is not None:
            lengths = row_lengths("lrua", lengths, input.device, size.steps)
        if not size.on_chip:
            start = LRUAState(*to_dtype(dtype, first))
            features, last, did = reference.lrua_trace(
                input.to(dtype), start, to_dtype(dtype, controller), head_weight.to(dtype),
                head_bias.to(dtype),
                **options.keywords(to_dtype(dtype, initial), lengths, reset),
            )  # fmt: skip
            ends = (a.clone() if a is b else a for a, b in zip(last, start, strict=True))
            traces = (did.usage, did.write_weights) if trace else (none, none)
            reading = did.read_weights if trace or save else none
            return *to_dtype(input.dtype, (features, *ends, *traces, reading)), *kept
        features = make(size.steps, size.batch, size.control + size.read_width)
        weightings = (size.steps, size.batch, size.heads, size.slots)
        usage_trace = make(*weightings[:2], size.slots) if trace else None
        write_trace = make(weightings) if trace else None
        read_trace = make(weightings) if trace or save else None
        outs = _forward(
            size, input, first, controller, head_weight, head_bias, initial, lengths, reset,
            features, (usage_trace, write_trace, read_trace), chosen, record,
            checkpoints if save else None,
        )  # fmt: skip
    traced = (none if a is None else a for a in (usage_trace, write_trace, read_trace))
    return features, *outs, *traced, *kept


def _forward(
    size: _Sizes,
    input: Tensor,
    state: LRUAState,
    controller: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor,
    initial: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    features: Tensor,
    traces: tuple[Tensor | None, Tensor | None, Tensor | None],
    chosen: Tensor,
    record: Tensor,
    checkpoints: Tensor | None,
) -> tuple[Tensor, ...]:
    dtype = record.dtype
    packed = Controller.of(controller, size.input, size.gates)
    # [2, B, L, C]: the state before even steps, and before odd ones
    hidden = record.new_zeros(2, size.batch, size.layers, size.control)
    hidden[0, :, : size.kept] = state.hidden.transpose(0, 1)
    # Copies: the kernel moves them on.
    cell, usage, weights, reads = (
        a.to(dtype, copy=True, memory_format=torch.contiguous_format)
        for a in (state.cell.transpose(0, 1), state.usage, state.read_weights, state.reads)
    )
    memory = padded(state.memory.to(dtype))
    hidden_out = torch.empty_like(cell)
    if size.batch:
        flat = without_padding(input, lengths).to(dtype).flatten(0, 1)
        kernels.lrua_forward[(size.batch,)](
            zx_ptr=torch.addmm(packed.biases[0], flat, packed.of_input.t()),
            weight_ptr=packed.packed(transposed=True),
            bias_ptr=torch.stack(packed.biases),
            head_weight_ptr=head_weight.to(dtype).t().contiguous(),
            head_bias_ptr=head_bias.to(dtype).contiguous(),
            hidden_ptr=hidden,
            cell_ptr=cell,
            memory_ptr=memory,
            usage_ptr=usage,
            weights_ptr=weights,
            reads_ptr=reads,
            features_ptr=features,
            hidden_out_ptr=hidden_out,
            usage_trace_ptr=traces[0],
            write_trace_ptr=traces[1],
            read_trace_ptr=traces[2],
            slots_ptr=chosen,
            record_ptr=record,
            checkpoints_ptr=checkpoints,
            record_rows=0 if record.shape[0] == 1 else size.batch,
            GAMMA=size.options.gamma,
            **_initial(initial, reset, dtype, LRUAState._fields),
            **rows_of(lengths, reset),
            **size.arguments(input.dtype),
        )
    memory = memory[:, : size.slots, : size.width]
    kept = (hidden_out.transpose(0, 1), cell.transpose(0, 1), memory, usage, weights, reads)
    return tuple(a.to(input.dtype).contiguous() for a in kept)


def _initial(
    initial: Sequence[Tensor], reset: Tensor | None, dtype: torch.dtype, names: Sequence[str]
) -> dict[str, Tensor | None]:
    if reset is None:
        return {f"initial_{name}_ptr": None for name in names}
    parts = LRUAState(*(a.to(dtype).contiguous() for a in initial))
    parts = parts._replace(memory=padded(parts.memory))
    return {f"initial_{name}_ptr": getattr(parts, name) for name in names}


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
    controller: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor,
    initial: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    features: Tensor,
    read_trace: Tensor,
    slots: Tensor,
    saved: Tensor,
    checkpoints: Tensor,
    lstm: bool,
    own_add: bool,
    strength: bool,
    erase_all: bool,
    gamma: float,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """`seqmem::lrua_backward` on GPU."""
    torch.ops.seqmem.check_lrua_backward(
        grad_features, grad_hidden, grad_cell, grad_memory, grad_read_weights, grad_reads,
        grad_write_trace, grad_read_trace, input, state, controller, head_weight, head_bias,
        initial, lengths, reset, features, read_trace, slots, saved, checkpoints, lstm, own_add,
        strength, erase_all, gamma, output_mask,
    )  # fmt: skip
    options, first = _Options(lstm, own_add, strength, erase_all, gamma), LRUAState(*state)
    size = _Sizes(input, first, head_weight, controller, options)
    grads = (grad_hidden, grad_cell, grad_memory, grad_read_weights, grad_reads)
    of_input, of_state, of_weights, of_initial = output_mask
    learns = [name in _LEARNS for name in LRUAState._fields]
    wanted = [of_input, *(of_state and part for part in learns), of_weights, of_weights]
    wanted += [of_initial and part for part in learns[: len(initial)]]
    wanted += [of_weights] * len(controller)
    with torch.cuda.device_of(input):
        if lengths is not None:
            lengths = row_lengths("lrua", lengths, input.device, size.steps)
        if size.on_chip:
            found = _backward(
                size, input, first, controller, head_weight, initial, lengths, reset, grad_features,
                grads, grad_write_trace, grad_read_trace, features, read_trace, slots, saved,
                checkpoints,
            )  # fmt: skip
        else:
            dtype, count = wide(input.dtype), len(initial)
            inputs = to_dtype(dtype, (input, *first, head_weight, head_bias, *initial, *controller))

            def function(*args: Tensor) -> tuple[Tensor, ...]:
                x, *rest = args
                outputs, last, did = reference.lrua_trace(
                    x, LRUAState(*rest[:6]), rest[8 + count :], rest[6], rest[7],
                    **options.keywords(rest[8 : 8 + count], lengths, reset),
                )  # fmt: skip
                ends = last[:_USAGE] + last[_USAGE + 1 :]
                return outputs, *ends, did.write_weights, did.read_weights

            seeds = [
                None if a is None else a.to(dtype)
                for a in (grad_features, *grads, grad_write_trace, grad_read_trace)
            ]
            with autograd_below():
                found = [
                    None if a is None else a.detach()
                    for a in reference_vjp(function, inputs, seeds, wanted)
                ]
    pairs = zip(found, wanted, strict=True)
    none = input.new_empty(0)
    return [none if a is None or not is_wanted else a.to(input.dtype) for a, is_wanted in pairs]


def _backward(
    size: _Sizes,
    input: Tensor,
    state: LRUAState,
    controller: Sequence[Tensor],
    head_weight: Tensor,
    initial: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    grad_features: Tensor | None,
    grads: Sequence[Tensor | None],
    grad_write_trace: Tensor | None,
    grad_read_trace: Tensor | None,
    features: Tensor,
    read_trace: Tensor,
    chosen: Tensor,
    record: Tensor,
    checkpoints: Tensor,
) -> list[Tensor | None]:
    """Gradients in the op's order, None for usages."""
    dtype, steps, batch = wide(input.dtype), size.steps, size.batch
    packed = Controller.of(controller, size.input, size.gates)
    make = input.new_zeros if lengths is not None else input.new_empty
    dz = make(steps, batch, size.layers, size.control * size.gates, dtype=dtype)
    dp = make(steps, batch, size.values, dtype=dtype)
    parts = [getattr(state, name) for name in _LEARNS]
    pairs = enumerate(zip(grads, parts, strict=True))
    carried = [_carried(grad, a, k < 2, dtype) for k, (grad, a) in pairs]
    carried[2] = padded(carried[2])
    shares = None if reset is None else [torch.zeros_like(a) for a in carried]
    if batch:
        f_t, f_b, f_c = (0, 0, 0) if grad_features is None else grad_features.stride()
        kernels.lrua_backward[(batch,)](
            grad_features_ptr=grad_features,
            grad_write_trace_ptr=_dense(grad_write_trace),
            grad_read_trace_ptr=_dense(grad_read_trace),
            weight_ptr=packed.packed(transposed=False),
            head_weight_ptr=head_weight.to(dtype).contiguous(),
            cell_ptr=state.cell.contiguous(),
            weights_ptr=state.read_weights.contiguous(),
            features_ptr=features.contiguous(),
            trace_ptr=read_trace.contiguous(),
            slots_ptr=chosen.contiguous(),
            record_ptr=record.contiguous(),
            checkpoints_ptr=checkpoints.contiguous(),
            memories_ptr=dz.new_empty(batch, size.segment, *carried[2].shape[1:]),
            below_ptr=dz.new_empty(batch, size.control),
            **{f"d_{name}_ptr": a for name, a in zip(_LEARNS, carried, strict=True)},
            **{
                f"i_{name}_ptr": None if shares is None else shares[k]
                for k, name in enumerate(_LEARNS)
            },
            dz_ptr=dz,
            dp_ptr=dp,
            f_t=f_t,
            f_b=f_b,
            f_c=f_c,
            **_initial(initial, reset, dtype, ("cell", "memory", "read_weights")),
            **rows_of(lengths, reset),
            **size.arguments(input.dtype),
        )
    carried[:2] = [a.transpose(0, 1) for a in carried[:2]]
    for memories in (carried, shares or []):
        memories[2:3] = [a[:, : size.slots, : size.width] for a in memories[2:3]]
    of_initial: list[Tensor | None] = []
    if shares is not None:
        of_initial = [*(a.sum(0) for a in shares)]
        of_initial.insert(_USAGE, None)
    elif initial:
        of_initial = [torch.zeros_like(a) for a in initial]
    heads, weights = weight_gradients(
        size, input, state, initial, lengths, reset, features, record, dz.flatten(0, 1),
        dp.flatten(0, 1),
    )  # fmt: skip
    of_input = (dz[:, :, 0] @ packed.of_input).view_as(input)
    of_state: list[Tensor | None] = [*carried]
    of_state.insert(_USAGE, None)
    return [of_input, *of_state, *heads, *of_initial, *weights]


def _carried(grad: Tensor | None, like: Tensor, by_layer: bool, dtype: torch.dtype) -> Tensor:
    """A state's gradient, wide, batch first; the kernel takes it from the last to the first."""
    a = torch.zeros_like(like, dtype=dtype) if grad is None else grad.to(dtype)
    return (a.transpose(0, 1) if by_layer else a).clone(memory_format=torch.contiguous_format)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
