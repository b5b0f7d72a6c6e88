"""The LSTM's kernels of one step (lstm_kernel.cu), in loops over time as in csrc/cuda/lstm.cpp."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from . import nvcc
from .launch import Struct
from .lstm_cases import TYPES, Case, assert_near, case

pytestmark = [pytest.mark.skipif(not nvcc.found(), reason="needs nvcc"), pytest.mark.slow]


def description(c: Case, k: int) -> Struct:
    """Step number k in the order of computation; time comes first."""
    order = range(c.steps)[:: -1 if c.options["reverse"] else 1]
    t, reverse = order[k], c.options["reverse"]
    after, before = (t, t + 1) if reverse else (t + 1, t)

    def row(step: int) -> int:
        return step * c.batch if step < c.steps else -1

    return Struct(
        "7q?2P2q",
        *(c.batch, c.hidden, t, c.steps, row(t), 1, row(order[k - 1]) if k > 0 else 0, reverse),
        *(c.options["lengths"], c.options["reset"]),
        *(row(after) if after > 0 else -1, row(before)),
    )


def launch(name: str, c: Case, k: int, arguments: Struct, seed: int) -> None:
    width = 4 if c.hidden % 4 == 0 else 1
    vectors, x = c.hidden // width, 1
    while x < 128 and x < vectors:
        x *= 2
    y = 128 // x
    kernel = nvcc.compiled("lstm_kernel.cu")[f"{name}_kernel<{TYPES[c.z.dtype]}, float, {width}>"]
    grid = (-(-c.batch // y), -(-vectors // x))
    kernel.launch(grid, (x, y), [description(c, k), arguments], seed=seed + k)


def forward(c: Case, z: Tensor, seed: int) -> tuple[Tensor, ...]:
    """output, hy, cy, cells; gates take the place of z."""
    h, state = (a.clone() for a in c.state or (z.new_zeros(c.batch, c.hidden),) * 2)
    state = state.float()
    output, cells = z.new_empty(2, c.steps, c.batch, c.hidden)
    if c.options["reset"] is not None and not c.options["reverse"]:  # before the first step
        cut = c.options["reset"][0]
        if c.options["lengths"] is not None:
            cut = cut & (c.options["lengths"] > 0)
        h[cut], state[cut] = 0, 0
    arguments = Struct("9P?", z, *c.biases, state, state, h, output, z, cells, True)
    for k in range(c.steps):
        t = c.steps - 1 - k if c.options["reverse"] else k
        z[t] += h @ c.weight_hh.T
        launch("forward", c, k, arguments, seed)
    return output, h, state, cells


def backward(c: Case, seeds: list[Tensor], saved: list[Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """dz and the gradient of cx."""
    grad_output, grad_hy, grad_cy, *others = seeds
    d_c, dz = grad_cy.float(), torch.empty_like(c.z)
    from_next = dz.new_empty(c.batch, c.hidden)
    cx = None if c.state is None else c.state[1]
    given = (grad_output, grad_hy, from_next, d_c, d_c, *others, cx, *saved, dz)
    for k in reversed(range(c.steps)):
        if k + 1 < c.steps:
            after = c.steps - 2 - k if c.options["reverse"] else k + 1
            from_next.copy_(dz[after] @ c.weight_hh)
        launch("backward", c, k, Struct("11P?", *given, True), seed)
    return dz, d_c


@pytest.mark.parametrize("kind", ["plain", "reverse", "lengths and reset", "reset, reverse"])
@pytest.mark.parametrize("hidden, dtype", [(5, torch.float32), *((12, t) for t in TYPES)])
def test_both_ways(hidden: int, dtype: torch.dtype, kind: str) -> None:
    given = case(hidden, 3, 4, kind, dtype)
    exact = given.wide()
    right = exact.reference()
    z = given.z.clone()
    output, hy, cy, cells = forward(given, z, seed=0)
    for a, b in zip((output, hy, cy, z, cells), right, strict=True):
        assert_near(a.to(dtype), b.detach(), 2)

    seeds = [torch.randn(a.shape).to(dtype) for a in right]
    loss = torch.stack([(a * b).sum() for a, b in zip(right, seeds, strict=True)]).sum()
    assert exact.state is not None
    expected = torch.autograd.grad(loss, (exact.z, exact.state[1]))
    saved = [a.detach().to(dtype) for a in right[3:]]
    for a, b in zip(backward(given, seeds, saved, seed=9), expected, strict=True):
        assert_near(a.to(dtype), b, 5)
