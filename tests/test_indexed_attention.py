"""Indexed and top-k attention: the inherited suites, their dense twins, and edges of their own."""

from __future__ import annotations

from functools import partial
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
)
from peak_memory import growth_mib
from torch import Tensor

import seqmem_fast as sf
from seqmem_fast import ops
from seqmem_fast.reference import indexed_attention as reference
from seqmem_fast.reference.common import ALPHAS, Sample

SEED = torch.tensor([2**40 + 3])  # of dropout
NAMES = [sample.name for sample in reference.sample_inputs()]
OPTIONS: dict[str, Any] = {
    "scale": None,
    "normalizer": "softmax",
    "alpha": 1.5,
    "dropout": 0.0,
    "seed": None,
}


def op_options(sample: Sample) -> list[Any]:
    """What the op in the dispatcher takes after the index."""
    scale, normalizer, alpha, *dropout = {**OPTIONS, **sample.kwargs}.values()
    return [scale, ALPHAS.get(normalizer, alpha), *dropout]


def case_of(sample: Sample) -> Case:
    """q, k, v and index by position."""

    def bind(function: Any) -> Function:
        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(function(*tensors, **sample.kwargs))

        return call

    both = bind(ops.indexed_attention), bind(reference.indexed_attention)
    own = sample.args[3].size(0) > 1
    return Case(*both, sample.args, (0, 0, 0, 0 if own else None), (0, 0))


def plain_case(*sizes: int, dtype: torch.dtype = torch.float32, name: str = "shared") -> Case:
    """sizes = (B, Hk, Tq, Tk, D, Dv)."""
    samples = reference.sample_inputs(dtype=dtype, sizes=sizes)  # type: ignore[arg-type]
    return case_of(next(s for s in samples if s.name == name))


