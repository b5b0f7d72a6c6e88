"""Window attention: the inherited suites, its dense twin, and edges of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    gradients_of,
    values_and_gradients,
)
from peak_memory import growth_mib
from sparse_attention_suite import (
    BAD_ROW,
    TK,
    TQ,
    WRONG_ENDS,
    WRONG_OPERANDS_AND_RULES,
    B,
    SparseAttentionSuite,
    right_operands,
    z,
)
from sparse_attentions import WINDOW, operands
from torch import Tensor

from seqmem_fast import ops
from seqmem_fast.reference import window_attention as reference
from seqmem_fast.reference.common import Sample


def case_of(sample: Sample) -> Case:
    """q, k, v, key_start and key_end by position; global weights where there are global keys."""
    q, k, v, left, right = sample.args
    options = WINDOW.options(sample)
    ranges = options.pop("key_start"), options.pop("key_end")
    outputs = 3 if options["global_keys"] else 2

    def bind(function: Any) -> Function:
        def call(q: Tensor, k: Tensor, v: Tensor, *ranges: Tensor | None) -> tuple[Tensor, ...]:
            bounds = dict(zip(("key_start", "key_end"), ranges, strict=True))
            results = function(q, k, v, left, right, **options, **bounds)
            return tuple(results[:outputs])

        return call

    rows = (0, 0, 0, *(None if bound is None else 0 for bound in ranges))
    return Case(bind(WINDOW.run), bind(WINDOW.exact), (q, k, v, *ranges), rows, (0,) * outputs)


def window_case(
    sizes: tuple[int, ...], left: int, right: int, dtype: torch.dtype, **options: Any
) -> Case:
    """sizes = (B, Hq, Hk, Tq, Tk, D, Dv)."""
    return case_of(Sample("own", (*operands(sizes, dtype), left, right), options))


def threaded() -> Threaded:
    own = window_case((2, 2, 1, 200, 200, 32, 32), 40, 9, torch.float32, global_keys=3)
    return [(case.op, case.tensors) for case in WINDOW.threaded(case_of, "causal", own)]


# (B, Hq, Hk, Tq, Tk, D, Dv), left, right: around the widths of vectors, panels and tiles.
WINDOWS = [
    *(((1, 1, 1, 70, 70, 5, 3), (left, 0)) for left in (0, 1, 7, 8, 31, 32, 33, 69, 200)),
    *(((1, 1, 1, 70, 70, 5, 3), (3, right)) for right in (1, 8, 30, 64, 100)),
    *(((2, 1, 1, n, n, 4, 4), (9, 5)) for n in (1, 2, 31, 32, 33, 63, 64, 65, 97, 129)),
    *(((1, 1, 1, 40, 40, width, width), (12, 3)) for width in (1, 7, 8, 9, 32, 33, 65)),
    ((1, 2, 1, 600, 600, 8, 8), (100, 20)),
    ((1, 1, 1, 300, 300, 12, 20), (280, 0)),
    ((1, 1, 1, 9, 500, 4, 4), (20, 400)),
    ((1, 1, 1, 500, 9, 4, 4), (20, 3)),
    ((1, 1, 1, 50, 50, 4, 4), (-1, -1)),
    ((1, 4, 2, 30, 30, 4, 0), (4, 4)),
]


class TestWindowAttention(SparseAttentionSuite):
    op = WINDOW
    names = WINDOW.names
    sizes = WINDOWS
    by_query = 3
    bound = staticmethod(case_of)

    def seeing(
        self, sizes: tuple[int, ...], seen: tuple[int, int], dtype: torch.dtype, **options: Any
    ) -> Sample:
        return Sample("own", (*operands(sizes, dtype), *seen), options)

    def some(self, sizes: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Iterator[Sample]:
        yield self.seeing(sizes, (9, 4), dtype, **options)
        options |= {"global_keys": min(3, sizes[4]), "dilation": 2}
        yield self.seeing(sizes, (20, 9), dtype, **options)
        end = torch.tensor([70, 0])[: sizes[0]]
        yield self.seeing(sizes, (-1, 1), dtype, **options, key_end=end)

    def neighbours(self) -> tuple[Sample, Sequence[int], Sequence[int], Sequence[int]]:
        sample = self.seeing((1, 1, 1, 80, 80, 9, 9), (6, 3), torch.float32, global_keys=2)
        near = {n: [0, 1, *range(BAD_ROW - n[0], BAD_ROW + n[1] + 1)] for n in ((6, 3), (9, 9))}
        return sample, near[6, 3], range(BAD_ROW - 3, BAD_ROW + 7), near[9, 9]

    def padded(self) -> Sample:
        end = torch.tensor([50, 33])
        return self.seeing((2, 2, 1, 50, 50, 8, 8), (10, 4), torch.float32, key_end=end)


# With dilation, offset and global keys: whole classes without a query or key, bands past the end.
MIXED = [
    ((1, 2, 2, 90, 100, 8, 8), 20, 10, {"dilation": 3, "offset": 7}),
    ((2, 3, 1, 65, 65, 8, 12), 5, 5, {"dilation": 2, "global_keys": 9}),
    ((1, 1, 1, 5, 40, 4, 4), 2, 2, {"dilation": 9, "offset": 30, "global_keys": 3}),
    ((1, 1, 1, 40, 5, 4, 4), 2, 2, {"dilation": 7, "global_keys": 5}),
    ((1, 1, 1, 33, 80, 4, 4), 15, 0, {"offset": 47, "global_keys": 1}),
    ((1, 1, 1, 20, 20, 4, 4), 15, 0, {"offset": 500}),
    ((1, 2, 1, 400, 400, 8, 8), 30, 30, {"global_keys": 40}),
    ((1, 1, 1, 300, 300, 4, 4), -1, 0, {"dilation": 5, "global_keys": 2}),
]


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize(("sizes", "left", "right", "options"), MIXED, ids=str)
def test_dilation_offset_and_global_keys(
    sizes: tuple[int, ...], left: int, right: int, options: dict[str, Any]
) -> None:
    for dtype in (torch.float64, torch.float16):
        check_against_float64(window_case(sizes, left, right, dtype, **options))
    check_same_bits_at_any_thread_count(window_case(sizes, left, right, torch.float32, **options))


@pytest.mark.isa
@pytest.mark.parametrize("each", [False, True])
def test_ranges_of_keys(each: bool) -> None:
    """Any integers; empty and reversed ones too."""
    generator = torch.Generator().manual_seed(5)
    shape = (4, 90) if each else (4,)
    start, end = (torch.randint(-20, 110, shape, generator=generator) for _ in range(2))
    sizes = (4, 2, 1, 90, 90, 8, 8)
    options = {"key_start": start.int(), "key_end": end, "global_keys": 6}
    for dtype in (torch.float64, torch.float32):
        check_against_float64(window_case(sizes, 25, 9, dtype, **options))


@pytest.mark.parametrize(
    ("left", "right", "dilation", "offset"),
    [(5, 0, 1, 0), (3, 4, 1, 2), (2, 2, 3, 1), (-1, 0, 1, 0), (-1, -1, 1, 0)],
)
def test_dense_twin(left: int, right: int, dilation: int, offset: int) -> None:
    """ops.attention with the pattern as its mask, in float64: outputs, weights and gradients."""
    options = {"dilation": dilation, "offset": offset}
    case = window_case((2, 2, 2, 20, 23, 4, 6), left, right, torch.float64, **options)
    band = reference.bounds(left, right, dilation, offset, 20, 23)
    position = offset + torch.arange(20)[:, None]
    places = position + torch.arange(-band[0], band[1] + 1) * dilation
    there = (places >= 0) & (places < 23)
    pattern = torch.zeros(20, 23, dtype=torch.bool)
    rows = torch.arange(20)[:, None].expand_as(places)
    pattern[rows[there], places[there]] = True
    assert pattern.any(1).all()
    tensors = differentiable(case.tensors[:3])
    output, weights = ops.attention(*tensors, pattern)
    rolled = torch.where(there, weights.gather(-1, places.clamp(0, 22).expand(2, 2, -1, -1)), 0)
    expected = [output, rolled, *gradients_of((output, rolled), tensors)]
    for a, b in zip(values_and_gradients(case.op, case.tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.isa
@pytest.mark.parametrize("sizes", [(1, 2, 1, 700, 700, 16, 16), (5, 2, 2, 150, 150, 24, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_same_bits_at_any_thread_count(
    sizes: tuple[int, ...], dtype: torch.dtype, restored_threads: None
) -> None:
    check_same_bits_at_any_thread_count(window_case(sizes, 100, 30, dtype))
    check_same_bits_at_any_thread_count(window_case(sizes, 10, 3, dtype, dilation=2, global_keys=5))


@pytest.mark.isa
@pytest.mark.parametrize("queries", [1, 2, 3])
def test_global_keys_of_classes_that_have_no_query(queries: int) -> None:
    """A dilation beyond the queries, as in the steps of a stream."""
    options = {"dilation": 4, "offset": 6, "global_keys": 3}
    case = window_case((2, 2, 1, queries, 9, 4, 3), 1, 0, torch.float64, **options)
    found, right = (values_and_gradients(f, case.tensors) for f in (case.op, case.reference))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_without_keys_are_zero_and_teach_nothing() -> None:
    case = window_case((1, 1, 1, 12, 4, 4, 4), 2, 1, torch.float32)
    output, weights, *grads = values_and_gradients(case.op, case.tensors)
    assert output[0, 0, :6].any(-1).all() and not output[0, 0, 6:].any()
    assert not weights[0, 0, 6:].any() and not grads[0][0, 0, 6:].any()
    torch.testing.assert_close(weights[0, 0, :6].sum(-1), torch.ones(6))


@pytest.mark.parametrize("cuts", [(7,), (16, 32), (1, 2, 39)])
def test_a_stream_cut_anywhere_equals_the_whole(cuts: tuple[int, ...]) -> None:
    case = window_case((2, 2, 1, 40, 40, 8, 8), 9, 0, torch.float64)
    q, k, v, *_ = case.tensors
    whole, weights = case.op(*case.tensors)
    for begin, end in zip((0, *cuts), (*cuts, 40), strict=True):
        first = max(begin - 9, 0)
        part = ops.window_attention(
            q[:, :, begin:end], k[:, :, first:end], v[:, :, first:end], 9, 0, offset=begin - first
        )
        torch.testing.assert_close(part[0], whole[:, :, begin:end])
        torch.testing.assert_close(part[1], weights[:, :, begin:end])


@pytest.mark.slow
def test_memory_grows_with_the_window_alone() -> None:
    """A training step at T = 16,384 and 2 heads: a score for each pair would take 2 GiB."""
    definitions = """
