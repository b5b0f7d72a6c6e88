"""What the launchers of a whole sequence with a memory share: sizes, what kernels move from step to
step, the products over all steps that give the weights' gradients, and the plain path through the
reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common import accumulator, autograd_below, next_power_of_2, row_lengths, wide
from .controller import by_gate, pack

SHORTEST_SEGMENT = 8  # as csrc/common/machine.h: the checkpoints' shape is the op's
_ELEMENTS = 8192  # N * M, both padded to powers of two, that a program keeps without spilling


def fits(slots: int, width: int) -> bool:
    """Whether a row's memory is kept on chip."""
    return next_power_of_2(slots) * max(16, next_power_of_2(width)) <= _ELEMENTS


def blocks(slots: int, width: int) -> dict[str, Any]:
    """The padded memory, and the warps that hold it."""
    block_n, block_w = next_power_of_2(slots), max(16, next_power_of_2(width))
    warps = 8 if block_n * block_w > 4096 else 4
    return {"BN": max(16, block_n), "BW": block_w, "num_warps": warps, "num_stages": 1}


class Machine(NamedTuple):
    """What a call is given between its state and its options."""

    controller: Sequence[Tensor]
    head_weight: Tensor
    head_bias: Tensor
    initial: Sequence[Tensor]
    lengths: Tensor | None
    reset: Tensor | None


class Sizes:
    """A call's sizes, and what every kernel takes of them.

    reads: vectors of the memory's width that the controller is fed.
    """

    def __init__(
        self,
        input: Tensor,
        memory: Tensor,
        head_weight: Tensor,
        controller: Sequence[Tensor],
        lstm: bool,
        reads: int,
    ) -> None:
        self.steps, self.batch, self.input = input.shape
        self.slots, self.width = memory.shape[-2:]
        self.values, self.control = head_weight.shape
        self.lstm, self.gates = lstm, 4 if lstm else 1
        self.layers = len(controller) // (4 if lstm else 2)
        self.read_width = reads * self.width
        self.kept = self.layers if lstm else 0  # layers with a state
        self.record = (5 * self.kept + self.layers - 1) * self.control + self.values
        self.stride = ((self.slots + 15) // 16 // 2 * 2 + 1) * 16  # of the op's checkpoints
        self.segment = max(SHORTEST_SEGMENT, math.isqrt(max(self.steps - 1, 0)) + 1)

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        block_c = min(128, max(16, next_power_of_2(self.control)))
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
            "read_width": self.read_width,
            "LAYERS": self.layers,
            "LSTM": self.lstm,
            "ACC": accumulator(dtype),
            "BC": block_c,
            "BK": 32 if block_c >= 64 else 16,
            **blocks(self.slots, self.width),
            "num_warps": 8,
        }


def padded(memory: Tensor) -> Tensor:
    """[..., N, M] as the kernels' block [..., BN, BW], zero outside."""
    slots, width = memory.shape[-2:]
    block = blocks(slots, width)
    padded = memory.new_zeros(*memory.shape[:-2], block["BN"], block["BW"])
    padded[..., :slots, :width] = memory
    return padded


def without_padding(input: Tensor, lengths: Tensor | None) -> Tensor:
    """The input with zeros beyond `lengths`: nothing is done there, but 0 * NaN is not 0."""
    if lengths is None:
        return input
    time = torch.arange(input.shape[0], device=input.device)[:, None]
    return input.masked_fill((time >= lengths)[..., None], 0)


