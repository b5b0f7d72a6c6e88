"""The kernels of small calls (NTM functionals, hard attention, LSTM cell, attention), as nvcc
compiles them: shared out as csrc/cuda does on the host, in random orders of warps."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from seqmem_fast.reference import attention, hard_attention, lstm, ntm_addressing

from . import nvcc
from .launch import Output, Struct

pytestmark = [pytest.mark.skipif(not nvcc.found(), reason="needs nvcc"), pytest.mark.slow]
THREADS = 256


class Storage(NamedTuple):
    """Template arguments of a kernel."""

    dtype: torch.dtype
    name: str
    width: int  # of vectors

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def near(self, ours: Tensor, right: Tensor, factor: float = 1) -> None:
        bound = {"float": 1e-5, "double": 1e-13, "__half": 5e-3, "__nv_bfloat16": 4e-2}[self.name]
        error = (ours.double() - right.detach()).abs().max()
        assert error <= factor * bound * right.detach().abs().max().clamp_min(1e-3)


FLOAT = Storage(torch.float32, "float", 4)
STORAGES = [
    FLOAT,
    *(
        pytest.param(Storage(*row), marks=pytest.mark.slow)
        for row in (
            (torch.float32, "float", 1),
            (torch.float64, "double", 2),
            (torch.float16, "__half", 8),
            (torch.bfloat16, "__nv_bfloat16", 8),
        )
    ),
]
each_storage = pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s.name} x{s.width}")


def run(
    stem: str,
    kernel: str,
    grid: tuple[int, ...],
    arguments: list[Any],
    seed: int = 0,
    threads: int = THREADS,
) -> None:
    module = nvcc.compiled(f"{stem}_kernel.cu")
    module[f"::{kernel}"].launch(grid, (threads,), arguments, seed=seed)


def leaves_of(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.double().requires_grad_() for t in tensors]


# ---- NTM


class Shape(NamedTuple):
    B: int = 2
    H: int = 2
    N: int = 13
    M: int = 24
    taps: int = 3

    @property
    def argument(self) -> Struct:
        return Struct("5q", *self)

    def lanes(self, storage: Storage) -> int:
        return min(32, 1 << (self.M // storage.width - 1).bit_length())

    def plan(self, storage: Storage, slots: bool, columns: bool) -> tuple[Struct, tuple[int]]:
        """As `plan` in ntm_addressing_common.h, and the grid of the parts that are wanted."""
        lanes = column_lanes = self.lanes(storage)
        vectors = self.M // storage.width
        while (
            column_lanes * storage.width * storage.dtype.itemsize > 32
            and THREADS // column_lanes < self.N
        ):
            column_lanes //= 2
        tiles = -(-vectors // column_lanes)
        slot_blocks = -(-self.B * self.N * lanes // THREADS)
        column_blocks = self.B * self.H * tiles
        plan = Struct("2i3q", lanes, column_lanes, tiles, slot_blocks, column_blocks)
        return plan, (slots * slot_blocks + columns * column_blocks,)


def ntm_sample(name: str, shape: Shape, storage: Storage) -> tuple[Tensor, ...]:
    sizes = (shape.B, shape.N, shape.M, shape.H, shape.taps)
    samples = ntm_addressing.sample_inputs(dtype=storage.dtype, sizes=sizes)
    return next(s.args for s in samples if s.name == f"{name}_heads")


def ntm(kernel: str, storage: Storage, grid: tuple[int, ...], *arguments: Any, seed: int) -> None:
    name = f"{kernel}_kernel<{storage.name}, {storage.width}>"
    of_memory = kernel.startswith(("read", "write"))
    stem = "ntm_addressing_memory" if of_memory else "ntm_addressing"
    run(stem, name, grid, list(arguments), seed)


@each_storage
def test_ntm_read(storage: Storage) -> None:
    shape = Shape()
    memory, weights = ntm_sample("read", shape, storage)
    leaves = leaves_of((memory, weights))
    right = ntm_addressing.ntm_read(*leaves)
    reads, grad = (torch.empty(shape.B, shape.H, shape.M, dtype=storage.dtype) for _ in range(2))
    plan, grid = shape.plan(storage, False, True)
    ntm("read", storage, grid, shape.argument, plan, memory, weights, Output(reads), seed=1)
    storage.near(reads, right)
    grad.normal_()
    grads = torch.empty_like(memory), torch.empty_like(weights)
    plan, grid = shape.plan(storage, True, False)
    outputs = map(Output, grads)
    ntm(
        "read_backward",
        storage,
        grid,
        shape.argument,
        plan,
        memory,
        weights,
        grad,
        *outputs,
        seed=2,
    )
    for a, b in zip(grads, torch.autograd.grad(right, leaves, grad.double()), strict=True):
        storage.near(a, b)


@each_storage
def test_ntm_write(storage: Storage) -> None:
    shape = Shape()
    args = ntm_sample("write", shape, storage)
    leaves = leaves_of(args)
    right = ntm_addressing.ntm_write(*leaves)
    written, grad = torch.empty_like(args[0]), torch.randn_like(args[0])
    plan, grid = shape.plan(storage, True, False)
    given = Struct("4P", *args)
    ntm("write", storage, grid, shape.argument, plan, given, Output(written), seed=1)
    storage.near(written, right)
    grads = [torch.empty_like(t) for t in args]
    plan, grid = shape.plan(storage, True, True)
    into = Struct("4P", *map(Output, grads))
    ntm("write_backward", storage, grid, shape.argument, plan, given, grad, into, seed=2)
    for a, b in zip(grads, torch.autograd.grad(right, leaves, grad.double()), strict=True):
        storage.near(a, b, 4)


@each_storage
@pytest.mark.parametrize("content", [False, True], ids=["addressing", "content"])
@pytest.mark.parametrize("large", [False, True], ids=["one block", "global memory"])
def test_ntm_addressing(large: bool, content: bool, storage: Storage) -> None:
    shape = Shape(taps=0 if content else 3)
    args = ntm_sample("content" if content else "addressing", Shape(), storage)
    leaves = leaves_of(args)
    function = "ntm_content_addressing" if content else "ntm_addressing"
    right = getattr(ntm_addressing, function)(*leaves)
    heads, dtype = shape.B * shape.H, storage.wide
    given = Struct("7P", *args, *[None] * (7 - len(args)))
    lanes = shape.lanes(storage)

    def workspace(arrays: int) -> Tensor | None:
        """What `large` fills with dot products; else the arrays are in shared memory."""
        if not large:
            return None
        memory = torch.zeros(heads, arrays, shape.N, dtype=dtype)
        grid = (heads, -(-shape.N * lanes // THREADS))
        arguments = (shape.argument, given, lanes, memory, arrays)
        ntm("similarity", storage, grid, *arguments, seed=3)
        return memory

    weights = torch.empty(shape.B, shape.H, shape.N, dtype=storage.dtype)
    outputs: tuple[Any, ...] = Output(weights), workspace(2)
    ntm("address", storage, (heads,), shape.argument, given, lanes, *outputs, seed=4)
    storage.near(weights, right)

    grad = torch.randn_like(weights)
    grads = [torch.empty_like(t) for t in args]
    into = [Output(t) for t in grads] + [None] * (7 - len(args))
    by_dot, by_norm = torch.empty(2, heads, shape.N, dtype=dtype)
    by_key_norm = torch.empty(heads, dtype=dtype)
    slopes = by_dot, by_norm, by_key_norm
    first = Struct("7P", None, None, *into[2:])
    outputs = Struct("3P", *map(Output, slopes)), workspace(7)
    arguments: tuple[Any, ...] = (shape.argument, given, lanes, grad, first, *outputs)
    ntm("address_backward", storage, (heads,), *arguments, seed=5)
    plan, grid = shape.plan(storage, True, True)
    second = Struct("7P", *into[:2], *[None] * 5)
    arguments = (shape.argument, plan, given, second, Struct("3P", *slopes))
    ntm("spread", storage, grid, *arguments, seed=6)
    for a, b in zip(grads, torch.autograd.grad(right, leaves, grad.double()), strict=True):
        storage.near(a, b, 4)


# ---- hard attention


@each_storage
@pytest.mark.parametrize("rows, actions", [(20, 7), pytest.param(2, 1030, marks=pytest.mark.slow)])
def test_hard_attention(rows: int, actions: int, storage: Storage) -> None:
    logits, returns, seeds = (
        torch.randn(shape).to(storage.dtype) for shape in ((rows, actions), (rows,), (2, rows))
    )
    whole_block = actions > 1024
    lanes = min(32, 1 << (actions - 1).bit_length())
    grid = (rows if whole_block else -(-rows * lanes // THREADS),)
    policy = Struct("2qP", rows, actions, logits)
    template = f"{storage.name}, {str(whole_block).lower()}"
    uniform = torch.rand(rows, dtype=storage.wide)
    (wide,) = leaves_of((logits,))
    right = hard_attention.sample_at(wide, uniform.double())
    action = torch.empty(rows, dtype=torch.int64)
    log_prob, entropy = (torch.empty(rows, dtype=storage.dtype) for _ in range(2))
    outputs = [Output(t) for t in (action, log_prob, entropy)]
    arguments = [policy, lanes, uniform, *outputs]
    run("hard_attention", f"sample_kernel<{template}>", grid, arguments, seed=1)
    assert torch.equal(action, right[0])
    for a, b in zip((log_prob, entropy), right[1:], strict=True):
        storage.near(a, b, 4)

    grad = torch.empty_like(logits)
    of_sample = Struct("3P", action, seeds[0], seeds[1])
    name = f"backward_kernel<{template}, seqmem::cuda::(anonymous namespace)::Of"
    arguments = [policy, of_sample, lanes, Output(grad)]
    run("hard_attention", f"{name}Sample>", grid, arguments, seed=2)
    loss = (torch.stack(right[1:]) * seeds.double()).sum()
    storage.near(grad, torch.autograd.grad(loss, wide)[0], 4)

    total = hard_attention.reinforce_loss(
        wide, action, returns.double(), entropy_weight=0.3, reduction="mean"
    )
    described = (action, returns, None, 0, 0.3, True, False)
    value, partial = (torch.empty(n, dtype=t) for n, t in ((1, storage.dtype), (2, torch.float64)))
    blocks = 2 if whole_block else 1
    destination = (value, Output(partial)) if blocks > 1 else (Output(value), None)
    arguments = [policy, Struct("3Pqd2?", *described), lanes, *destination]
    run("hard_attention", f"loss_kernel<{template}>", (blocks,), arguments, seed=3)
    if blocks > 1:
        arguments = [policy, Struct("3Pqd2?", *described), Output(value), partial, blocks]
        run("hard_attention", f"sum_kernel<{storage.name}>", (1,), arguments, seed=4)
    storage.near(value, total, 4)
    of_loss = Struct("P3Pqd2?6xP", action, *described, seeds[0][:1])
    run("hard_attention", f"{name}Loss>", grid, [policy, of_loss, lanes, Output(grad)], seed=5)
    storage.near(grad, torch.autograd.grad(total, wide)[0] * seeds[0][0].double(), 4)


# ---- LSTM cell


@each_storage
@pytest.mark.parametrize("batch", [1, 9])
def test_lstm_cell(batch: int, storage: Storage) -> None:
    width, hidden = 8, 24
    cells = lstm.cell_sample_inputs(dtype=storage.dtype, sizes=(batch, width, hidden))
    x, (h, c), *weights = next(s.args for s in cells if s.name == "plain")
    wide = leaves_of((x, h, c, *weights))
    _, (hy, cy), gates, _ = lstm.lstm_trace(wide[0][None], (wide[1], wide[2]), *wide[3:])
    right = (hy, cy, gates[0])
    ours = [torch.empty(t.shape, dtype=storage.dtype) for t in right]
    shape = Struct("3q", batch, width, hidden)
    rows = 1 if batch == 1 else 8
    name = f"cell_kernel<{storage.name}, {storage.width}, {rows}>"
    arguments = [shape, Struct("10P", x, h, c, *weights, *map(Output, ours))]
    run("lstm_cell", name, (-(-hidden // 8), -(-batch // rows)), arguments, seed=1)
    for a, b in zip(ours, right, strict=True):
        storage.near(a, b)

    dz = torch.randn(batch, 4 * hidden).to(storage.dtype)
    d = dz.double()
    expected = (
        d @ weights[0].double(),
        d @ weights[1].double(),
        d.T @ x.double(),
        d.T @ h.double(),
        d.sum(0),
    )
    grads = [torch.empty(t.shape, dtype=storage.dtype) for t in expected]
    lanes = max(1, 32 // (storage.width * storage.dtype.itemsize))
    tiles = [-(-n // (lanes * storage.width)) for n in (width, hidden)]
    products = Struct("10P", dz, x, h, *weights[:2], *map(Output, grads))
    arguments = [shape, Struct("i2q", lanes, *tiles), products]
    grid = (sum(tiles) + -(-4 * hidden // 8), -(-batch // 8))
    name = f"products_kernel<{storage.name}, {storage.width}>"
    run("lstm_cell", name, grid, arguments, seed=2)
    for a, b in zip(grads, expected, strict=True):
        storage.near(a, b, 2)


# ---- attention


@each_storage
@pytest.mark.parametrize("name", ["plain", "masked", "added_mask", "causal"])
def test_attention(name: str, storage: Storage) -> None:
    sizes = batch, queries, keys, width, value_width = (2, 19, 37, 24, 72)
    samples = attention.sample_inputs(dtype=storage.dtype, sizes=sizes)
    sample = next(s for s in samples if s.name == name)
    query, key, value, mask = sample.args
    added = mask is not None and mask.is_floating_point()
    leaves = leaves_of((query, key, value, mask) if added else (query, key, value))
    causal = name == "causal"
    wide_mask = leaves[3] if added else mask
    q, k, v = leaves[:3]
    output, weights = attention.attention(q, k, v, wide_mask, is_causal=causal)
    assert weights is not None

    def matrix(t: Tensor | None) -> tuple[Any, ...]:
        return (None, 0, 0, 0, 0) if t is None else (t, 0, *t.stride())

    kind = 0 if mask is None else 2 if added else 1
    sizes_of = (batch, queries, keys, width, value_width, width**-0.5, 1.0, causal, kind, batch)
    shape = Struct("5q2d?iq", *sizes_of)
    operands = Struct("P4q" * 4, *(v for t in (query, key, value, mask) for v in matrix(t)))
    ours = [torch.empty(t.shape, dtype=storage.dtype) for t in (output, weights)]
    template = f"{storage.name}, {storage.width}"

    def launch(kernel: str, rows: int, roles: int, arguments: list[Any], seed: int) -> None:
        grid = (batch * -(-rows // 16), roles)
        run("attention", f"{kernel}_kernel<{template}>", grid, arguments, seed, threads=128)

    launch("forward", queries, 1, [shape, operands, *map(Output, ours)], 1)
    for a, b in zip(ours, (output, weights), strict=True):
        storage.near(a, b)

    seeds = [torch.randn(t.shape).to(storage.dtype) for t in (output, weights)]
    saved = weights.detach().to(storage.dtype)
    by_scores = torch.empty(weights.shape, dtype=storage.wide)
    grads = [torch.empty(t.shape, dtype=storage.dtype) for t in leaves]
    grad_query, grad_key, grad_value = grads[:3]
    given = (saved, *matrix(seeds[0]), *matrix(seeds[1]))
    of_mask = Output(grads[3]) if added else None
    into: tuple[Any, ...] = (Output(by_scores), Output(grad_query), None, None, of_mask)
    launch("backward_queries", queries, 1, [shape, operands, Struct("PP4qP4q5P", *given, *into)], 2)
    into = (by_scores, None, Output(grad_key), Output(grad_value), None)
    launch("backward_keys", keys, 2, [shape, operands, Struct("PP4qP4q5P", *given, *into)], 3)
    loss = (output * seeds[0].double()).sum() + (weights * seeds[1].double()).sum()
    for a, b in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
        storage.near(a, b, 6)
