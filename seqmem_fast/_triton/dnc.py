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
from typing import Any

import torch
import triton
from torch import Tensor

from ..ops.dnc import _options_of, _plain, _vjp
from ..reference.dnc import NORM_EPSILON, DNCState
from . import dnc_backward_kernels as backward_kernels
from . import dnc_kernels as kernels
from .common import autograd_below, row_lengths, wide
from .machine import (
    SHORTEST_SEGMENT,
    Controller,
    Sizes,
    blocks,
    padded,
    rows_of,
    to_dtype,
    weight_gradients,
    without_padding,
)

_ELEMENTS = 16384  # N * M, both padded to powers of two, that a program keeps
_TILE = 2048  # of links, N columns wide, that are in registers at once
_MOVED = [name for name in DNCState._fields if name not in ("hidden", "memory")]


class _Sizes(Sizes):
    """A call's sizes and options, and what the kernels take of them."""

    def __init__(
        self,
        input: Tensor,
        state: DNCState,
        controller: Sequence[Tensor],
        interface_weight: Tensor,
        words: str,
        floats: tuple[float, float, float],
    ) -> None:
        self.options = _options_of(words, *floats)
        self.reads, self.writes = state.reads.shape[1], state.write_weights.shape[1]
        lstm = "lstm" in words.split()
        super().__init__(input, state.memory, interface_weight, controller, lstm, self.reads)
        if input.dtype != wide(input.dtype):  # room for what the CPU keeps there, unrounded
            self.record += (1 + self.writes + self.reads) * self.slots
        block = blocks(self.slots, self.width)
        self.block_n, self.block_w = block["BN"], block["BW"]
        directions = 2 * self.writes * self.reads * self.slots
        self.scratch = 2 * self.block_n + directions
        vectors = 2 + 4 * self.writes + 3 * self.reads
        self.scratch_backward = 3 * self.block_n + 2 * directions + vectors * self.slots
        self.segments = -(-self.steps // SHORTEST_SEGMENT)
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
            "BD": max(2, triton.next_power_of_2(1 + 2 * self.writes)),
            "BC": min(32, max(16, triton.next_power_of_2(self.control))),
            "BK": block_k,
        }