def weight_gradients(
    size: Sizes,
    input: Tensor,
    state: Sequence[Tensor],
    initial: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    features: Tensor,
    record: Tensor,
    dz: Tensor,
    dp: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of head weight and bias, and of the controller; dz and dp are [T * B, ...].

    state and initial begin with hidden [L, B, C] and end with reads.
    """

    def before(values: Tensor, first: Tensor, fresh: Tensor | None) -> Tensor:
        """What enters each step [T, B, ...] where `values` leave it."""
        first = first.reshape(1, size.batch, -1).to(dp.dtype)
        entering = torch.cat((first, values.to(dp.dtype)))[: size.steps]
        if reset is not None and fresh is not None:
            entering = torch.where(reset[..., None], fresh.flatten().to(dp.dtype), entering)
        return entering

    kept = 5 * size.kept * size.control
    outputs = list(record[..., kept:].split(size.control, -1)[: size.layers - 1])
    outputs.append(features[..., : size.control].to(dp.dtype))
    heads = [dp.t() @ outputs[-1].flatten(0, 1), dp.sum(0)]

    x = without_padding(input, lengths).to(dp.dtype)
    reads = before(features[..., size.control :], state[-1], initial[-1] if initial else None)
    below = [torch.cat((x, reads), -1), *outputs[:-1]]
    weights: list[Tensor] = []
    for k in range(size.layers):
        d = by_gate(dz[:, k].t(), size.gates)  # [G * C, T * B]
        weights.append(d @ below[k].flatten(0, 1))
        if size.lstm:
            hidden = before(outputs[k], state[0][k], initial[0][k] if initial else None)
            weights += [d @ hidden.flatten(0, 1), d.sum(1)]
        weights.append(d.sum(1))
    return heads, weights


class Call:
    """The tensors of one call; lengths are on the device, `dtype` is that of the arithmetic."""

    def __init__(
        self,
        op: str,
        input: Tensor,
        state: Any,  # the op's NamedTuple, as `given`: a Machine, or one that begins as it does
        given: Any,
    ) -> None:
        self.input, self.state = input, state
        controller, head_weight, head_bias, *_ = given
        self.parameters = *controller, head_weight, head_bias
        self.initial, self.reset, self.dtype = given.initial, given.reset, wide(input.dtype)
        lengths = given.lengths
        if lengths is not None:
            lengths = row_lengths(op, lengths, input.device, input.shape[0])
        self.lengths = lengths

    def make(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """What the kernels fill but for the padding, which is zero."""
        make = self.input.new_empty if self.lengths is None else self.input.new_zeros
        return make(shape, dtype=dtype or self.input.dtype)

    def pointers(self, *names: str) -> dict[str, Tensor | None]:
        """Kernel arguments: lengths, reset, and those parts of what it goes back to."""
        found: dict[str, Tensor | None] = {f"initial_{name}_ptr": None for name in names}
        reset = self.reset
        if reset is not None:
            parts = dict(zip(self.state._fields, self.initial, strict=True))
            wide_parts = {name: parts[name].to(self.dtype).contiguous() for name in names}
            wide_parts["memory"] = padded(wide_parts["memory"])
            found = {f"initial_{name}_ptr": part for name, part in wide_parts.items()}
            reset = reset.contiguous().view(torch.uint8)
        return {**found, "lengths_ptr": self.lengths, "reset_ptr": reset}


class Forward:
    """What a call's kernel moves from step to step: hidden and the parts `moved`, cell first."""

    def __init__(self, size: Sizes, call: Call, *moved: str) -> None:
        self.size, self.call = size, call
        # [2, B, L, C]: the state before even steps, and before odd ones
        self.hidden = call.input.new_empty(
            2, size.batch, size.layers, size.control, dtype=call.dtype
        )
        parts = {name: getattr(call.state, name) for name in ("hidden", *moved)}
        parts |= {name: parts[name].transpose(0, 1) for name in ("hidden", "cell")}
        copies = {name: self.hidden.new_empty(parts[name].shape) for name in moved}  # all wide
        first = self.hidden[0, :, : size.kept]
        # One launch for all.
        torch._foreach_copy_(
            [t.view(-1) for t in (first, *copies.values())],
            [parts[name].reshape(-1) for name in ("hidden", *moved)],
        )
        self.moved, self.hidden_out = copies, torch.empty_like(copies["cell"])

    def arguments(self) -> dict[str, Any]:
        """The controller's and the state's."""
        call, size = self.call, self.size
        packed = pack(call.parameters, size.input, size.gates, transposed=True)
        flat = without_padding(call.input, call.lengths).to(call.dtype).flatten(0, 1)
        return {
            "zx_ptr": torch.addmm(packed.biases[0], flat, packed.of_input),
            "weight_ptr": packed.layers,
            "bias_ptr": packed.biases,
            "head_weight_ptr": packed.head_weight,
            "head_bias_ptr": packed.head_bias,
            "hidden_ptr": self.hidden,
            "hidden_out_ptr": self.hidden_out,
            **{f"{name}_ptr": part for name, part in self.moved.items()},
            **call.pointers(*call.state._fields),
        }

    def last(self, memory: Tensor) -> list[Tensor]:
        """The state after the last step."""
        parts = {**self.moved, "hidden": self.hidden_out, "memory": memory}
        parts |= {name: parts[name].transpose(0, 1) for name in ("hidden", "cell")}
        call = self.call
        return [parts[name].to(call.input.dtype).contiguous() for name in call.state._fields]


class Backward:
    """What a call's backward kernel carries from the last step to the first, and its results.

    names: the parts of a state that have a gradient, hidden, cell and memory first.
    """

    def __init__(
        self,
        size: Sizes,
        call: Call,
        names: Sequence[str],
        grads: Sequence[Tensor | None],
    ) -> None:
        self.size, self.call, self.names = size, call, names
        self.packed = pack(call.parameters, size.input, size.gates, transposed=False)
        rows, gates = (size.steps, size.batch), size.control * size.gates
        self.dz = call.make(*rows, size.layers, gates, dtype=call.dtype)
        self.dp = call.make(*rows, size.values, dtype=call.dtype)
        self.carried = self._unset()
        # For what reset goes back to, a row's part each.
        self.parts = None if call.reset is None else self._unset()
        torch._foreach_zero_([*self.carried, *(self.parts or ())])
        for name, part, grad in zip(names, self._unpadded(self.carried), grads, strict=True):
            if grad is not None:
                part.copy_(grad.transpose(0, 1) if name in ("hidden", "cell") else grad)

    def _unset(self) -> list[Tensor]:
        """Gradients of a state, batch first, the memory padded."""
        shapes = []
        for name in self.names:
            shape = list(getattr(self.call.state, name).shape)
            if name == "memory":
                block = blocks(*shape[-2:])
                shape[-2:] = block["BN"], block["BW"]
            elif name in ("hidden", "cell"):
                shape[:2] = shape[1], shape[0]
            shapes.append(shape)
        return [self.dz.new_empty(shape) for shape in shapes]

    def arguments(
        self, grad_features: Tensor | None, features: Tensor, record: Tensor
    ) -> dict[str, Any]:
        f_t, f_b, f_c = (0, 0, 0) if grad_features is None else grad_features.stride()
        parts: Sequence[Tensor | None] = self.parts or [None] * len(self.names)
        return {
            "grad_features_ptr": grad_features,
            "weight_ptr": self.packed.layers,
            "head_weight_ptr": self.packed.head_weight,
            "cell_ptr": self.call.state.cell.contiguous(),
            "features_ptr": features.contiguous(),
            "record_ptr": record.contiguous(),
            "below_ptr": self.dz.new_empty(self.size.batch, self.size.control),
            **{f"d_{name}_ptr": a for name, a in zip(self.names, self.carried, strict=True)},
            **{f"i_{name}_ptr": a for name, a in zip(self.names, parts, strict=True)},
            "dz_ptr": self.dz,
            "dp_ptr": self.dp,
            "f_t": f_t,
            "f_b": f_b,
            "f_c": f_c,
        }

    def memories(self) -> Tensor:
        """Scratch for what enters each step of a segment, or what it leaves."""
        return self.dz.new_empty(self.size.batch, self.size.segment, *self.carried[2].shape[1:])

    def results(
        self, features: Tensor, record: Tensor
    ) -> tuple[Tensor, list[Any], list[Any], list[Tensor], list[Tensor]]:
        """Gradients of the input, of state and initial, None where a part has none, of weight and
        bias of the head values, and of the controller."""
        size, call = self.size, self.call
        heads, weights = weight_gradients(
            size, call.input, call.state, call.initial, call.lengths, call.reset, features, record,
            self.dz.flatten(0, 1), self.dp.flatten(0, 1),
        )  # fmt: skip
        found = dict(zip(self.names, self._unpadded(self.carried), strict=True))
        found |= {name: found[name].transpose(0, 1) for name in ("hidden", "cell")}
        of_initial = dict(
            zip(call.state._fields, map(torch.zeros_like, call.initial), strict=False)
        )
        if self.parts is not None:
            sums = (a.sum(0) for a in self._unpadded(self.parts))
            of_initial = dict(zip(self.names, sums, strict=True))
        fields = call.state._fields
        return (
            (self.dz[:, :, 0] @ self.packed.of_input).view_as(call.input),
            [found.get(name) for name in fields],
            [of_initial.get(name) for name in fields[: len(call.initial)]],
            heads,
            weights,
        )

    def _unpadded(self, parts: Sequence[Tensor]) -> list[Tensor]:
        hidden, cell, memory, *rest = parts
        return [hidden, cell, memory[:, : self.size.slots, : self.size.width], *rest]


def answer(found: Sequence[Tensor | None], wanted: Sequence[bool], input: Tensor) -> list[Tensor]:
    """A backward's results: rounded, and empty where nobody asks for them."""
    none = input.new_empty(0)
    pairs = zip(found, wanted, strict=True)
    return [none if a is None or not is_wanted else a.to(input.dtype) for a, is_wanted in pairs]


def plain_forward(plain: Callable[..., Any], call: Call, arguments: Sequence[Any]) -> list[Tensor]:
    """By the reference, rounded at the ends alone; the last state is no view of the first."""
    given = {part.data_ptr() for part in call.state}
    found = [a.to(call.input.dtype) for a in plain(*_widened(call, arguments))]
    return [a.clone() if a.data_ptr() in given else a for a in found]


def plain_backward(
    vjp: Callable[..., Any], call: Call, arguments: Sequence[Any]
) -> list[Tensor | None]:
    """By autograd through the reference, which runs once more, rounded at the ends alone."""
    with autograd_below():
        found = vjp(*_widened(call, arguments))
    return [None if a is None else a.detach() for a in found]


def _widened(call: Call, arguments: Sequence[Any]) -> list[Any]:
    """Floating tensors, alone or in lists, in the call's dtype."""

    def wider(a: Any) -> Any:
        if isinstance(a, Tensor):
            return a.to(call.dtype) if a.is_floating_point() else a
        return [wider(one) for one in a] if isinstance(a, list | tuple) else a

    return [wider(a) for a in arguments]
