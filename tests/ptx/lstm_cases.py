"""Calls of the LSTM over time, for the tests of its CUDA kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqmem_fast.reference import lstm as reference

TYPES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}  # in C++
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Case(NamedTuple):
    """Arguments of the reference: z is the input, whose weights are the identity."""

    z: Tensor  # [T, B, 4H], or packed rows
    state: tuple[Tensor, Tensor] | None
    weight_hh: Tensor
    biases: tuple[Tensor, Tensor]
    options: dict[str, Any]

    @property
    def hidden(self) -> int:
        return self.z.shape[-1] // 4

    @property
    def steps(self) -> int:
        sizes = self.options["batch_sizes"]
        return self.z.shape[0] if sizes is None else len(sizes)

    @property
    def batch(self) -> int:
        sizes = self.options["batch_sizes"]
        return self.z.shape[1] if sizes is None else int(sizes[0])

    def reference(self) -> tuple[Tensor, ...]:
        """output, hy, cy, gates, cells."""
        width = self.z.shape[-1]
        identity = torch.eye(width, dtype=self.z.dtype)
        output, state, gates, cells = reference.lstm_trace(
            self.z, self.state, identity, self.weight_hh, *self.biases, None, **self.options
        )
        return (output, *state, gates, cells)

    def wide(self) -> Case:
        """In float64, with gradients."""
        z, weight, *biases = (
            a.double().requires_grad_() for a in (self.z, self.weight_hh, *self.biases)
        )
        state = None
        if self.state is not None:
            h, c = (a.double().requires_grad_() for a in self.state)
            state = (h, c)
        return Case(z, state, weight, (biases[0], biases[1]), self.options)


def case(
    hidden: int, batch: int, steps: int, kind: str, dtype: torch.dtype = torch.float32
) -> Case:
    options: dict[str, Any] = {"reverse": "reverse" in kind, "batch_first": False}
    options["lengths"] = options["reset"] = options["batch_sizes"] = None
    if "lengths" in kind:
        options["lengths"] = torch.arange(batch).flip(0) % (steps + 1)
    if "reset" in kind:
        options["reset"] = torch.rand(steps, batch) < 0.4
    rows = [steps, batch]
    if kind == "packed":
        options["batch_sizes"] = batch - torch.arange(steps) * batch // steps
        rows = [int(options["batch_sizes"].sum())]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    state = None if kind == "no state" else (random(batch, hidden), random(batch, hidden))
    biases = (random(4 * hidden), random(4 * hidden))
    weight = (torch.randn(4 * hidden, hidden) / hidden**0.5).to(dtype)
    return Case(random(*rows, 4 * hidden), state, weight, biases, options)


def assert_near(ours: Tensor, right: Tensor, factor: float = 1) -> None:
    error = (ours.double() - right).norm() / right.norm().clamp_min(1e-30)
    assert error <= factor * BOUNDS[ours.dtype]
