r"""The whole-sequence NTM on GPU: launchers of `ntm` and `ntm_backward`.

Formulas, shapes and errors: `ops/ntm.py`. Forward: one product for all inputs, then one kernel, a
program a row, for all steps. Backward: one kernel back over the steps, then one product per weight.
Both kernels are those of csrc/cuda/ntm_sequence_kernel.h where the package was built with nvcc and
a block can hold the controller's weights, else Triton's. What training keeps are per step the
gates, cells, head values and weightings, and the memory every `segment` (about the root of T)
steps; nothing grows with T N M.

The kernels take up to `ntm.fits` values of memory a row and 31 heads. Beyond that, the plain path:
the reference on the GPU, its gradient by autograd through the reference, which keeps every step's
memory. Arithmetic and state are float32 for 16-bit storage (float64 for float64); float32 is full
precision, TF32 allowed or not, but for the products over all steps, which are torch's.

State of proof: as in lstm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.ntm import _plain, _vjp
from ..reference.ntm_addressing import NTMState
from . import machine
from . import ntm_kernels as kernels
from .common import dense, launcher, next_power_of_2

_MOST_HEADS = 31  # bits of an integer
# Where the package was built with nvcc.
_forward_sequence = getattr(torch.ops.seqmem, "ntm_forward_sequence_", None)
_backward_sequence = getattr(torch.ops.seqmem, "ntm_backward_sequence_", None)


class Options(NamedTuple):
    """What is no tensor."""

    heads: str
    shift_range: int
    lstm: bool
    squash: bool

    @property
    def writes(self) -> int:
        return sum(1 << k for k, head in enumerate(self.heads) if head == "w")


class _Sizes(machine.Sizes):
    def __init__(
        self, input: Tensor, memory: Tensor, given: machine.Machine, options: Options
    ) -> None:
        reads = options.heads.count("r")
        weights = given.head_weight, given.controller
        super().__init__(input, memory, *weights, options.lstm, reads)
        self.options, self.heads = options, len(options.heads)
        self.taps = 2 * options.shift_range + 1

    @property
    def on_chip(self) -> bool:
        return machine.fits(self.slots, self.width) and self.heads <= _MOST_HEADS

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            **super().arguments(dtype),
            "heads": self.heads,
            "writes": self.options.writes,
            "taps": self.taps,
            "SQUASH": self.options.squash,
            "BS": max(2, next_power_of_2(self.taps)),
        }


def _in_blocks(size: _Sizes, given: dict[str, Any], record: Tensor | None) -> bool:
    """Runs the kernel in CUDA C++ where it serves: for an LSTM of one layer, narrow enough."""
    if _forward_sequence is None or not size.lstm or size.layers != 1:
        return False
    initial = [given[f"initial_{name}_ptr"] for name in NTMState._fields]
    names = "cell", "weightings", "reads"
    return bool(
        _forward_sequence(
            *(given[f"{name}_ptr"] for name in ("zx", "weight", "head_weight", "head_bias")),
            given["hidden_ptr"][0],
            given["memory_ptr"],
            *(given[f"{name}_ptr"] for name in names),
            [] if initial[0] is None else initial,
            given["lengths_ptr"],
            given["reset_ptr"],
            *(given[f"{name}_ptr"] for name in ("features", "hidden_out", "memory_out", "trace")),
            record,
            given["checkpoints_ptr"],
            size.segment,
            size.options.writes,
            size.taps,
            size.options.squash,
        )
    )


def _back_in_blocks(size: _Sizes, given: dict[str, Any]) -> bool:
    """The same for the backward."""
    if _backward_sequence is None or not size.lstm or size.layers != 1:
        return False
    initial = [given[f"initial_{name}_ptr"] for name in ("cell", "memory", "weightings")]
    of_initial = [given[f"i_{name}_ptr"] for name in NTMState._fields]
    before = "grad_features", "grad_trace", "weight", "head_weight", "cell", "weightings"
    between = "lengths", "reset", "trace", "record", "checkpoints", "memories"
    return bool(
        _backward_sequence(
            *(given[f"{name}_ptr"] for name in before),
            [] if initial[0] is None else initial,
            *(given[f"{name}_ptr"] for name in between),
            [given[f"d_{name}_ptr"] for name in NTMState._fields],
            [] if of_initial[0] is None else of_initial,
            given["dz_ptr"],
            given["dp_ptr"],
            size.slots,
            size.width,
            size.segment,
            size.options.writes,
            size.taps,
            size.options.squash,
        )
    )


@launcher
def ntm(
    input: Tensor,
    state: NTMState,
    given: machine.Machine,
    options: Options,
    trace: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """`seqmem::ntm` on GPU."""
    size = _Sizes(input, state.memory, given, options)
    parts = -(-size.steps // machine.SHORTEST_SEGMENT) if save else 0
    call = machine.Call("ntm", input, state, given)
    record = call.make(size.steps if save else 1, size.batch, size.record, dtype=call.dtype)
    checkpoints = record.new_empty(parts, size.batch, size.width, size.stride)
    if size.on_chip:
        features = call.make(size.steps, size.batch, size.control + size.read_width)
        weightings_of = size.steps, size.batch, size.heads, size.slots
        every = call.make(*weightings_of) if trace or save else None
        forward = machine.Forward(size, call, "cell", "weightings", "reads")
        memory_out = torch.empty_like(state.memory, memory_format=torch.contiguous_format)
        given_to_all = {
            **forward.arguments(),
            "memory_ptr": state.memory.contiguous(),
            "features_ptr": features,
            "memory_out_ptr": memory_out,
            "trace_ptr": every,
            "checkpoints_ptr": checkpoints if save else None,
        }
        if size.batch and not _in_blocks(size, given_to_all, record if save else None):
            kernels.ntm_forward[(size.batch,)](
                **given_to_all,
                record_ptr=record,
                record_rows=size.batch if save else 0,
                **size.arguments(input.dtype),
            )
        last = forward.last(memory_out)
    else:
        features, *last, every = machine.plain_forward(
            _plain,
            call,
            (input, *state, *given._replace(lengths=call.lengths), *options, trace, save),
        )
        every = every if trace or save else None
    none = input.new_empty(0)
    kept = (record, checkpoints) if save else (none.to(call.dtype), none.to(call.dtype))
    return features, *last, none if every is None else every, *kept


@launcher
def ntm_backward(
    grad_features: Tensor | None,
    grad_hidden: Tensor | None,
    grad_cell: Tensor | None,
    grad_memory: Tensor | None,
    grad_weightings: Tensor | None,
    grad_reads: Tensor | None,
    grad_trace: Tensor | None,
    input: Tensor,
    state: NTMState,
    given: machine.Machine,
    features: Tensor,
    trace: Tensor,
    saved: Tensor,
    checkpoints: Tensor,
    options: Options,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """`seqmem::ntm_backward` on GPU."""
    grads = grad_hidden, grad_cell, grad_memory, grad_weightings, grad_reads
    size = _Sizes(input, state.memory, given, options)
    of_input, of_state, of_weights, of_initial = output_mask
    wanted = [of_input, *[of_state] * 5, *[of_weights] * 2, *[of_initial] * len(given.initial)]
    wanted += [of_weights] * len(given.controller)
    call = machine.Call("ntm", input, state, given)
    if size.on_chip:
        back = machine.Backward(size, call, NTMState._fields, grads)
        given_to_all = {
            **back.arguments(grad_features, features, saved),
            "grad_trace_ptr": dense(grad_trace),
            "weightings_ptr": state.weightings.contiguous(),
            "trace_ptr": trace.contiguous(),
            "checkpoints_ptr": checkpoints.contiguous(),
            "memories_ptr": back.memories(),
            **call.pointers("cell", "memory", "weightings"),
        }
        if size.batch and not _back_in_blocks(size, given_to_all):
            kernels.ntm_backward[(size.batch,)](**given_to_all, **size.arguments(input.dtype))
        first, parts, starts, of_heads, weights = back.results(features, saved)
        found = [first, *parts, *of_heads, *starts, *weights]
    else:
        arguments = grad_features, *grads, grad_trace, input, *state
        rest = features, trace, saved, checkpoints, *options, output_mask
        found = machine.plain_backward(
            _vjp, call, (*arguments, *given._replace(lengths=call.lengths), *rest)
        )
    return machine.answer(found, wanted, input)