def dnc(
    input: Tensor,
    state: Sequence[Tensor],
    controller: Sequence[Tensor],
    interface_weight: Tensor,
    interface_bias: Tensor,
    norm: Sequence[Tensor],
    initial: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    options: str,
    norm_floor: float,
    eps: float,
    mask_min: float,
    trace: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """`seqmem::dnc` on GPU."""
    arguments = (
        input, state, controller, interface_weight, interface_bias, norm, initial, lengths, reset,
        options, norm_floor, eps, mask_min, trace, save,
    )  # fmt: skip
    torch.ops.seqmem.check_dnc(*arguments)
    first = DNCState(*state)
    floats = (norm_floor, eps, mask_min)
    size = _Sizes(input, first, controller, interface_weight, options, floats)
    make = input.new_zeros if lengths is not None else input.new_empty  # of padding: zeros
    dtype = wide(input.dtype)
    record = make(size.steps if save else 1, size.batch, size.record, dtype=dtype)
    checkpoints = input.new_empty(
        size.segments if save else 0, size.batch, size.checkpoint, dtype=dtype
    )
    with torch.cuda.device_of(input):
        if lengths is not None:
            lengths = row_lengths("dnc", lengths, input.device, size.steps)
        if size.on_chip:
            features = make(size.steps, size.batch, size.control + size.read_width)
            traces: list[Tensor | None] = [
                make(size.steps, size.batch, *like.shape[1:])
                for like in (first.usage, first.write_weights, first.read_weights)
            ] if trace or save else [None, None, None]  # fmt: skip
            last = _forward(
                size, input, first, controller, interface_weight, interface_bias, norm, initial,
                lengths, reset, features, traces, record, checkpoints if save else None,
            )  # fmt: skip
        else:
            features, last, traces = _plain_forward(size, arguments, lengths)
    none = input.new_empty(0)
    kept = [none if a is None or not (trace or save) else a for a in traces]
    if save:
        return features, *last, *kept, record, checkpoints
    return features, *last, *kept, none.to(record.dtype), none.to(record.dtype)


def _plain_forward(
    size: _Sizes, arguments: tuple[Any, ...], lengths: Tensor | None
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """By the reference, rounded at the ends alone."""
    dtype = wide(arguments[0].dtype)
    found = _plain(*_widened(arguments[:7], dtype), lengths, *arguments[8:])
    given = {id(a) for a in arguments[1]}
    outs = [a.clone() if id(a) in given else a.to(arguments[0].dtype) for a in found]
    return outs[0], outs[1:10], [*outs[10:]]


def _widened(arguments: Sequence[Tensor | Sequence[Tensor]], dtype: torch.dtype) -> list[Any]:
    return [a.to(dtype) if isinstance(a, Tensor) else to_dtype(dtype, a) for a in arguments]


def _forward(
    size: _Sizes,
    input: Tensor,
    state: DNCState,
    controller: Sequence[Tensor],
    interface_weight: Tensor,
    interface_bias: Tensor,
    norm: Sequence[Tensor],
    initial: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    features: Tensor,
    traces: Sequence[Tensor | None],
    record: Tensor,
    checkpoints: Tensor | None,
) -> list[Tensor]:
    """The last state; features, traces and what is kept are filled."""
    dtype = wide(input.dtype)
    packed = Controller.of(controller, size.input, size.gates)
    # [2, B, L, C]: the state before even steps, and before odd ones
    hidden = input.new_zeros(2, size.batch, size.layers, size.control, dtype=dtype)
    hidden[0, :, : size.kept] = state.hidden.transpose(0, 1)
    # Copies: the kernel moves them on.
    moved = {
        name: getattr(state, name).to(dtype, copy=True, memory_format=torch.contiguous_format)
        for name in _MOVED
    }
    moved["cell"] = moved["cell"].transpose(0, 1).contiguous()
    hidden_out = torch.empty_like(moved["cell"])
    memory_out = torch.empty_like(state.memory, memory_format=torch.contiguous_format)
    if size.batch:
        weight, bias = _optional(norm, 2, dtype)
        usage, write, read = traces
        kernels.dnc_forward[(size.batch,)](
            zx_ptr=torch.addmm(
                packed.biases[0],
                without_padding(input, lengths).to(dtype).flatten(0, 1),
                packed.of_input.t(),
            ),
            weight_ptr=packed.packed(transposed=True),
            bias_ptr=torch.stack(packed.biases),
            interface_weight_ptr=interface_weight.to(dtype).t().contiguous(),
            interface_bias_ptr=interface_bias.to(dtype).contiguous(),
            norm_weight_ptr=weight,
            norm_bias_ptr=bias,
            hidden_ptr=hidden,
            **{f"{name}_ptr": a for name, a in moved.items()},
            **_initial(initial, reset, dtype, backward=False),
            memory_ptr=state.memory.contiguous(),
            **rows_of(lengths, reset),
            features_ptr=features,
            hidden_out_ptr=hidden_out,
            memory_out_ptr=memory_out,
            usage_trace_ptr=usage,
            write_trace_ptr=write,
            read_trace_ptr=read,
            record_ptr=record,
            **_checkpoints(size, checkpoints),
            normalised_ptr=hidden.new_empty(size.batch, size.values) if norm else None,
            scratch_ptr=hidden.new_empty(size.batch, size.scratch),
            record_rows=0 if checkpoints is None else size.batch,
            **size.of_kernel(input.dtype, size.scratch, _TILE, 32),
        )
    last = {"hidden": hidden_out.transpose(0, 1), "memory": memory_out, **moved}
    last["cell"] = moved["cell"].transpose(0, 1)
    return [last[name].to(input.dtype).contiguous() for name in DNCState._fields]


def _optional(
    tensors: Sequence[Tensor], count: int, dtype: torch.dtype
) -> Sequence[Tensor] | Sequence[None]:
    return [a.to(dtype).contiguous() for a in tensors] or [None] * count


def _initial(
    initial: Sequence[Tensor],
    reset: Tensor | None,
    dtype: torch.dtype,
    backward: bool,
) -> dict[str, Tensor | None]:
    unread = ("hidden", "reads") if backward else ()
    names = {name: f"initial_{name}_ptr" for name in DNCState._fields if name not in unread}
    if reset is None:
        return dict.fromkeys(names.values())
    parts = DNCState(*_optional(initial, len(DNCState._fields), dtype))
    parts = parts._replace(memory=padded(parts.memory))
    return {pointer: getattr(parts, name) for name, pointer in names.items()}


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
    controller: Sequence[Tensor],
    interface_weight: Tensor,
    interface_bias: Tensor,
    norm: Sequence[Tensor],
    initial: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    features: Tensor,
    usage_trace: Tensor,
    write_trace: Tensor,
    read_trace: Tensor,
    saved: Tensor,
    checkpoints: Tensor,
    options: str,
    norm_floor: float,
    eps: float,
    mask_min: float,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """`seqmem::dnc_backward` on GPU."""
    grads = [
        grad_features, grad_hidden, grad_cell, grad_memory, grad_usage, grad_link, grad_precedence,
        grad_write_weights, grad_read_weights, grad_reads, grad_usage_trace, grad_write_trace,
        grad_read_trace,
    ]  # fmt: skip
    tensors = input, state, controller, interface_weight, interface_bias, norm, initial
    torch.ops.seqmem.check_dnc_backward(
        *grads, *tensors, lengths, reset, features, usage_trace, write_trace, read_trace, saved,
        checkpoints, options, norm_floor, eps, mask_min, output_mask,
    )  # fmt: skip
    first = DNCState(*state)
    floats = (norm_floor, eps, mask_min)
    size = _Sizes(input, first, controller, interface_weight, options, floats)
    of_input, of_state, of_weights, of_initial = output_mask
    counts = [(1, of_input), (len(first), of_state), (len(controller) + 2 + len(norm), of_weights)]
    wanted = [w for count, w in [*counts, (len(initial), of_initial)] for _ in range(count)]
    with torch.cuda.device_of(input):
        if lengths is not None:
            lengths = row_lengths("dnc", lengths, input.device, input.shape[0])
        if size.on_chip and input.dtype == wide(input.dtype):
            back = _Backward(
                size, input, first, controller, interface_weight, norm, initial, lengths, reset
            )
            found = back.run(
                grads, features, (usage_trace, write_trace, read_trace), saved, checkpoints
            )  # fmt: skip
        else:
            found = _plain_backward(
                (*grads, *tensors, lengths, reset, features, usage_trace, write_trace, read_trace,
                 saved, checkpoints, options, *floats, output_mask)
            )  # fmt: skip
    none = input.new_empty(0)
    return [
        none if a is None or not is_wanted else a.to(input.dtype)
        for a, is_wanted in zip(found, wanted, strict=True)
    ]


def _plain_backward(arguments: Sequence[Any]) -> list[Tensor | None]:
    """Through the reference, which runs once more, rounded at the ends alone."""
    dtype = wide(arguments[13].dtype)
    grads = [None if a is None else a.to(dtype) for a in arguments[:13]]
    with autograd_below():
        found = _vjp(*grads, *_widened(arguments[13:20], dtype), *arguments[20:])
    return [None if a is None else a.detach() for a in found]


class _Backward:
    """The kernel's backward of one call."""

    def __init__(
        self,
        size: _Sizes,
        input: Tensor,
        state: DNCState,
        controller: Sequence[Tensor],
        interface_weight: Tensor,
        norm: Sequence[Tensor],
        initial: Sequence[Tensor],
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> None:
        self.size, self.input, self.state, self.initial = size, input, state, initial
        self.controller = Controller.of(controller, size.input, size.gates)
        self.interface_weight, self.norm = interface_weight.contiguous(), norm
        self.lengths, self.reset = lengths, reset

    def run(
        self,
        grads: Sequence[Tensor | None],
        features: Tensor,
        traces: Sequence[Tensor],
        record: Tensor,
        checkpoints: Tensor,
    ) -> list[Tensor | None]:
        """Gradients in the op's order."""
        size, state = self.size, self.state
        steps, batch = size.steps, size.batch
        make = self.input.new_zeros if self.lengths is not None else self.input.new_empty
        dz = make(steps, batch, size.layers, size.control * (4 if size.lstm else 1))
        dp = make(steps, batch, size.values)  # of padding: zeros
        dq = make(steps, batch, size.values) if self.norm else None
        carried = [self._carried(grad, a) for grad, a in zip(grads[1:10], state, strict=True)]
        parts = None
        if self.reset is not None:
            parts = [torch.zeros_like(a) for a in carried]
        if batch:
            self._launch(grads, carried, parts, features, traces, record, checkpoints, dz, dp, dq)
        for some in (carried, parts or []):
            some[2:3] = [a[:, : size.slots, : size.width] for a in some[2:3]]
        of_initial: list[Tensor | None] = [torch.zeros_like(a) for a in self.initial]
        if parts is not None:
            of_initial = [a.sum(0) for a in parts]
        carried[:2] = [a.transpose(0, 1) for a in carried[:2]]
        heads, weights = weight_gradients(
            size, self.input, state, self.initial, self.lengths, self.reset, features, record,
            dz.flatten(0, 1), dp.flatten(0, 1),
        )  # fmt: skip
        of_norm: list[Tensor] = []
        if dq is not None:
            raw = record[..., size.record - size.values : size.record]
            plain = torch.nn.functional.layer_norm(raw, raw.shape[-1:], eps=NORM_EPSILON)
            of_norm = [(dq * plain).sum((0, 1)), dq.sum((0, 1))]
        of_input = (dz[:, :, 0] @ self.controller.of_input).view_as(self.input)
        return [of_input, *carried, *weights, *heads, *of_norm, *of_initial]

    def _carried(self, grad: Tensor | None, like: Tensor) -> Tensor:
        """A state's gradient, batch first; the kernel takes it from the last to the first."""
        a = torch.zeros_like(like) if grad is None else grad
        if like is self.state.hidden or like is self.state.cell:
            a = a.transpose(0, 1)
        if like is self.state.memory:
            return padded(a)
        return a.clone(memory_format=torch.contiguous_format)

    def _launch(
        self,
        grads: Sequence[Tensor | None],
        carried: Sequence[Tensor],
        parts: Sequence[Tensor] | None,
        features: Tensor,
        traces: Sequence[Tensor],
        record: Tensor,
        checkpoints: Tensor,
        dz: Tensor,
        dp: Tensor,
        dq: Tensor | None,
    ) -> None:
        size, names = self.size, DNCState._fields
        empty = dz.new_empty
        f_t, f_b, f_c = (0, 0, 0) if grads[0] is None else grads[0].stride()
        of_traces = [None if a is None else a.contiguous() for a in grads[10:]]
        usage, write, read = (a.contiguous() for a in traces)
        weight, bias = _optional(self.norm, 2, dz.dtype)
        rows = size.batch, size.segment
        backward_kernels.dnc_backward[(size.batch,)](
            grad_features_ptr=grads[0],
            grad_usage_trace_ptr=of_traces[0],
            grad_write_trace_ptr=of_traces[1],
            grad_read_trace_ptr=of_traces[2],
            weight_ptr=self.controller.packed(transposed=False),
            interface_weight_ptr=self.interface_weight,
            norm_weight_ptr=weight,
            norm_bias_ptr=bias,
            cell_ptr=self.state.cell.contiguous(),
            usage_ptr=self.state.usage.contiguous(),
            write_weights_ptr=self.state.write_weights.contiguous(),
            read_weights_ptr=self.state.read_weights.contiguous(),
            **_initial(self.initial, self.reset, dz.dtype, backward=True),
            **rows_of(self.lengths, self.reset),
            features_ptr=features.contiguous(),
            usage_trace_ptr=usage,
            write_trace_ptr=write,
            read_trace_ptr=read,
            record_ptr=record.contiguous(),
            **_checkpoints(size, checkpoints.contiguous()),
            segment_memories_ptr=empty(*rows, size.block_n, size.block_w),
            segment_links_ptr=empty(*rows, *self.state.link.shape[1:]),
            segment_precedences_ptr=empty(*rows, *self.state.precedence.shape[1:]),
            normalised_ptr=empty(*rows, size.values) if self.norm else None,
            below_ptr=empty(size.batch, size.control),
            scratch_ptr=empty(size.batch, size.scratch_backward),
            **{f"d_{name}_ptr": a for name, a in zip(names, carried, strict=True)},
            **{
                f"i_{name}_ptr": None if parts is None else parts[k] for k, name in enumerate(names)
            },
            dz_ptr=dz,
            dp_ptr=dp,
            dq_ptr=dq,
            f_t=f_t,
            f_b=f_b,
            f_c=f_c,
            USAGE_GRADIENT=size.options.usage_gradient,
            **size.of_kernel(dz.dtype, size.scratch_backward, _TILE // 2, 16),
        )


def _checkpoints(size: _Sizes, checkpoints: Tensor | None) -> dict[str, Any]:
    """Where a row's memory, links and precedence are in what is kept of a segment's start."""
    names = ("memories_ptr", "links_ptr", "precedences_ptr")
    if checkpoints is None:
        return dict.fromkeys(names)
    flat = checkpoints.flatten()
    links = size.slots * size.width
    starts = 0, links, links + size.writes * size.slots**2
    return {name: flat[start:] for name, start in zip(names, starts, strict=True)}
