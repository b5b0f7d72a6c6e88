"""Indexed and top-k attention: the inherited suites, their dense twins, and edges of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hostile_suite import Bad, HostileSuite, Target
from op_suite import (
    Case,
    Function,
    Threaded,
    check_against_float64,
    check_same_bits_at_any_thread_count,
    differentiable,
)
from peak_memory import growth_mib
from sparse_attention_suite import (
    BAD_ROW,
    EMPTY,
    HK,
    HQ,
    TK,
    TQ,
    WRONG_ENDS,
    WRONG_OPERANDS_AND_RULES,
    WRONG_QUERIES_AND_KEYS,
    B,
    D,
    SparseAttentionSuite,
    check_dense_twin,
    right_operands,
    z,
)
from sparse_attentions import INDEXED, operands
from torch import Tensor

import seqmem_fast as sf
from seqmem_fast import ops
from seqmem_fast.reference import indexed_attention as reference
from seqmem_fast.reference.common import Sample


def case_of(sample: Sample) -> Case:
    """q, k, v and index by position."""

    def bind(function: Any) -> Function:
        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(function(*tensors, **sample.kwargs))

        return call

    own = sample.args[3].size(0) > 1
    rows = (0, 0, 0, 0 if own else None)
    return Case(bind(INDEXED.run), bind(INDEXED.exact), sample.args, rows, (0, 0))


def index_sample(
    sizes: tuple[int, ...],
    count: int,
    dtype: torch.dtype,
    lists: tuple[int, ...] = (1, 1),
    **options: Any,
) -> Sample:
    """sizes = (B, Hq, Hk, Tq, Tk, D, Dv); count: places of a list."""
    generator = torch.Generator().manual_seed(4)
    index = torch.randint(-1, sizes[4], (*lists, sizes[3], count), generator=generator)
    return Sample("own", (*operands(sizes, dtype), index), options)


def index_case(*args: Any, **options: Any) -> Case:
    return case_of(index_sample(*args, **options))


def threaded() -> Threaded:
    """The index is no argument."""
    own = index_case((2, 4, 1, 300, 90, 32, 32), 40, torch.float32, (2, 4))
    return [
        (
            partial(lambda op, index, *rest: op(*rest, index), case.op, case.tensors[3]),
            case.tensors[:3],
        )
        for case in INDEXED.threaded(case_of, "shared", own)
    ]


# (B, Hq, Hk, Tq, Tk, D, Dv), places of a list: around the widths of vectors and of tasks.
SIZES = [
    *(((1, 1, 1, 5, 40, 5, 3), count) for count in (1, 7, 8, 9, 15, 16, 17, 33, 100)),
    *(((2, 2, 1, n, n, 4, 4), 6) for n in (2, 63, 64, 65)),
    *(((1, 1, 1, 9, 9, width, width), 12) for width in (1, 7, 8, 9, 33, 64, 65, 130)),
    ((1, 1, 1, 200, 3, 4, 4), 20),  # a key that is named more often than is summed at once
    ((1, 4, 2, 30, 30, 4, 0), 8),
]


class TestIndexedAttention(SparseAttentionSuite):
    op = INDEXED
    names = INDEXED.names
    sizes = SIZES
    by_query = 2
    bound = staticmethod(case_of)
    seeing = staticmethod(index_sample)

    def some(self, sizes: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Iterator[Sample]:
        for count, lists in ((7, (1, 1)), (20, (sizes[0], 1)), (33, sizes[:2])):
            yield index_sample(sizes, count, dtype, lists, **options)

    def neighbours(self) -> tuple[Sample, Sequence[int], Sequence[int], Sequence[int]]:
        """Query i names keys i, i + 1 and i + 5, where there are such."""
        steps = (0, 1, 5)
        index = torch.arange(80)[:, None] + torch.tensor(steps)
        index = torch.where(index < 80, index, -1)[None, None]
        sample = Sample("own", (*operands((1, 1, 1, 80, 80, 9, 9), torch.float32), index))
        own = [BAD_ROW + n for n in steps]
        readers = [BAD_ROW - n for n in steps]
        return sample, own, readers, sorted({i + n for i in readers for n in steps})

    def padded(self) -> Sample:
        sample = index_sample((2, 2, 1, 50, 50, 8, 8), 7, torch.float32, (2, 1))
        sample.args[3][1].clamp_(max=32)
        return sample

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        q, k, *_ = INDEXED.sample(name, dtype=torch.float64).args
        top = torch.ops.seqmem.top_k_keys.default, (q, k, 3, True, None, None)
        return [*super().raw_calls(name), top]


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("lists", [(1, 1), (1, 4), (2, 1), (2, 4)], ids=str)
def test_lists_of_heads_and_rows(lists: tuple[int, int], restored_threads: None) -> None:
    for dtype in (torch.float64, torch.float16):
        check_against_float64(index_case((2, 4, 2, 90, 100, 8, 8), 11, dtype, lists))
    check_same_bits_at_any_thread_count(
        index_case((2, 4, 2, 300, 100, 32, 32), 40, torch.float32, lists)
    )


def test_is_dense_attention_with_a_mask() -> None:
    q, k, v = operands((2, 4, 2, 50, 60, 8, 8), torch.float64)
    index = torch.rand(2, 4, 50, 60).argsort(-1)[..., :20]
    output, weights = ops.indexed_attention(q, k, v, index)
    seen = torch.zeros(2, 4, 50, 60).bool().scatter(-1, index, True)
    expected, dense = ops.attention(q, *(x.repeat_interleave(2, 1) for x in (k, v)), seen)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, dense.gather(-1, index))


def test_a_key_named_twice_counts_twice() -> None:
    q, k, v = operands((1, 1, 1, 3, 4, 5, 5), torch.float64)
    twice = torch.tensor([2, 1, 2, -1]).expand(1, 1, 3, -1)
    output, weights = ops.indexed_attention(q, k, v, twice)
    assert torch.equal(weights[..., 0], weights[..., 2]) and not weights[..., 3].any()
    scores = (q @ k.transpose(-1, -2))[..., [2, 1, 2]] * 5**-0.5
    torch.testing.assert_close(weights[..., :3], scores.softmax(-1))
    torch.testing.assert_close(output, scores.softmax(-1) @ v[:, :, [2, 1, 2]])


@pytest.mark.sanitize
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_no_places_and_no_keys(sizes: tuple[int, ...]) -> None:
    q, k, v = operands(sizes, torch.float64)
    for count in (0, 2):
        none = torch.full((1, 1, sizes[3], count), -1)
        for call in (INDEXED.run, INDEXED.exact):
            output, weights = call(q, k, v, none)
            assert weights.shape == (*q.shape[:3], count)
            assert not output.any() and not weights.any()
    output, _, index = ops.top_k_attention(q, k, v, 3)
    assert output.shape == (*sizes[:2], sizes[3], sizes[6]) and index.shape == (*q.shape[:3], 3)


# ---- top-k

# (B, Hq, Hk, Tq, Tk, D, Dv), count
TOP = [
    ((1, 1, 1, 5, 40, 5, 3), 1),
    ((1, 1, 1, 5, 40, 5, 3), 50),
    ((2, 4, 2, 70, 600, 8, 8), 7),  # keys past one packed part
    ((1, 2, 1, 65, 1100, 9, 4), 40),
    ((1, 1, 1, 3, 520, 4, 4), 519),
]


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize(("sizes", "count"), TOP, ids=str)
@pytest.mark.parametrize("bounded", [False, True])
def test_top_k_finds_the_highest_scores(
    sizes: tuple[int, ...], count: int, bounded: bool, restored_threads: None
) -> None:
    q, k, v = operands(sizes, torch.float64)
    end = torch.randint(-1, sizes[4] + 1, (sizes[0], sizes[3])) if bounded else None
    options: dict[str, Any] = {"is_causal": bounded, "key_end": end}
    for dtype in (torch.float64, torch.float32):
        typed = [t.to(dtype) for t in (q, k, v)]
        output, weights, index = ops.top_k_attention(*typed, count, **options)
        expected = reference.top_k_keys(q, k, count, **options)
        if dtype == torch.float64:
            assert torch.equal(index, expected)
        assert torch.equal((index >= 0).sum(-1), (expected >= 0).sum(-1))
        right = reference.indexed_attention(*typed, index)
        torch.testing.assert_close(output, right[0])
        assert weights is not None
        torch.testing.assert_close(weights, right[1])
        assert (weights.diff(dim=-1) <= 1e-6).all()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(ops.top_k_attention(*typed, count, **options)[2], index)


@pytest.mark.isa
def test_of_equal_scores_the_lower_index_comes_first() -> None:
    for keys in (9, 700):
        value = torch.randint(0, 3, (keys, 1)).float()
        k = value.expand(1, 1, keys, 4).contiguous()
        q = torch.ones(1, 1, 3, 4)
        for count in (1, 5, keys):
            index = ops.top_k_attention(q, k, k, count)[2]
            order = value[:, 0].sort(descending=True, stable=True).indices[:count]
            assert (index == order).all()
            lowest = ops.top_k_attention(q, k, k, count, scale=-1.0)[2]
            assert (lowest == value[:, 0].sort(stable=True).indices[:count]).all()


@pytest.mark.isa
def test_nan_is_above_all_scores_and_stays_in_its_row() -> None:
    q, k, v = operands((1, 1, 1, 4, 100, 4, 4), torch.float32)
    q[0, 0, 2] = torch.nan
    k[0, 0, 40, 1] = torch.nan
    index = ops.top_k_attention(q, k, v, 3)[2]
    assert (index[0, 0, [0, 1, 3], 0] == 40).all() and index[0, 0, 2].tolist() == [0, 1, 2]
    k[0, 0, 40, 1] = torch.inf
    output, _, index = ops.top_k_attention(q.abs().neg(), k, v, 3)
    assert not (index[0, 0, [0, 1, 3]] == 40).any() and output[0, 0, [0, 1, 3]].isfinite().all()


def test_top_k_differentiates_compiles_and_maps() -> None:
    q, k, v = differentiable(operands((2, 4, 2, 20, 30, 8, 8), torch.float64))
    output, weights, index = ops.top_k_attention(q, k, v, 5, is_causal=True)
    expected, _ = ops.indexed_attention(q, k, v, index)
    ours, theirs = (torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (output, expected))
    assert all(map(torch.equal, ours, theirs))

    def loss(q: Tensor) -> Tensor:
        return ops.top_k_attention(q, k, v, 5, is_causal=True)[0].square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(q), ours[0])
    with torch.autocast("cpu", torch.bfloat16):
        low, _, _ = ops.top_k_attention(q.float(), k.float(), v.float(), 5)
    assert low.dtype == torch.bfloat16
    torch.compiler.reset()
    compiled = torch.compile(ops.top_k_attention, fullgraph=True, backend="eager")
    for a, b in zip(compiled(q, k, v, 5, is_causal=True), (output, weights, index), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_memory_grows_with_the_lists_alone() -> None:
    """A training step at T = 16,384 and 2 heads: a score for each pair would take 2 GiB."""
    definitions = """