def operands(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """sizes = (B, Hq, Hk, Tq, Tk, D, Dv)."""
    batch, heads, key_heads, queries, keys, width, values = sizes
    generator = torch.Generator().manual_seed(3)
    shapes = (heads, queries, width), (key_heads, keys, width), (key_heads, keys, values)
    return tuple(torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes)


def index_case(
    sizes: tuple[int, ...],
    count: int,
    dtype: torch.dtype,
    lists: tuple[int, int] = (1, 1),
    **options: Any,
) -> Case:
    generator = torch.Generator().manual_seed(4)
    index = torch.randint(-1, sizes[4], (*lists, sizes[3], count), generator=generator)
    return case_of(Sample("own", (*operands(sizes, dtype), index), options))


def threaded() -> Threaded:
    """Calls below and above the size at which one takes several threads; index is no argument."""
    cases = [plain_case(*sizes) for sizes in ((1, 1, 3, 9, 8, 8), (2, 2, 400, 200, 32, 32))]
    cases.append(index_case((2, 4, 1, 300, 90, 32, 32), 40, torch.float32, (2, 4)))
    return [
        (
            partial(lambda op, index, *rest: op(*rest, index), case.op, case.tensors[3]),
            case.tensors[:3],
        )
        for case in cases
    ]


class TestIndexedAttention(OpSuite):
    names = NAMES

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        sizes = (2, 1, 3, 4, 2, 2) if tiny else (3, 2, 6, 7, 4, 5)
        return plain_case(*sizes, dtype=dtype, name=name)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        sample = next(s for s in reference.sample_inputs(dtype=torch.float64) if s.name == name)
        inputs = (*sample.args, *op_options(sample))
        outputs = torch.ops.seqmem.indexed_attention(*inputs, True)
        seeds = tuple(map(torch.ones_like, outputs))
        leaves = tuple(differentiable(inputs[:3]))
        return [
            (torch.ops.seqmem.indexed_attention.default, (*leaves, *inputs[3:], True)),
            (
                torch.ops.seqmem.indexed_attention_backward.default,
                (*seeds, *inputs, outputs[1], [True] * 3),
            ),
            (torch.ops.seqmem.top_k_keys.default, (*inputs[:2], 3, True, None, None)),
        ]


# (B, Hq, Hk, Tq, Tk, D, Dv), places of a list: around the widths of vectors and of tasks.
SIZES = [
    *(((1, 1, 1, 5, 40, 5, 3), count) for count in (1, 7, 8, 9, 15, 16, 17, 33, 100)),
    *(((2, 2, 1, n, n, 4, 4), 6) for n in (2, 63, 64, 65)),
    *(((1, 1, 1, 9, 9, width, width), 12) for width in (1, 7, 8, 9, 33, 64, 65, 130)),
    ((1, 1, 1, 200, 3, 4, 4), 20),  # a key that is named more often than is summed at once
    ((1, 4, 2, 30, 30, 4, 0), 8),
]


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize(("sizes", "count"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sizes(sizes: tuple[int, ...], count: int, dtype: torch.dtype) -> None:
    check_against_float64(index_case(sizes, count, dtype))


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("lists", [(1, 1), (1, 4), (2, 1), (2, 4)], ids=str)
def test_lists_of_heads_and_rows(lists: tuple[int, int], restored_threads: None) -> None:
    for dtype in (torch.float64, torch.float16):
        check_against_float64(index_case((2, 4, 2, 90, 100, 8, 8), 11, dtype, lists))
    check_same_bits_at_any_thread_count(
        index_case((2, 4, 2, 300, 100, 32, 32), 40, torch.float32, lists)
    )


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("alpha", [1.05, 1.3, "entmax15", "sparsemax"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_normalizers(alpha: float | str, dtype: torch.dtype) -> None:
    """Scores spread wide enough that many weights are zero."""
    named = isinstance(alpha, str)
    options = {"normalizer": alpha} if named else {"normalizer": "entmax", "alpha": alpha}
    check_against_float64(
        index_case((2, 2, 1, 90, 90, 8, 8), 20, dtype, (2, 1), **options, scale=1.5)
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


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_is_left_over_from_an_earlier_call(threads: int, restored_threads: None) -> None:
    torch.set_num_threads(threads)
    for sizes in ((2, 2, 1, 9, 8, 6, 3), (1, 2, 2, 130, 120, 9, 11)):
        larger = index_case((*sizes[:3], *(n + 60 for n in sizes[3:])), 30, torch.float32)
        check_nothing_left_over(index_case(sizes, 7, torch.float32), larger)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dropout(dtype: torch.dtype, restored_threads: None) -> None:
    options: dict[str, Any]
    for count, options in ((5, {}), (33, {"normalizer": "sparsemax"})):
        sizes = (2, 4, 2, 70, 75, 5, 3)
        case = index_case(sizes, count, dtype, (2, 4), **options, dropout=0.3, seed=SEED)
        check_against_float64(case)
        check_same_bits_at_any_thread_count(case)


@pytest.mark.isa
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spoilt", ["q", "k", "v", "grad"])
def test_bad_values_reach_only_what_names_them(spoilt: str, bad: float) -> None:
    """Query i names keys i, i + 1 and i + 5, where there are such."""
    index = torch.arange(40)[:, None] + torch.tensor([0, 1, 5])
    index = torch.where(index < 40, index, -1)[None, None]
    q, k, v = operands((1, 1, 1, 40, 40, 9, 9), torch.float32)
    seeds = [torch.randn(1, 1, 40, 9), torch.randn(1, 1, 40, 3)]

    def run(tensors: list[Tensor], seeds: list[Tensor]) -> list[Tensor]:
        leaves = differentiable(tensors)
        outputs = ops.indexed_attention(*leaves, index)
        return [outputs[0].detach(), *torch.autograd.grad(outputs, leaves, seeds)]  # type: ignore[union-attr]

    clean = run([q, k, v], seeds)
    tensors, bad_seeds = [q.clone(), k.clone(), v.clone()], [seeds[0].clone(), seeds[1]]
    (bad_seeds[0] if spoilt == "grad" else tensors["qkv".index(spoilt)])[0, 0, 20, 4] = bad
    found = run(tensors, bad_seeds)
    queries = [20] if spoilt in ("q", "grad") else [15, 19, 20]
    keys = sorted({i + n for i in queries for n in (0, 1, 5)})
    for a, b, limit in zip(found, clean, [queries] * 2 + [keys] * 2, strict=True):
        outside = torch.ones(40, dtype=torch.bool)
        outside[limit] = False
        assert torch.equal(a[..., outside, :], b[..., outside, :])
    assert any(not torch.isfinite(t).all() for t in found)


def test_without_weights() -> None:
    case = index_case((2, 2, 1, 40, 40, 8, 8), 8, torch.float32)
    q, k, v = differentiable(case.tensors[:3])
    index = case.tensors[3]
    assert index is not None
    expected, _ = ops.indexed_attention(q, k, v, index)
    output, none = ops.indexed_attention(q, k, v, index, return_weights=False)
    assert none is None and torch.equal(output, expected)
    ours, theirs = (torch.autograd.grad(o.sum(), (q, k, v)) for o in (output, expected))
    assert all(map(torch.equal, ours, theirs))
    with torch.no_grad():
        output, _ = ops.indexed_attention(q, k, v, index, return_weights=False)
        _, weights = torch.ops.seqmem.indexed_attention(q, k, v, index, None, 1.0, 0.0, None, False)
    assert torch.equal(output, expected) and weights.numel() == 0


EMPTY = [(2, 2, 1, 0, 5, 4, 3), (2, 2, 1, 5, 0, 4, 3), (2, 0, 1, 5, 5, 4, 3), (0, 2, 1, 5, 5, 4, 3)]


@pytest.mark.sanitize
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty(sizes: tuple[int, ...]) -> None:
    q, k, v = operands(sizes, torch.float64)
    for count in (0, 2):
        none = torch.full((1, 1, sizes[3], count), -1)
        case = case_of(Sample("own", (q, k, v, none)))
        compare(case.op, case.reference, case.tensors, case.tensors)
        output, weights = case.op(*case.tensors)
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
    whole = sf.Attention(16, 4, batch_first=True)
    whole.load_state_dict(layer.state_dict())
    causal = torch.ones(30, 30).bool().triu(1)
    padding = torch.arange(30) >= torch.tensor([[30], [20]])
    expected, dense = whole(x, x, x, padding, attn_mask=causal, average_attn_weights=False)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, dense.gather(-1, index.clamp(min=0)) * (index >= 0))
    layer.count = 3
    output, none, index = layer(x, x, x, need_weights=False)
    assert none is None and index.shape == (2, 4, 30, 3)
    with pytest.raises(ValueError, match="query with 3 dimensions"):
        layer(x[0], x[0], x[0])
    assert "count=3, is_causal=True" in repr(layer)


# ---- wrong arguments

B, HQ, HK, TQ, TK, D, DV = 2, 4, 2, 3, 5, 6, 7
z = torch.zeros


def arguments() -> dict[str, Any]:
    return {
        "q": z(B, HQ, TQ, D),
        "k": z(B, HK, TK, D),
        "v": z(B, HK, TK, DV),
        "index": z(1, HQ, TQ, 4).long(),
    }


def arguments_of_keys() -> dict[str, Any]:
    return {
        "q": z(B, HQ, TQ, D),
        "k": z(B, HK, TK, D),
        "count": 2,
        "key_end": torch.full((B, TQ), TK, dtype=torch.int32),
    }


BOTH = [
    Bad("q 3-D", {"q": z(HQ, TQ, D)}, ValueError, "q with 4 dimensions"),
    Bad("q features", {"q": z(B, HQ, TQ, D + 1)}, ValueError, r"k of shape \[2, 2, 5, 7\]"),
    Bad("q no features", {"q": z(B, HQ, TQ, 0)}, ValueError, "at least one feature"),
    Bad("q heads", {"q": z(B, 3, TQ, D)}, ValueError, "a multiple of k's 2 heads, got 3"),
    Bad("q integer", {"q": z(B, HQ, TQ, D).int()}, TypeError, "q of dtype float32"),
    Bad("q double", {"q": z(B, HQ, TQ, D).double()}, TypeError, "k of q's dtype Double"),
    Bad("q sparse", {"q": z(B, HQ, TQ, D).to_sparse()}, TypeError, "q to be a dense"),
    Bad("k no heads", {"k": z(B, 0, TK, D)}, ValueError, "k with at least one head"),
    Bad("k half", {"k": z(B, HK, TK, D).half()}, TypeError, "k of q's dtype Float, got Half"),
]
wrong_key = z(1, HQ, TQ, 4).long()
wrong_key[0, 3, 2, 3] = TK
ROWS = [
    *BOTH,
    Bad("v keys", {"v": z(B, HK, TK + 1, DV)}, ValueError, r"v of shape \[2, 2, 5, 7\]"),
    Bad("v dtype", {"v": z(B, HK, TK, DV).bfloat16()}, TypeError, "v of q's dtype"),
    Bad("index 3-D", {"index": z(HQ, TQ, 4).long()}, ValueError, "index with 4 dimensions"),
    Bad("index rows", {"index": z(3, 1, TQ, 4).long()}, ValueError, r"shape \[2, 1, 3, 4\]"),
    Bad("index heads", {"index": z(1, 2, TQ, 4).long()}, ValueError, r"shape \[1, 4, 3, 4\]"),
    Bad("index queries", {"index": z(1, 1, 4, 4).long()}, ValueError, r"shape \[1, 1, 3, 4\]"),
    Bad("index int", {"index": z(1, 1, TQ, 4).int()}, TypeError, "index of dtype int64"),
    Bad("index sparse", {"index": z(1, 1, TQ, 4).long().to_sparse()}, TypeError, "be a dense"),
    Bad("no such key", {"index": wrong_key}, ValueError, r"index in -1\.\.4, got 5", True),
    Bad("negative", {"index": wrong_key - 7}, ValueError, r"index in -1\.\.4, got -7", True),
    Bad("alpha", {"normalizer": "entmax", "alpha": 1.0}, ValueError, "1 < alpha", in_python=True),
    Bad(
        "dropout", {"dropout": 1.5, "seed": z(1).long()}, ValueError, r"dropout in 0\.\.1, got 1.5"
    ),
    Bad("seed type", {"dropout": 0.5, "seed": z(1)}, TypeError, "seed of dtype int64"),
    Bad("seeds", {"dropout": 0.5, "seed": z(2).long()}, ValueError, r"seed of shape \[1\]"),
]
ROWS_OF_KEYS = [
    *BOTH,
    Bad("count", {"count": 0}, ValueError, r"count in 1\.\.1048576, got 0"),
    Bad("count large", {"count": 2**40}, ValueError, r"count in 1\.\.1048576"),
    Bad("end dtype", {"key_end": z(B)}, TypeError, "key_end of dtype int64 or int32"),
    Bad("end rows", {"key_end": z(B + 1).int()}, ValueError, r"key_end of shape \[2\]"),
    Bad("end queries", {"key_end": z(B, TK).int()}, ValueError, r"key_end of shape \[2, 3\]"),
]


def call(**given: Any) -> tuple[Tensor | None, ...]:
    return ops.indexed_attention(**given)


def call_keys(q: Tensor, k: Tensor, **given: Any) -> tuple[Tensor | None, ...]:
    return ops.top_k_attention(q, k, k, **given)


class TestWrongArguments(HostileSuite):
    targets = (
        Target("indexed_attention", call, arguments, ROWS, ({}, {"return_weights": False})),
        Target("top_k_keys", call_keys, arguments_of_keys, ROWS_OF_KEYS),
    )
