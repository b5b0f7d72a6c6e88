"""The LSTM's kernels for thread block clusters: lstm_cluster_kernel.cu, as nvcc compiles it."""

from __future__ import annotations

import re
from functools import partialmethod
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from seqmem_fast.reference import lstm as reference

from . import nvcc
from .launch import Faults, Kernel, Module, Output, Struct

pytestmark = pytest.mark.skipif(not nvcc.found(), reason="needs nvcc")
OPTIONS = ["plain", "reverse", "lengths", "reset", "lengths and reset, reverse", "no state"]


class Case(NamedTuple):
    """Arguments of the reference: z is the input, whose weights are the identity."""

    z: Tensor  # [T, B, 4H]
    state: tuple[Tensor, Tensor] | None
    weight_hh: Tensor
    biases: tuple[Tensor, Tensor]
    options: dict[str, Any]

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

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    state = None if kind == "no state" else (random(batch, hidden), random(batch, hidden))
    biases = (random(4 * hidden), random(4 * hidden))
    weight = (torch.randn(4 * hidden, hidden) / hidden**0.5).to(dtype)
    return Case(random(steps, batch, 4 * hidden), state, weight, biases, options)


def sequence(c: Case) -> Struct:
    steps, batch, width = c.z.shape
    lengths, reset = c.options["lengths"], c.options["reset"]
    numbers = (batch, width // 4, steps, batch, 1, c.options["reverse"])
    return Struct("5q?3P", *numbers, lengths, reset, None)


def launch(name: str, c: Case, tile: int, arguments: Struct, seed: int) -> None:
    batch, hidden = c.z.shape[1], c.z.shape[2] // 4
    lanes = next(n for n in (8, 12, 16, 24) if hidden <= 16 * n)
    blocks = 8 if lanes == 8 else 16
    threads = 16 * 16 * lanes // blocks
    grid = (-(-batch // tile) * blocks,)
    kernel = nvcc.compiled("lstm_cluster_kernel.cu")[f"{name}_kernel<{lanes}, {tile}>"]
    kernel.launch(grid, (threads,), [sequence(c), arguments], cluster=blocks, seed=seed)


def assert_near(ours: Tensor, right: Tensor, bound: float) -> None:
    error = (ours.double() - right).norm() / right.norm().clamp_min(1e-30)
    assert error <= bound


def check(hidden: int, batch: int, steps: int, tile: int, kind: str, seed: int = 0) -> None:
    given = case(hidden, batch, steps, kind)
    exact = given.wide()
    right = exact.reference()
    z = given.z.clone()
    output, cells = torch.empty(2, steps, batch, hidden)
    hy, cy = torch.empty(2, batch, hidden)
    h, c = given.state or (None, None)
    outputs = (Output(output), Output(hy), Output(cy), z, Output(cells))
    forward = Struct("11P", z, given.weight_hh, *given.biases, h, c, *outputs)
    launch("forward", given, tile, forward, seed)
    for a, b in zip((output, hy, cy, z, cells), right, strict=True):
        assert_near(a, b.detach(), 1e-6)

    seeds = [torch.randn(a.shape) for a in right]
    leaves = (exact.z, *(exact.state or ()))
    loss = torch.stack([(a * b).sum() for a, b in zip(right, seeds, strict=True)]).sum()
    expected = torch.autograd.grad(loss, leaves)
    saved = [a.detach().float() for a in right[3:]]
    dz, *grads = (torch.empty(a.shape) for a in expected)
    into = (Output(a) for a in grads) if grads else (None, None)
    backward = Struct("12P", *seeds, given.weight_hh, c, *saved, Output(dz), *into)
    launch("backward", given, tile, backward, seed + 1)
    for a, b in zip((dz, *grads), expected, strict=True):
        assert_near(a, b, 3e-6)


@pytest.mark.parametrize("tile", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_both_ways(tile: int) -> None:
    check(70, 3, 4, tile, "lengths and reset, reverse")


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("tile", [1, 4, 8])
def test_options(tile: int, kind: str) -> None:
    check(70, 9, 5, tile, kind, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [128, 150, 256, 384])
@pytest.mark.parametrize("tile", [1, 4, 8])
def test_sizes(tile: int, hidden: int) -> None:
    check(hidden, 2, 3, tile, "lengths", seed=4)


# In every kernel of the file: a pattern, what it becomes, and what is then reported.
PLANTED = {
    "an exchange is not waited for": (
        r"mbarrier\.try_wait\S* (\w+), \[.*\], .*;", r"setp.eq.u32 \1, 0, 0;",
        "race: reads shared"),
    "a wait that acquires nothing": (r"try_wait.parity.acquire", "try_wait.parity.relaxed", "race"),
    "the first cluster barrier's wait removed": (
        r"barrier\.cluster\.wait\S*;", "", "may not have started"),
    "the wrong number of bytes expected": (
        r"(expect_tx\S* _, \[.*\],) .*;", r"\1 4;", "does not end|race"),
    "the other buffer": (r"(st\.async\S* )\[(.*?)\]", r"\1[\2+16]", "race|out of bounds|nobody"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, replacement, expected = PLANTED[fault]
    text, count = re.subn(pattern, replacement, nvcc.ptx("lstm_cluster_kernel.cu"))
    assert count > 0
    monkeypatch.setattr(nvcc, "compiled", lambda _: Module(text))
    monkeypatch.setattr(Kernel, "launch", partialmethod(Kernel.launch, most_instructions=1 << 20))
    with pytest.raises(Faults, match=expected):
        check(70, 3, 4, 4, "plain")
