"""The LSTM over time in thread block clusters or single blocks, as nvcc compiles it."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch

from . import nvcc
from .launch import Faults, Kernel, Output, Struct
from .lstm_cases import TYPES, Case, assert_near, case

pytestmark = [pytest.mark.skipif(not nvcc.found(), reason="needs nvcc"), pytest.mark.slow]
KINDS = ["plain", "reverse", "lengths", "reset", "lengths and reset, reverse", "packed", "no state"]


def sequence(c: Case) -> Struct:
    lengths, reset = c.options["lengths"], c.options["reset"]
    sizes, offsets, t_stride = c.options["batch_sizes"], None, c.batch
    if sizes is not None:
        lengths = (sizes[:, None] > torch.arange(c.batch)).sum(0)
        offsets, t_stride = sizes.cumsum(0) - sizes, 0
    numbers = (c.batch, c.hidden, c.steps, t_stride, 1, c.options["reverse"])
    return Struct("5q?3P", *numbers, lengths, reset, offsets)


def launch(name: str, c: Case, tile: int | None, arguments: Struct, seed: int) -> None:
    """As the kernels' files do on the host. tile: batch rows of a cluster; None: blocks alone."""
    dtype = c.z.dtype
    if tile is None:
        width, threads_of_unit, file = 32 if c.hidden <= 32 else 64, 4, "lstm_block_kernel.cu"
        plain = all(c.options[name] is None for name in ("lengths", "reset", "batch_sizes"))
        template = f"{TYPES[dtype]}, {width}, {str(plain).lower()}"
    elif dtype == torch.float32:
        lanes = next(n for n in (8, 12, 16, 24) if c.hidden <= 16 * n)
        width, threads_of_unit, file = 16 * lanes, 16, f"lstm_cluster_{name}_kernel.cu"
        template = f"{lanes}, {tile}"
    else:
        width, threads_of_unit = -(-c.hidden // 128) * 128, 8
        file, template = "lstm_cluster_16_kernel.cu", f"{TYPES[dtype]}, {width}"
    blocks = 1 if tile is None else 8 if width <= 128 else 16
    nvcc.compiled(file)[f"{name}_kernel<{template}>"].launch(
        (-(-c.batch // (tile or 1)) * blocks,),
        (width // blocks * threads_of_unit,),
        [sequence(c), arguments],
        cluster=blocks,
        seed=seed,
    )


def check(
    hidden: int,
    batch: int,
    steps: int,
    tile: int | None,
    kind: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> None:
    given = case(hidden, batch, steps, kind, dtype)
    exact = given.wide()
    right = exact.reference()
    z = given.z.clone()
    output, hy, cy, _, cells = (torch.empty(a.shape, dtype=dtype) for a in right)
    h, c = given.state or (None, None)
    outputs = (Output(output), Output(hy), Output(cy), z, Output(cells))
    forward = Struct("11P", z, given.weight_hh, *given.biases, h, c, *outputs)
    launch("forward", given, tile, forward, seed)
    for a, b in zip((output, hy, cy, z, cells), right, strict=True):
        assert_near(a, b.detach())

    seeds = [torch.randn(a.shape).to(dtype) for a in right]
    leaves = (exact.z, *(exact.state or ()))
    loss = torch.stack([(a * b).sum() for a, b in zip(right, seeds, strict=True)]).sum()
    expected = torch.autograd.grad(loss, leaves)
    saved = [a.detach().to(dtype) for a in right[3:]]
    dz, *grads = (torch.empty(a.shape, dtype=dtype) for a in expected)
    into = (Output(a) for a in grads) if grads else (None, None)
    backward = Struct("12P", *seeds, given.weight_hh, c, *saved, Output(dz), *into)
    launch("backward", given, tile, backward, seed + 1)
    for a, b in zip((dz, *grads), expected, strict=True):
        assert_near(a, b, 3)


@pytest.mark.parametrize("hidden, tile", [(70, 4), (33, None)])
def test_both_ways(hidden: int, tile: int | None) -> None:
    check(hidden, 3, 4, tile, "lengths and reset, reverse")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [None, 1, 4, 8])
def test_options(tile: int | None, kind: str) -> None:
    check(70 if tile else 50, 9, 5, tile, kind, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [128, 150, 256, 384])
@pytest.mark.parametrize("tile", [1, 4, 8])
def test_sizes(tile: int, hidden: int) -> None:
    check(hidden, 2, 3, tile, "lengths", seed=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_options_of_16_bits(kind: str) -> None:
    check(70, 9, 5, 8, kind, torch.float16, seed=6)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [64, 129, 256, 384, 500])
def test_sizes_of_16_bits(hidden: int) -> None:
    check(hidden, 2, 3, 8, "lengths", torch.bfloat16, seed=8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("hidden", [5, 32, 64])
def test_sizes_of_blocks(hidden: int, dtype: torch.dtype) -> None:
    check(hidden, 3, 4, None, "lengths and reset, reverse", dtype, seed=10)


# In every kernel: a pattern, what it becomes, and what is then reported.
PLANTED = {
    "an exchange is not waited for": (
        r"mbarrier\.try_wait\S* (\w+), \[.*\], .*;", r"setp.eq.u32 \1, 0, 0;",
        "race: reads shared"),
    "a wait that acquires nothing": (r"try_wait\.parity", "try_wait.parity.relaxed", "race"),
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
    nvcc.plant(monkeypatch, pattern, replacement)
    monkeypatch.setattr(Kernel, "launch", partialmethod(Kernel.launch, most_instructions=1 << 20))
    with pytest.raises(Faults, match=expected):
        check(70, 3, 4, 4, "plain")
