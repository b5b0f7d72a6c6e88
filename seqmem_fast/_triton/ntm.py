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

import math
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
from .common import accumulator, autograd_below, row_lengths, wide
from .ntm_addressing import blocks, fits

_SHORTEST_SEGMENT = 8  # as csrc/cpu/ntm_kernel.h: the checkpoints' shape is the op's
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

    @property
    def gates(self) -> int:
        return 4 if self.lstm else 1


class _Sizes:
    """A call's sizes, and what every kernel takes of them."""

    def __init__(
        self, input: Tensor, memory: Tensor, head_weight: Tensor, layers: int, options: _Options
    ) -> None:
        self.steps, self.batch, self.input = input.shape
        self.slots, self.width = memory.shape[-2:]
        self.values, self.control = head_weight.shape
        self.layers, self.options = layers, options
        self.heads, self.reads = len(options.heads), options.heads.count("r")
        self.read_width = self.reads * self.width
        self.taps = 2 * options.shift_range + 1
        self.kept = layers if options.lstm else 0  # layers with a state
        self.record = (5 * self.kept + layers - 1) * self.control + self.values
        self.stride = ((self.slots + 15) // 16 // 2 * 2 + 1) * 16  # of the op's checkpoints
        self.segment = max(_SHORTEST_SEGMENT, math.isqrt(max(self.steps - 1, 0)) + 1)

    @property
    def on_chip(self) -> bool:
        return fits(self.slots, self.width) and self.heads <= _MOST_HEADS

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        block_c = min(128, max(16, triton.next_power_of_2(self.control)))
        return {
            "steps": self.steps,
            "batch": self.batch,
            "record": self.record,
            "checkpoint": self.width * self.stride,
            "segment": self.segment,
            "control": self.control,
            "slots": self.slots,
            "width": self.width,
            "values": self.values,
            "heads": self.heads,
            "writes": self.options.writes,
            "taps": self.taps,
            "read_width": self.read_width,
            "LAYERS": self.layers,
            "LSTM": self.options.lstm,
            "SQUASH": self.options.squash,
            "ACC": accumulator(dtype),
            "BS": max(2, triton.next_power_of_2(self.taps)),
            "BC": block_c,
            "BK": 32 if block_c >= 64 else 16,
            **blocks(self.slots, self.width),
            "num_warps": 8,
        }


def _by_unit(t: Tensor, gates: int) -> Tensor:
    """Rows [G * C] of a weight or bias with the gates of a unit side by side."""
    return t.unflatten(0, (gates, -1)).transpose(0, 1).flatten(0, 1)


def _by_gate(t: Tensor, gates: int) -> Tensor:
    return t.unflatten(0, (-1, gates)).transpose(0, 1).flatten(0, 1)


def _to(dtype: torch.dtype, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.to(dtype) for t in tensors]


@dataclass(frozen=True)
class _Controller:
    """The controller's weights in the wide dtype, gates by unit."""

    of_input: Tensor  # [C * G, I]
    layers: list[Tensor]  # [C * G, K] of [below, h]; the first layer's below are the reads
    biases: list[Tensor]  # [C * G]

    @staticmethod
    def of(controller: Sequence[Tensor], width: int, options: _Options) -> _Controller:
        dtype = wide(controller[0].dtype)
        ours = [_by_unit(t.to(dtype), options.gates) for t in controller]
        if options.lstm:
            firsts, biases = ours[::4], [a + b for a, b in zip(ours[2::4], ours[3::4], strict=True)]
        else:
            firsts, biases = ours[::2], ours[1::2]
        of_input, firsts[0] = firsts[0][:, :width], firsts[0][:, width:]
        if options.lstm:
            firsts = [torch.cat(pair, 1) for pair in zip(firsts, ours[1::4], strict=True)]
        return _Controller(of_input, firsts, biases)

    def packed(self, transposed: bool) -> Tensor:
        """All layers, one after the other."""
        return torch.cat([(w.t() if transposed else w).flatten() for w in self.layers])


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
    size = _Sizes(input, memory, head_weight, len(controller) // (4 if lstm else 2), options)
    state = NTMState(hidden, cell, memory, weightings, reads)
    dtype = wide(input.dtype)
    make = input.new_zeros if lengths is not None else input.new_empty  # of padding: zeros
    record = make(size.steps if save else 1, size.batch, size.record, dtype=dtype)
    parts = -(-size.steps // _SHORTEST_SEGMENT) if save else 0
    checkpoints = input.new_empty(parts, size.batch, size.width, size.stride, dtype=dtype)
    none = input.new_empty(0, dtype=dtype)
    kept = (record, checkpoints) if save else (none, none)
    with torch.cuda.device_of(input):
        if lengths is not None:
            lengths = row_lengths("ntm", lengths, input.device, size.steps)
        if not size.on_chip:
            start = NTMState(*_to(dtype, state))
            features, last, all_weightings = reference.ntm_trace(
                input.to(dtype), start, _to(dtype, controller), head_weight.to(dtype),
                head_bias.to(dtype), **_keywords(options, _to(dtype, initial), lengths, reset),
            )  # fmt: skip
            ends = (a.clone() if a is b else a for a, b in zip(last, start, strict=True))
            wanted = all_weightings if trace or save else none
            return *_to(input.dtype, (features, *ends, wanted)), *kept
        features = make(size.steps, size.batch, size.control + size.read_width)
        every = make(size.steps, size.batch, size.heads, size.slots) if trace or save else None
        outs = _forward(
            size, input, state, _Controller.of(controller, size.input, options), head_weight,
            head_bias, initial, lengths, reset, features, every, record,
            checkpoints if save else None,
        )  # fmt: skip
    return features, *outs, input.new_empty(0) if every is None else every, *kept


def _forward(
    size: _Sizes,
    input: Tensor,
    state: NTMState,
    controller: _Controller,
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
        flat = _without_padding(input, lengths).to(dtype).flatten(0, 1)
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
            **_rows(lengths, reset),
            **size.arguments(input.dtype),
        )
    kept = (hidden_out.transpose(0, 1), cell.transpose(0, 1), memory_out, weightings, reads)
    return tuple(a.to(input.dtype).contiguous() for a in kept)


def _rows(lengths: Tensor | None, reset: Tensor | None) -> dict[str, Any]:
    if reset is not None:
        reset = reset.contiguous().view(torch.uint8)
    return {"lengths_ptr": lengths, "reset_ptr": reset}


def _initial(
    initial: Sequence[Tensor], reset: Tensor | None, dtype: torch.dtype, all_five: bool
) -> dict[str, Tensor | None]:
    names = NTMState._fields if all_five else ("cell", "memory", "weightings")
    if reset is None:
        return {f"initial_{name}_ptr": None for name in names}
    parts = NTMState(*(a.to(dtype).contiguous() for a in initial))
    parts = parts._replace(memory=_padded(parts.memory))
    return {f"initial_{name}_ptr": getattr(parts, name) for name in names}


def _padded(memory: Tensor) -> Tensor:
    """[..., N, M] as the kernels' block [..., BN, BW], zero outside."""
    slots, width = memory.shape[-2:]
    block = blocks(slots, width)
    padded = memory.new_zeros(*memory.shape[:-2], block["BN"], block["BW"])
    padded[..., :slots, :width] = memory
    return padded


def _without_padding(input: Tensor, lengths: Tensor | None) -> Tensor:
    """The input with zeros beyond `lengths`: nothing is done there, but 0 * NaN is not 0."""
    if lengths is None:
        return input
    time = torch.arange(input.shape[0], device=input.device)[:, None]
    return input.masked_fill((time >= lengths)[..., None], 0)


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
    size = _Sizes(input, memory, head_weight, len(controller) // (4 if lstm else 2), options)
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
            inputs = _to(dtype, (input, *state, head_weight, head_bias, *initial, *controller))
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
        self.controller = _Controller.of(controller, size.input, size.options)
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
        gates = size.control * size.options.gates
        dz = make(steps, batch, size.layers, gates, dtype=dtype)  # of padding: zeros
        dp = make(steps, batch, size.values, dtype=dtype)
        carried = [self._carried(grad, a) for grad, a in zip(grads, self.state, strict=True)]
        carried[2] = _padded(carried[2])
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
        heads, weights = self._weights(dz.flatten(0, 1), dp.flatten(0, 1), features, record)
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
            **_rows(self.lengths, self.reset),
            **size.arguments(self.input.dtype),
        )

    def _weights(
        self, dz: Tensor, dp: Tensor, features: Tensor, record: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of head weight and bias, and of the controller; dz and dp are [T * B, ...]."""
        size, lstm = self.size, self.size.options.lstm
        kept = 5 * size.kept * size.control
        outputs = list(record[..., kept:].split(size.control, -1)[: size.layers - 1])
        outputs.append(features[..., : size.control].to(self.dtype))
        heads = [dp.t() @ outputs[-1].flatten(0, 1), dp.sum(0)]

        x = _without_padding(self.input, self.lengths).to(self.dtype)
        reads = self._before(features[..., size.control :], 4)
        below = [torch.cat((x, reads), -1), *outputs[:-1]]
        weights: list[Tensor] = []
        for k in range(size.layers):
            d = _by_gate(dz[:, k].t(), size.options.gates)  # [G * C, T * B]
            weights.append(d @ below[k].flatten(0, 1))
            if lstm:
                weights += [d @ self._before(outputs[k], 0, k).flatten(0, 1), d.sum(1)]
            weights.append(d.sum(1))
        return heads, weights

    def _before(self, values: Tensor, part: int, layer: int | None = None) -> Tensor:
        """What enters each step [T, B, ...] where `values` leave it: hidden (0) or reads (4)."""

        def pick(state: Sequence[Tensor]) -> Tensor:
            return state[part] if layer is None else state[part][layer]

        first = pick(self.state).reshape(1, self.size.batch, -1).to(self.dtype)
        entering = torch.cat((first, values.to(self.dtype)))[: self.size.steps]
        if self.reset is not None:
            fresh = pick(self.initial).flatten().to(self.dtype)
            entering = torch.where(self.reset[..., None], fresh, entering)
        return entering
