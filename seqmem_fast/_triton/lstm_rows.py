"""Where a sequence's steps are stored, and how the kernels of lstm_step.py are launched on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import lstm_step
from .common import cdiv, next_power_of_2, refuse_in_capture, row_lengths

# One tile of the pointwise kernels: 4 elements for each of the 128 threads of a program.
_TILE = 512


class Layer(NamedTuple):
    """What the ops of an LSTM and their backwards are given first."""

    input: Tensor
    hx: Tensor | None
    cx: Tensor | None
    weight_ih: Tensor
    weight_hh: Tensor


class Ends(NamedTuple):
    """Where a batch's rows end, or start anew."""

    lengths: Tensor | None
    reset: Tensor | None
    batch_sizes: Tensor | None


@dataclass(frozen=True)
class Rows:
    """Where step t of batch element b is stored in the flattened [rows, width] tensors."""

    steps: int
    batch: int
    t_stride: int
    b_stride: int
    reverse: bool
    starts: Sequence[int] | None  # packed: first row of each step
    sizes: Sequence[int] | None  # packed: rows of each step
    lengths: Tensor | None  # [B] int64 on the device; packed rows have them too
    reset: Tensor | None  # [rows] uint8

    @staticmethod
    def of(input: Tensor, ends: Ends, batch_first: bool, reverse: bool) -> Rows:
        lengths, reset, batch_sizes = ends
        if batch_sizes is not None:
            refuse_in_capture(input.device, "seqmem::lstm: expected no packed input (batch_sizes)")
            sizes = batch_sizes.tolist()
            starts = (batch_sizes.cumsum(0) - batch_sizes).tolist()
            lengths = (batch_sizes[:, None] > torch.arange(sizes[0])).sum(0)
            lengths = lengths.to(input.device, non_blocking=True)
            return Rows(len(sizes), sizes[0], 0, 1, reverse, starts, sizes, lengths, None)
        batch, steps = (0, 1) if batch_first else (1, 0)
        batch, steps = input.shape[batch], input.shape[steps]
        t_stride, b_stride = (1, steps) if batch_first else (batch, 1)
        if lengths is not None:
            lengths = row_lengths("lstm", lengths, input.device, steps)
        if reset is not None:
            reset = reset.contiguous().view(torch.uint8)
        return Rows(steps, batch, t_stride, b_stride, reverse, None, None, lengths, reset)

    def order(self) -> range:
        """Time steps in the order of computation."""
        return range(self.steps - 1, -1, -1) if self.reverse else range(self.steps)

    def start(self, t: int) -> int:
        return t * self.t_stride if self.starts is None else self.starts[t]

    def size(self, t: int) -> int:
        return self.batch if self.sizes is None else self.sizes[t]

    def at(self, a: Tensor, t: int) -> Tensor:
        """Step t of a [rows, width], as a view [size(t), width]."""
        start = self.start(t)
        return a[start : start + self.size(t) * self.b_stride : self.b_stride]

    def first_rows(self, device: torch.device) -> Tensor:
        """[B] the row of each batch element's first computed step (any row if it has none)."""
        b = torch.arange(self.batch, device=device)
        if not self.reverse or self.lengths is None:
            return self.start(self.order()[0]) + b * self.b_stride
        t = (self.lengths - 1).clamp_min(0)
        offsets = self.offsets(device)
        return (t * self.t_stride if offsets is None else offsets[t]) + b * self.b_stride

    def offsets(self, device: torch.device) -> Tensor | None:
        if self.starts is None:
            return None
        return torch.tensor(self.starts, dtype=torch.int64).to(device, non_blocking=True)

    def without_padding(self, input: Tensor) -> Tensor:
        """The input with zeros beyond `lengths`: dz is 0 there, but 0 * NaN is not."""
        if self.lengths is None or self.starts is not None:
            return input
        time = torch.arange(self.steps, device=input.device)
        ended = time[:, None] >= self.lengths  # [T, B]
        if self.b_stride != 1:
            ended = ended.t()
        return input.masked_fill(ended.reshape(*input.shape[:-1], 1), 0)  # T 1: either order

    def listed(self) -> tuple[Any, ...]:
        """What the loops in C++ take."""
        times = range(self.steps)
        starts, sizes = [self.start(t) for t in times], [self.size(t) for t in times]
        reset = None if self.reset is None else self.reset.view(torch.bool)
        return self.lengths, reset, starts, sizes, self.b_stride, self.reverse

    def strided(self) -> tuple[Any, ...]:
        """What the kernels take that stay on the GPU over all steps."""
        reset = None if self.reset is None else self.reset.view(torch.bool)
        strides = (self.steps, self.t_stride, self.b_stride, self.reverse)
        return self.lengths, reset, *strides

    def packed_or_strided(self, device: torch.device) -> tuple[Any, ...]:
        """What the cluster kernels take."""
        lengths, reset, *strides = self.strided()
        return lengths, reset, self.offsets(device), *strides

    def at_step(self, t: int) -> dict[str, Any]:
        """What the kernels of step t take."""
        return {**self.arguments(), "t": t, "row0": self.start(t)}

    def arguments(self) -> dict[str, Any]:
        """What every kernel of the sequence takes."""
        return {
            "lengths_ptr": self.lengths,
            "reset_ptr": self.reset,
            "steps": self.steps,
            "t_stride": self.t_stride,
            "b_stride": self.b_stride,
            "reverse": int(self.reverse),
        }


def launch_step(kernel: Any, batch: int, width: int, **arguments: Any) -> None:
    """Run a pointwise kernel over [batch, width]."""
    block_b, block_h = _block(width)
    if batch:
        kernel[(cdiv(batch, block_b), cdiv(width, block_h))](
            batch=batch, width=width, BLOCK_B=block_b, BLOCK_H=block_h, num_warps=4, **arguments
        )


def entering_states(rows: Rows, hx: Tensor | None, output: Tensor) -> Tensor:
    """[rows, P] h as it enters every step."""
    entering = torch.empty_like(output)
    width = output.shape[1]
    block_b, block_h = _block(width)
    blocks = cdiv(rows.batch, block_b)
    if blocks:
        lstm_step.lstm_entering_state[(blocks * rows.steps, cdiv(width, block_h))](
            hx_ptr=hx,
            output_ptr=output,
            offsets_ptr=rows.offsets(output.device),
            entering_ptr=entering,
            batch=rows.batch,
            blocks=blocks,
            width=width,
            BLOCK_B=block_b,
            BLOCK_H=block_h,
            num_warps=4,
            **rows.arguments(),
        )
    return entering


def _block(width: int) -> tuple[int, int]:
    block_h = min(next_power_of_2(width), 128)
    return _TILE // block_h, block_h
