"""The LSTM's persistent kernels, whose blocks wait for each other: lstm_persistent_*_kernel.cu."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from . import nvcc
from .launch import Faults, Output, Struct
from .lstm_cases import TYPES, Case, assert_near, case

pytestmark = pytest.mark.skipif(not nvcc.found(), reason="needs nvcc")


def layout(c: Case) -> Struct:
    numbers = (c.batch, c.hidden, c.steps, c.batch, 1, c.options["reverse"])
    return Struct("5q?2P", *numbers, c.options["lengths"], c.options["reset"])


def not_yet(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory as the kernels want it: of bytes that no result has."""
    word = torch.int32 if dtype == torch.float32 else torch.int16
    return torch.full(shape, -1, dtype=word).view(dtype)


def launch(
    name: str, c: Case, dtype: torch.dtype, tiles: int, arguments: Struct, seed: int
) -> None:
    quarters = -(-c.hidden // 256)
    blocks = max(4, 2 * quarters) if dtype == torch.float32 else quarters
    blocks *= 1 if name == "forward" else 4
    columns = 4 if name == "forward" else 1
    module = nvcc.compiled(f"lstm_persistent_{name}_kernel.cu")
    kernel = module[f"{name}_kernel<{TYPES[dtype]}, {blocks}, {tiles}>"]
    kernel.launch(
        (c.hidden // 8, -(-c.batch // (16 * tiles))),
        (256,),
        [layout(c), arguments],
        shared_bytes=2 * tiles * 8 * columns * 128 * 4,
        cooperative=True,
        seed=seed,
    )


def check(
    dtype: torch.dtype, hidden: int, batch: int, steps: int, tiles: int, kind: str, seed: int = 0
) -> None:
    given = case(hidden, batch, steps, kind, dtype)
    exact = given.wide()
    right = exact.reference()
    z = given.z.clone()
    output = not_yet(steps, batch, hidden, dtype=dtype)
    cells, hy = torch.empty_like(output), torch.empty(batch, hidden, dtype=dtype)
    h, c = given.state or (None, torch.zeros(batch, hidden))
    c = c.float().clone()
    forward = Struct(
        "10P", z, given.weight_hh, *given.biases, h, Output(hy), c, output, z, Output(cells)
    )
    launch("forward", given, dtype, tiles, forward, seed)
    for a, b in zip((output, hy, c, z, cells), right, strict=True):
        assert_near(a.to(dtype), b.detach())

    seeds = [torch.randn(a.shape).to(dtype) for a in right]
    loss = torch.stack([(a * b).sum() for a, b in zip(right, seeds, strict=True)]).sum()
    leaves = (exact.z, *(exact.state or ())[1:])
    expected = torch.autograd.grad(loss, leaves)
    saved = [a.detach().to(dtype) for a in right[3:]]
    grad_output, grad_hy, grad_cy, *others = seeds
    cx = None if given.state is None else given.state[1]
    d_c, dz = grad_cy.float(), not_yet(*z.shape, dtype=dtype)
    backward = Struct("10P", grad_output, grad_hy, *others, given.weight_hh, cx, *saved, d_c, dz)
    launch("backward", given, dtype, tiles, backward, seed + 1)
    for a, b in zip((dz, d_c), expected, strict=False):
        assert_near(a.to(dtype), b, 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_both_ways(dtype: torch.dtype) -> None:
    check(dtype, 24, 3, 3, 1, "lengths and reset, reverse")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "reverse", "lengths", "reset", "no state"])
@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_options(tiles: int, kind: str) -> None:
    check(torch.float16, 40, 17, 3, tiles, kind, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("hidden, tiles", [(264, 1), (264, 2), (520, 1), (776, 1)])
def test_sizes(hidden: int, tiles: int) -> None:
    check(torch.bfloat16, hidden, 3, 2, tiles, "lengths", seed=4)


@pytest.mark.slow
@pytest.mark.parametrize("hidden, tiles", [(40, 2), (40, 4), (264, 1), (520, 1), (776, 1)])
def test_sizes_of_float32(hidden: int, tiles: int) -> None:
    check(torch.float32, hidden, 17, 2, tiles, "reset", seed=6)


PLANTED = {
    "results of others read as ordinary memory": (
        r"ld\.relaxed\.gpu\.global\.v4", "ld.global.v4", "race: reads argument"),
    "results stored as ordinary memory": (
        r"st\.relaxed\.gpu\.global\.v4", "st.global.v4", "race: (reads|writes) argument"),
    "a barrier removed": (r"bar\.sync\s+0;", "", "race|nobody has written"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, replacement, expected = PLANTED[fault]
    nvcc.plant(monkeypatch, pattern, replacement)
    with pytest.raises(Faults, match=expected):
        check(torch.bfloat16, 24, 3, 3, 1, "plain")
