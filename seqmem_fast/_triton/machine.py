"""What the launchers of a whole sequence with a memory share: sizes, the controller's weights as
`machine_kernels.py` reads them, and the products over all steps that give their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .common import accumulator, wide

SHORTEST_SEGMENT = 8  # as csrc/common/machine.h: the checkpoints' shape is the op's
_ELEMENTS = 8192  # N * M, both padded to powers of two, that a program keeps without spilling


def fits(slots: int, width: int) -> bool:
    """Whether a row's memory is kept on chip."""
    return triton.next_power_of_2(slots) * max(16, triton.next_power_of_2(width)) <= _ELEMENTS


def blocks(slots: int, width: int) -> dict[str, Any]:
    """The padded memory, and the warps that hold it."""
    block_n, block_w = triton.next_power_of_2(slots), max(16, triton.next_power_of_2(width))
    warps = 8 if block_n * block_w > 4096 else 4
    return {"BN": max(16, block_n), "BW": block_w, "num_warps": warps, "num_stages": 1}


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
            "read_width": self.read_width,
            "LAYERS": self.layers,
            "LSTM": self.lstm,
            "ACC": accumulator(dtype),
            "BC": block_c,
            "BK": 32 if block_c >= 64 else 16,
            **blocks(self.slots, self.width),
            "num_warps": 8,
        }


def by_unit(t: Tensor, gates: int) -> Tensor:
    """Rows [G * C] of a weight or bias with the gates of a unit side by side."""
    return t.unflatten(0, (gates, -1)).transpose(0, 1).flatten(0, 1)


def by_gate(t: Tensor, gates: int) -> Tensor:
    return t.unflatten(0, (-1, gates)).transpose(0, 1).flatten(0, 1)


def to_dtype(dtype: torch.dtype, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.to(dtype) for t in tensors]


@dataclass(frozen=True)
class Controller:
    """The controller's weights in the wide dtype, gates by unit."""

    of_input: Tensor  # [C * G, I]
    layers: list[Tensor]  # [C * G, K] of [below, h]; the first layer's below are the reads
    biases: list[Tensor]  # [C * G]

    @staticmethod
    def of(controller: Sequence[Tensor], width: int, gates: int) -> Controller:
        dtype = wide(controller[0].dtype)
        ours = [by_unit(t.to(dtype), gates) for t in controller]
        if gates == 4:
            firsts, biases = ours[::4], [a + b for a, b in zip(ours[2::4], ours[3::4], strict=True)]
        else:
            firsts, biases = ours[::2], ours[1::2]
        of_input, firsts[0] = firsts[0][:, :width], firsts[0][:, width:]
        if gates == 4:
            firsts = [torch.cat(pair, 1) for pair in zip(firsts, ours[1::4], strict=True)]
        return Controller(of_input, firsts, biases)

    def packed(self, transposed: bool) -> Tensor:
        """All layers, one after the other."""
        return torch.cat([(w.t() if transposed else w).flatten() for w in self.layers])


def rows_of(lengths: Tensor | None, reset: Tensor | None) -> dict[str, Any]:
    if reset is not None:
        reset = reset.contiguous().view(torch.uint8)
    return {"lengths_ptr": lengths, "reset_ptr": reset}


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