import torch
from seqmem_fast import ops

def step(steps):
    q, k, v = (torch.randn(1, 2, steps, 32).requires_grad_() for _ in range(3))
    output, weights, _ = ops.top_k_attention(q, k, v, 16, is_causal=True)
    (output.sum() + weights.square().sum()).backward()
"""
    # q, k, v and their gradients are 4 MiB each, as are the lists and what is kept of them.
    assert growth_mib(definitions, "step(8)", "step(16384)") < 100


def test_module() -> None:
    torch.manual_seed(0)
    layer = sf.TopKAttention(16, 4, 30, batch_first=True, is_causal=True)
    x = torch.randn(2, 30, 16)
    output, weights, index = layer(x, x, x, key_end=torch.tensor([30, 20]))
    dense = check_dense_twin(layer, x, [30, 20], output)
    torch.testing.assert_close(weights, dense.gather(-1, index.clamp(min=0)) * (index >= 0))
    layer.count = 3
    output, none, index = layer(x, x, x, need_weights=False)
    assert none is None and index.shape == (2, 4, 30, 3)
    with pytest.raises(ValueError, match="query with 3 dimensions"):
        layer(x[0], x[0], x[0])
    assert "count=3, is_causal=True" in repr(layer)


# ---- wrong arguments


def arguments() -> dict[str, Any]:
    return {**right_operands(), "index": z(1, HQ, TQ, 4).long()}


def arguments_of_keys() -> dict[str, Any]:
    return {
        "q": z(B, HQ, TQ, D),
        "k": z(B, HK, TK, D),
        "count": 2,
        "key_end": torch.full((B, TQ), TK, dtype=torch.int32),
    }


wrong_key = z(1, HQ, TQ, 4).long()
wrong_key[0, 3, 2, 3] = TK
ROWS = [
    *WRONG_OPERANDS_AND_RULES,
    Bad("index 3-D", {"index": z(HQ, TQ, 4).long()}, ValueError, "index with 4 dimensions"),
    Bad("index rows", {"index": z(3, 1, TQ, 4).long()}, ValueError, r"shape \[2, 1, 3, 4\]"),
    Bad("index heads", {"index": z(1, 2, TQ, 4).long()}, ValueError, r"shape \[1, 4, 3, 4\]"),
    Bad("index queries", {"index": z(1, 1, 4, 4).long()}, ValueError, r"shape \[1, 1, 3, 4\]"),
    Bad("index int", {"index": z(1, 1, TQ, 4).int()}, TypeError, "index of dtype int64"),
    Bad("index sparse", {"index": z(1, 1, TQ, 4).long().to_sparse()}, TypeError, "be a dense"),
    Bad("no such key", {"index": wrong_key}, ValueError, r"index in -1\.\.4, got 5", True),
    Bad("negative", {"index": wrong_key - 7}, ValueError, r"index in -1\.\.4, got -7", True),
]
ROWS_OF_KEYS = [
    *WRONG_QUERIES_AND_KEYS,
    *WRONG_ENDS,
    Bad("count", {"count": 0}, ValueError, r"count in 1\.\.1048576, got 0"),
    Bad("count large", {"count": 2**40}, ValueError, r"count in 1\.\.1048576"),
]


def call_keys(q: Tensor, k: Tensor, **given: Any) -> tuple[Tensor | None, ...]:
    return ops.top_k_attention(q, k, k, **given)


class TestWrongArguments(HostileSuite):
    targets = (
        Target(INDEXED.name, INDEXED.run, arguments, ROWS, ({}, {"return_weights": False})),
        Target("top_k_keys", call_keys, arguments_of_keys, ROWS_OF_KEYS),
    )
