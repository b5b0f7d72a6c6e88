"""Window attention: the inherited suites, its dense twin, and edges of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hostile_suite import Bad, HostileSuite, Target
from op_suite import (
    Case,
    Function,
    OpSuite,
    Threaded,
    check_against_float64,
    check_nothing_left_over,
    check_same_bits_at_any_thread_count,
    compare,
    differentiable,
    gradients_of,
    values_and_gradients,
)
from peak_memory import growth_mib
from torch import Tensor

from seqmem_fast import ops
from seqmem_fast.reference import window_attention as reference
from seqmem_fast.reference.common import ALPHAS, Sample

SEED = torch.tensor([2**40 + 3])  # of dropout
NAMES = [sample.name for sample in reference.sample_inputs()]
OPTIONS: dict[str, Any] = {
    "dilation": 1,
    "offset": 0,
    "key_start": None,
    "key_end": None,
    "global_keys": 0,
    "scale": None,
    "normalizer": "softmax",
    "alpha": 1.5,
    "dropout": 0.0,
    "seed": None,
}


def op_options(sample: Sample) -> list[Any]:
    """What the op in the dispatcher takes after q, k, v, left and right."""
    *options, normalizer, alpha, dropout, seed = {**OPTIONS, **sample.kwargs}.values()
    return [*options, ALPHAS.get(normalizer, alpha), dropout, seed]


def case_of(sample: Sample) -> Case:
    """q, k, v, key_start and key_end by position; global weights where there are global keys."""
    q, k, v, left, right = sample.args
    options = {**OPTIONS, **sample.kwargs}
    ranges = options.pop("key_start"), options.pop("key_end")
    outputs = 3 if options["global_keys"] else 2

    def bind(function: Any) -> Function:
        def call(q: Tensor, k: Tensor, v: Tensor, *ranges: Tensor | None) -> tuple[Tensor, ...]:
            bounds = dict(zip(("key_start", "key_end"), ranges, strict=True))
            results = function(q, k, v, left, right, **options, **bounds)
            return tuple(results[:outputs])

        return call

    rows = (0, 0, 0, *(None if bound is None else 0 for bound in ranges))
    both = bind(ops.window_attention), bind(reference.window_attention)
    return Case(*both, (q, k, v, *ranges), rows, (0,) * outputs)


def plain_case(*sizes: int, dtype: torch.dtype = torch.float32, name: str = "causal") -> Case:
    """sizes = (B, Hk, Tq, Tk, D, Dv)."""
    samples = reference.sample_inputs(dtype=dtype, sizes=sizes)  # type: ignore[arg-type]
    return case_of(next(s for s in samples if s.name == name))


def window_case(
    sizes: tuple[int, ...], left: int, right: int, dtype: torch.dtype, **options: Any
) -> Case:
    """sizes = (B, Hq, Hk, Tq, Tk, D, Dv)."""
    batch, heads, key_heads, queries, keys, width, values = sizes
    generator = torch.Generator().manual_seed(3)
    shapes = (heads, queries, width), (key_heads, keys, width), (key_heads, keys, values)
    operands = (torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes)
    return case_of(Sample("own", (*operands, left, right), options))


def threaded() -> Threaded:
    """Calls below and above the size at which one takes several threads."""
    cases = [plain_case(*sizes) for sizes in ((1, 1, 3, 9, 8, 8), (2, 2, 200, 200, 32, 32))]
    cases.append(window_case((2, 2, 1, 200, 200, 32, 32), 40, 9, torch.float32, global_keys=3))
    return [(case.op, case.tensors) for case in cases]


class TestWindowAttention(OpSuite):
    names = NAMES

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        sizes = (2, 1, 3, 4, 2, 2) if tiny else (3, 2, 6, 7, 4, 5)
        return plain_case(*sizes, dtype=dtype, name=name)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        sample = next(s for s in reference.sample_inputs(dtype=torch.float64) if s.name == name)
        inputs = (*sample.args, *op_options(sample))
        outputs = torch.ops.seqmem.window_attention(*inputs, True)
        seeds = tuple(map(torch.ones_like, outputs))
        leaves = tuple(differentiable(inputs[:3]))
        return [
            (torch.ops.seqmem.window_attention.default, (*leaves, *inputs[3:], True)),
            (
                torch.ops.seqmem.window_attention_backward.default,
                (*seeds, *inputs, *outputs[1:], [True] * 3),
            ),
        ]


# (B, Hq, Hk, Tq, Tk, D, Dv), left, right: around the widths of vectors, panels and tiles.
WINDOWS = [
    *(((1, 1, 1, 70, 70, 5, 3), left, 0) for left in (0, 1, 7, 8, 31, 32, 33, 69, 200)),
    *(((1, 1, 1, 70, 70, 5, 3), 3, right) for right in (1, 8, 30, 64, 100)),
    *(((2, 1, 1, n, n, 4, 4), 9, 5) for n in (1, 2, 31, 32, 33, 63, 64, 65, 97, 129)),
    *(((1, 1, 1, 40, 40, width, width), 12, 3) for width in (1, 7, 8, 9, 32, 33, 65)),
    ((1, 2, 1, 600, 600, 8, 8), 100, 20),
    ((1, 1, 1, 300, 300, 12, 20), 280, 0),
    ((1, 1, 1, 9, 500, 4, 4), 20, 400),
    ((1, 1, 1, 500, 9, 4, 4), 20, 3),
    ((1, 1, 1, 50, 50, 4, 4), -1, -1),
    ((1, 4, 2, 30, 30, 4, 0), 4, 4),
]


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize(("sizes", "left", "right"), WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sizes(sizes: tuple[int, ...], left: int, right: int, dtype: torch.dtype) -> None:
    check_against_float64(window_case(sizes, left, right, dtype))


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
@pytest.mark.sanitize
@pytest.mark.parametrize("alpha", [1.05, 1.3, "entmax15", "sparsemax"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_normalizers(alpha: float | str, dtype: torch.dtype, restored_threads: None) -> None:
    """Scores spread wide enough that many weights are zero; rows without keys among them."""
    named = isinstance(alpha, str)
    options = {"normalizer": alpha} if named else {"normalizer": "entmax", "alpha": alpha}
    options |= {"scale": 1.5, "global_keys": 3, "dilation": 2}
    for end in (None, torch.tensor([0, 70])):
        case = window_case((2, 2, 1, 90, 90, 8, 8), 20, 9, dtype, **options, key_end=end)
        check_against_float64(case)
        check_same_bits_at_any_thread_count(case)


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
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("options", [{}, {"dilation": 2, "global_keys": 3}], ids=str)
def test_nothing_is_left_over_from_an_earlier_call(
    options: dict[str, int], threads: int, restored_threads: None
) -> None:
    torch.set_num_threads(threads)
    for sizes in ((2, 2, 1, 9, 8, 6, 3), (1, 2, 2, 130, 120, 9, 11)):
        larger = window_case((*sizes[:3], *(n + 60 for n in sizes[3:])), 40, 9, torch.float32)
        check_nothing_left_over(window_case(sizes, 9, 4, torch.float32, **options), larger)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dropout(dtype: torch.dtype, restored_threads: None) -> None:
    options: dict[str, Any]
    for sizes, options in (
        ((2, 4, 2, 70, 75, 5, 3), {"dilation": 3, "key_end": torch.tensor([40, 0])}),
        ((1, 2, 1, 129, 129, 8, 8), {"global_keys": 9, "normalizer": "sparsemax"}),
    ):
        case = window_case(sizes, 9, 30, dtype, **options, dropout=0.3, seed=SEED)
        check_against_float64(case)
        check_same_bits_at_any_thread_count(case)


@pytest.mark.isa
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spoilt", ["q", "k", "v", "grad"])
def test_bad_values_reach_only_what_sees_them(spoilt: str, bad: float) -> None:
    """One bad row among good ones of the same head: what does not see it keeps its bits."""
    case = window_case((1, 1, 1, 80, 80, 9, 9), 6, 3, torch.float32, global_keys=2)
    seeds = [torch.randn_like(o) for o in case.op(*case.tensors)]

    def run(tensors: tuple[Tensor, ...], seeds: list[Tensor]) -> list[Tensor]:
        leaves = differentiable(tensors)
        outputs = case.op(*leaves)
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves[:3], seeds)]

    clean = run(case.tensors, seeds)
    tensors, bad_seeds = [None if t is None else t.clone() for t in case.tensors], list(seeds)
    if spoilt == "grad":
        bad_seeds[0] = seeds[0].clone()
        bad_seeds[0][0, 0, 40, 4] = bad
    else:
        tensors["qkv".index(spoilt)][0, 0, 40, 4] = bad
    found = run(tuple(tensors), bad_seeds)
    # Query 40 sees keys 34..43; key 40 is seen by queries 37..46, which see keys 31..49.
    queries = slice(40, 41) if spoilt in ("q", "grad") else slice(37, 47)
    keys = slice(34, 44) if spoilt in ("q", "grad") else slice(31, 50)
    limits = [queries] * 4 + [keys] * 2
    for a, b, limit in zip(found, clean, limits, strict=True):
        outside = torch.ones(80, dtype=torch.bool)
        outside[limit] = False
        if limit is keys:
            outside[:2] = False  # every query sees the global ones
        assert torch.equal(a[..., outside, :], b[..., outside, :])
    assert any(not torch.isfinite(t).all() for t in found)


def test_padding_may_hold_anything() -> None:
    case = window_case((2, 2, 1, 50, 50, 8, 8), 10, 4, torch.float32)
    q, k, v, *_ = case.tensors
    end = torch.tensor([50, 33])
    expected = values_and_gradients(case.op, (q, k, v, None, end))
    k, v = k.clone(), v.clone()
    k[1, :, 33:], v[1, :, 33:] = float("nan"), float("inf")
    for a, b in zip(values_and_gradients(case.op, (q, k, v, None, end)), expected, strict=True):
        assert torch.equal(a, b)


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


def test_without_weights() -> None:
    case = window_case((2, 2, 1, 40, 40, 8, 8), 9, 2, torch.float32)
    q, k, v = differentiable(case.tensors[:3])
    expected, _, _ = ops.window_attention(q, k, v, 9, 2)
    output, *none = ops.window_attention(q, k, v, 9, 2, return_weights=False)
    assert none == [None, None] and torch.equal(output, expected)
    ours, theirs = (torch.autograd.grad(o.sum(), (q, k, v)) for o in (output, expected))
    assert all(map(torch.equal, ours, theirs))
    with torch.no_grad():
        output, *_ = ops.window_attention(q, k, v, 9, 2, return_weights=False)
        _, weights, _ = torch.ops.seqmem.window_attention(
            q, k, v, 9, 2, 1, 0, None, None, 0, None, 1.0, 0.0, None, False
        )
    assert torch.equal(output, expected) and weights.numel() == 0


EMPTY = [(2, 2, 1, 0, 5, 4, 3), (2, 2, 1, 5, 0, 4, 3), (2, 0, 1, 5, 5, 4, 3), (0, 2, 1, 5, 5, 4, 3)]


@pytest.mark.sanitize
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty(sizes: tuple[int, ...]) -> None:
    for left, dilation in ((2, 1), (-1, 2)):
        case = window_case(sizes, left, 1, torch.float64, dilation=dilation)
        compare(case.op, case.reference, case.tensors, case.tensors)
        output, _ = case.op(*case.tensors)
        assert output.shape == (*sizes[:2], sizes[3], sizes[6]) and not output.any()


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

B, HQ, HK, TQ, TK, D, DV = 2, 4, 2, 3, 5, 6, 7
z = torch.zeros


def arguments() -> dict[str, Any]:
    return {
        "q": z(B, HQ, TQ, D),
        "k": z(B, HK, TK, D),
        "v": z(B, HK, TK, DV),
        "left": 2,
        "right": 1,
        "key_start": z(B, dtype=torch.int64),
        "key_end": torch.full((B, TQ), TK, dtype=torch.int32),
        "global_keys": 2,
    }


ROWS = [
    Bad("q 3-D", {"q": z(HQ, TQ, D)}, ValueError, "q with 4 dimensions"),
    Bad("q features", {"q": z(B, HQ, TQ, D + 1)}, ValueError, r"k of shape \[2, 2, 5, 7\]"),
    Bad("q no features", {"q": z(B, HQ, TQ, 0)}, ValueError, "at least one feature"),
    Bad("q batch", {"q": z(B + 1, HQ, TQ, D)}, ValueError, r"k of shape \[3, 2, 5, 6\]"),
    Bad("q heads", {"q": z(B, 3, TQ, D)}, ValueError, "a multiple of k's 2 heads, got 3"),
    Bad("q integer", {"q": z(B, HQ, TQ, D).int()}, TypeError, "q of dtype float32"),
    Bad("q double", {"q": z(B, HQ, TQ, D).double()}, TypeError, "k of q's dtype Double"),
    Bad("q sparse", {"q": z(B, HQ, TQ, D).to_sparse()}, TypeError, "q to be a dense"),
    Bad("k 3-D", {"k": z(HK, TK, D)}, ValueError, "k with 4 dimensions"),
    Bad("k no heads", {"k": z(B, 0, TK, D)}, ValueError, "k with at least one head"),
    Bad("k half", {"k": z(B, HK, TK, D).half()}, TypeError, "k of q's dtype Float, got Half"),
    Bad("k sparse", {"k": z(B, HK, TK, D).to_sparse()}, TypeError, "k to be a dense"),
    Bad("v 2-D", {"v": z(TK, DV)}, ValueError, "v with 4 dimensions"),
    Bad("v keys", {"v": z(B, HK, TK + 1, DV)}, ValueError, r"v of shape \[2, 2, 5, 7\]"),
    Bad("v heads", {"v": z(B, HQ, TK, DV)}, ValueError, r"v of shape \[2, 2, 5, 7\]"),
    Bad("v dtype", {"v": z(B, HK, TK, DV).bfloat16()}, TypeError, "v of q's dtype"),
    Bad("left", {"left": -2}, ValueError, "left in -1..2147483647, got -2"),
    Bad("right", {"right": 2**31}, ValueError, "right in -1..2147483647, got 2147483648"),
    Bad("dilation", {"dilation": 0}, ValueError, "dilation in 1..2147483647, got 0"),
    Bad("offset", {"offset": -1}, ValueError, "offset in 0..2147483647, got -1"),
    Bad("global", {"global_keys": TK + 1}, ValueError, r"global_keys in 0\.\.5, got 6"),
    Bad("global negative", {"global_keys": -1}, ValueError, r"global_keys in 0\.\.5, got -1"),
    Bad("alpha", {"normalizer": "entmax", "alpha": 1.0}, ValueError, "1 < alpha", in_python=True),
    Bad(
        "dropout", {"dropout": 1.5, "seed": z(1).long()}, ValueError, r"dropout in 0\.\.1, got 1.5"
    ),
    Bad("seed type", {"dropout": 0.5, "seed": z(1)}, TypeError, "seed of dtype int64"),
    Bad("seeds", {"dropout": 0.5, "seed": z(2).long()}, ValueError, r"seed of shape \[1\]"),
    Bad("name", {"normalizer": "max"}, ValueError, "normalizer softmax, spars", in_python=True),
    Bad("start dtype", {"key_start": z(B)}, TypeError, "key_start of dtype int64 or int32"),
    Bad("start bool", {"key_start": z(B).bool()}, TypeError, "key_start of dtype int64 or int32"),
    Bad("start rows", {"key_start": z(B + 1).int()}, ValueError, r"key_start of shape \[2\]"),
    Bad("start 0-D", {"key_start": z(()).int()}, ValueError, r"key_start of shape \[2\], got"),
    Bad("end queries", {"key_end": z(B, TK).int()}, ValueError, r"key_end of shape \[2, 3\]"),
    Bad("end sparse", {"key_end": z(B, TQ).int().to_sparse()}, TypeError, "key_end to be a dense"),
]


def call(**given: Any) -> tuple[Tensor, ...]:
    return ops.window_attention(**given)


class TestWrongArguments(HostileSuite):
    targets = (Target("window_attention", call, arguments, ROWS, ({}, {"return_weights": False})),)
