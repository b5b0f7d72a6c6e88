r"""The whole-sequence DNC on GPU: launchers of `dnc` and `dnc_backward`.

Formulas, shapes and errors: `ops/dnc.py`. Forward: one product for all inputs, then one kernel, a
program a row, for all steps, with every option. It takes what `_Sizes.on_chip` says: a row's memory
stays in registers, and links are read and written in L2. Beyond that, the plain path: the
reference on the GPU.

Backward: one kernel back over the steps, then one product per weight; what enters each step of a
segment is formed again from its checkpoint. It takes what the forward takes, in float32 and
float64: traces of 16 bits cannot say which of two slots was used less, so that for them, too, the
gradient is autograd's through the reference, which runs again from the start.

Arithmetic and state are float32 for 16-bit storage (float64 for float64).

State of proof: as in lstm.py, but that no GPU has run these kernels so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.dnc import _options_of, _plain, _vjp
from ..reference.dnc import NORM_EPSILON, DNCState
from . import dnc_backward_kernels as backward_kernels
from . import dnc_kernels as kernels
from . import machine
from .common import dense, launcher, next_power_of_2, wide

_ELEMENTS = 16384  # N * M, both padded to powers of two, that a program keeps
_TILE = 2048  # of links, N columns wide, that are in registers at once
_MOVED = [name for name in DNCState._fields if name not in ("hidden", "memory")]


class Machine(NamedTuple):
    """What a call is given between its state and its options."""

    controller: Sequence[Tensor]
    interface_weight: Tensor
    interface_bias: Tensor
    norm: Sequence[Tensor]
    initial: Sequence[Tensor]
    lengths: Tensor | None
    reset: Tensor | None


class Options(NamedTuple):
    """The words among them, and the numbers."""

    options: str
    norm_floor: float
    eps: float
    mask_min: float


class _Sizes(machine.Sizes):
    """A call's sizes and options, and what the kernels take of them."""

    def __init__(
        self,
        input: Tensor,
        state: DNCState,
        given: Machine,
        options: Options,
    ) -> None:
        self.options = _options_of(*options)
        self.reads, self.writes = state.reads.shape[1], state.write_weights.shape[1]
        lstm = "lstm" in options.options.split()
        weights = given.interface_weight, given.controller
        super().__init__(input, state.memory, *weights, lstm, self.reads)
        if input.dtype != wide(input.dtype):  # room for what the CPU keeps there, unrounded
            self.record += (1 + self.writes + self.reads) * self.slots
        block = machine.blocks(self.slots, self.width)
        self.block_n, self.block_w = block["BN"], block["BW"]
        directions = 2 * self.writes * self.reads * self.slots
        self.scratch = 2 * self.block_n + directions
        vectors = 2 + 4 * self.writes + 3 * self.reads
        self.scratch_backward = 3 * self.block_n + 2 * directions + vectors * self.slots
        self.segments = -(-self.steps // machine.SHORTEST_SEGMENT)
        linked = self.writes if self.options.links else 0
        self.checkpoint = self.slots * self.width + linked * (self.slots + 1) * self.slots

    @property
    def on_chip(self) -> bool:
        return self.block_n * self.block_w <= _ELEMENTS

    def of_kernel(
        self, dtype: torch.dtype, scratch: int, tile: int, block_k: int
    ) -> dict[str, Any]:
        options = self.options
        return {
            **self.arguments(dtype),
            "scratch": scratch,
            "checkpoint": self.checkpoint,
            "reads": self.reads,
            "writes": self.writes,
            "SQUASH": options.squash,
            "STRENGTH": 1.0 if options.strength == "oneplus" else 0.0,
            "NORM_FLOOR": options.norm_floor,
            "EPS": options.eps,
            "MASKS": options.masks,
            "MASK_MIN": options.mask_min,
            "DEALLOCATE": options.deallocate,
            "SHARPEN": options.sharpen,
            "LINKS": options.links,
            "SOFTMAX": options.allocation == "softmax",
            "BI": min(self.block_n, tile // self.block_n),
            "BD": max(2, next_power_of_2(1 + 2 * self.writes)),
            "BC": min(32, max(16, next_power_of_2(self.control))),
            "BK": block_k,
        }


@launcher
def dnc(
    input: Tensor,
    state: Sequence[Tensor],
    given: Machine,
    options: Options,
    trace: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """`seqmem::dnc` on GPU."""
    first = DNCState(*state)
    size = _Sizes(input, first, given, options)
    call = machine.Call("dnc", input, first, given)
    record = call.make(size.steps if save else 1, size.batch, size.record, dtype=call.dtype)
    segments = size.segments if save else 0
    checkpoints = record.new_empty(segments, size.batch, size.checkpoint)
    if size.on_chip:
        features = call.make(size.steps, size.batch, size.control + size.read_width)
        likes = first.usage, first.write_weights, first.read_weights
        traces = [
            call.make(size.steps, size.batch, *like.shape[1:]) if trace or save else None
            for like in likes
        ]
        forward = machine.Forward(size, call, *_MOVED)
        memory_out = torch.empty_like(first.memory, memory_format=torch.contiguous_format)
        if size.batch:
            usage, write, read = traces
            kernels.dnc_forward[(size.batch,)](
                **forward.arguments(),
                **_norm(given.norm, record),
                memory_ptr=first.memory.contiguous(),
                features_ptr=features,
                memory_out_ptr=memory_out,
                usage_trace_ptr=usage,
                write_trace_ptr=write,
                read_trace_ptr=read,
                record_ptr=record,
                **_checkpoints(size, checkpoints if save else None),
                normalised_ptr=record.new_empty(size.batch, size.values) if given.norm else None,
                scratch_ptr=record.new_empty(size.batch, size.scratch),
                record_rows=size.batch if save else 0,
                **size.of_kernel(input.dtype, size.scratch, _TILE, 32),
            )
        last = forward.last(memory_out)
    else:
        features, *found = machine.plain_forward(
            _plain,
            call,
            (input, state, *given._replace(lengths=call.lengths), *options, trace, save),
        )
        last = found[: len(first)]
        traces = [a if trace or save else None for a in found[len(first) :]]
    none = input.new_empty(0)
    kept = (record, checkpoints) if save else (none.to(call.dtype), none.to(call.dtype))
    return features, *last, *(none if a is None else a for a in traces), *kept


@launcher
def dnc_backward(
    grad_features: Tensor | None,
    grad_hidden: Tensor | None,
    grad_cell: Tensor | None,
    grad_memory: Tensor | None,
    grad_usage: Tensor | None,
    grad_link: Tensor | None,
    grad_precedence: Tensor | None,
    grad_write_weights: Tensor | None,
    grad_read_weights: Tensor | None,
    grad_reads: Tensor | None,
    grad_usage_trace: Tensor | None,
    grad_write_trace: Tensor | None,
    grad_read_trace: Tensor | None,
    input: Tensor,
    state: Sequence[Tensor],
    given: Machine,
    features: Tensor,
    usage_trace: Tensor,
    write_trace: Tensor,
    read_trace: Tensor,
    saved: Tensor,
    checkpoints: Tensor,
    options: Options,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """`seqmem::dnc_backward` on GPU."""
    of_traces = grad_usage_trace, grad_write_trace, grad_read_trace
    grads = (
        grad_hidden, grad_cell, grad_memory, grad_usage, grad_link, grad_precedence,
        grad_write_weights, grad_read_weights, grad_reads,
    )  # fmt: skip
    first = DNCState(*state)
    size = _Sizes(input, first, given, options)
    of_input, of_state, of_weights, of_initial = output_mask
    counts = [
        (1, of_input),
        (len(first), of_state),
        (len(given.controller) + 2 + len(given.norm), of_weights),
    ]
    wanted = [w for count, w in [*counts, (len(given.initial), of_initial)] for _ in range(count)]
    call = machine.Call("dnc", input, first, given)
    if size.on_chip and input.dtype == call.dtype:
        back = machine.Backward(size, call, DNCState._fields, grads)
        dq = call.make(*back.dp.shape) if given.norm else None
        if size.batch:
            rows, empty = (size.batch, size.segment), input.new_empty
            backward_kernels.dnc_backward[(size.batch,)](
                **back.arguments(grad_features, features, saved),
                **_norm(given.norm, saved),
                grad_usage_trace_ptr=dense(grad_usage_trace),
                grad_write_trace_ptr=dense(grad_write_trace),
                grad_read_trace_ptr=dense(grad_read_trace),
                usage_ptr=first.usage.contiguous(),
                write_weights_ptr=first.write_weights.contiguous(),
                read_weights_ptr=first.read_weights.contiguous(),
                usage_trace_ptr=usage_trace.contiguous(),
                write_trace_ptr=write_trace.contiguous(),
                read_trace_ptr=read_trace.contiguous(),
                **_checkpoints(size, checkpoints.contiguous()),
                segment_memories_ptr=back.memories(),
                segment_links_ptr=empty(*rows, *first.link.shape[1:]),
                segment_precedences_ptr=empty(*rows, *first.precedence.shape[1:]),
                normalised_ptr=empty(*rows, size.values) if given.norm else None,
                scratch_ptr=empty(size.batch, size.scratch_backward),
                dq_ptr=dq,
                **call.pointers("cell", "memory", *_MOVED[1:-1]),
                USAGE_GRADIENT=size.options.usage_gradient,
                **size.of_kernel(input.dtype, size.scratch_backward, _TILE // 2, 16),
            )
        first_grad, parts, starts, of_heads, weights = back.results(features, saved)
        of_norm: list[Tensor] = []
        if dq is not None:
            raw = saved[..., size.record - size.values : size.record]
            plain = torch.nn.functional.layer_norm(raw, raw.shape[-1:], eps=NORM_EPSILON)
            of_norm = [(dq * plain).sum((0, 1)), dq.sum((0, 1))]
        found = [first_grad, *parts, *weights, *of_heads, *of_norm, *starts]
    else:
        clamped = given._replace(lengths=call.lengths)
        arguments = grad_features, *grads, *of_traces, input, state, *clamped
        rest = features, usage_trace, write_trace, read_trace, saved, checkpoints
        found = machine.plain_backward(_vjp, call, (*arguments, *rest, *options, output_mask))
    return machine.answer(found, wanted, input)


def _norm(norm: Sequence[Tensor], like: Tensor) -> dict[str, Tensor | None]:
    weight, bias = [a.to(like.dtype).contiguous() for a in norm] or (None, None)
    return {"norm_weight_ptr": weight, "norm_bias_ptr": bias}


def _checkpoints(size: _Sizes, checkpoints: Tensor | None) -> dict[str, Any]:
    """Where a row's memory, links and precedence are in what is kept of a segment's start."""
    names = ("memories_ptr", "links_ptr", "precedences_ptr")
    if checkpoints is None:
        return dict.fromkeys(names)
    flat = checkpoints.flatten()
    links = size.slots * size.width
    starts = 0, links, links + size.writes * size.slots**2
    return {name: flat[start:] for name, start in zip(names, starts, strict=True)}