import torch
from seqmem_fast import ops

def step(steps):
    q, k, v = (torch.randn(1, 2, steps, 32).requires_grad_() for _ in range(3))
    output, weights, _ = ops.window_attention(q, k, v, 127, 0)
    (output.sum() + weights.square().sum()).backward()
"""
    # The band's weights, their square and gradients are 16 MiB each.
    assert growth_mib(definitions, "step(8)", "step(16384)") < 160


# ---- wrong arguments


def arguments() -> dict[str, Any]:
    return {
        **right_operands(),
        "left": 2,
        "right": 1,
        "key_start": z(B, dtype=torch.int64),
        "key_end": torch.full((B, TQ), TK, dtype=torch.int32),
        "global_keys": 2,
    }


ROWS = [
    *WRONG_OPERANDS_AND_RULES,
    *WRONG_ENDS,
    Bad("left", {"left": -2}, ValueError, "left in -1..2147483647, got -2"),
    Bad("right", {"right": 2**31}, ValueError, "right in -1..2147483647, got 2147483648"),
    Bad("dilation", {"dilation": 0}, ValueError, "dilation in 1..2147483647, got 0"),
    Bad("offset", {"offset": -1}, ValueError, "offset in 0..2147483647, got -1"),
    Bad("global", {"global_keys": TK + 1}, ValueError, r"global_keys in 0\.\.5, got 6"),
    Bad("global negative", {"global_keys": -1}, ValueError, r"global_keys in 0\.\.5, got -1"),
    Bad("start dtype", {"key_start": z(B)}, TypeError, "key_start of dtype int64 or int32"),
    Bad("start bool", {"key_start": z(B).bool()}, TypeError, "key_start of dtype int64 or int32"),
    Bad("start rows", {"key_start": z(B + 1).int()}, ValueError, r"key_start of shape \[2\]"),
    Bad("start 0-D", {"key_start": z(()).int()}, ValueError, r"key_start of shape \[2\], got"),
]


class TestWrongArguments(HostileSuite):
    targets = (Target(WINDOW.name, WINDOW.run, arguments, ROWS, ({}, {"return_weights": False})),)
