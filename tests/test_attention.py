"""The attention op: the inherited suite, and edges of its own."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from attention_suite import MASKS, AttentionSuite, wrong_operands
from hostile_suite import Bad, HostileSuite, Target
from op_suite import (
    TOLERANCES,
    Case,
    Function,
    Threaded,
    check_against_float64,
    check_nothing_left_over,
    check_same_bits_at_any_thread_count,
    compare,
    error,
    sample_of,
)
from torch import Tensor

from seqmem_fast import ops
from seqmem_fast.reference import attention as reference
from seqmem_fast.reference.common import ALPHAS, Sample

NAMES = [sample.name for sample in reference.sample_inputs()]


def case_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Case:
    """attention of positional tensors; batch rows only where all arguments have them."""

    def bind(function: Any) -> Function:
        return lambda *tensors: function(*tensors, **kwargs)

    query, mask = args[0], args[3]
    rows: list[tuple[int | None, ...]] = [(0, 0, 0, None), (0, 0)]
    if mask is not None and mask.size(0) == query.size(0):
        rows[0] = (0, 0, 0, 0)
    if query.dim() > 3:
        rows = [(None,) * 4, (None,) * 2]
    return Case(bind(ops.attention), bind(reference.attention), args, *rows)


def options_of(sample: Sample) -> tuple[float | None, bool, float]:
    """What the op takes after its tensors."""
    given = sample.kwargs
    alpha = ALPHAS.get(given.get("normalizer", "softmax"), given.get("alpha"))
    return given.get("scale"), given.get("is_causal", False), alpha


def threaded() -> Threaded:
    """Calls below and above the size at which one takes several threads."""
    sizes = (1, 3, 9, 8, 8), (4, 96, 128, 32, 32)
    samples = [next(iter(reference.sample_inputs(sizes=one))) for one in sizes]
    return [(ops.attention, sample.args) for sample in samples]


class TestAttention(AttentionSuite):
    names = NAMES
    op = staticmethod(ops.attention)
    reference = staticmethod(reference.attention)
    options = ({}, {"is_causal": True})

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        sizes = (2, 3, 2, 2, 3) if tiny else (3, 5, 7, 4, 6)
        sample = sample_of(reference, name, dtype=dtype, sizes=sizes)
        return case_of(sample.args, sample.kwargs)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        sample = sample_of(reference, name, dtype=torch.float64)
        options = options_of(sample)
        leaves = tuple(
            t.clone().requires_grad_() if t is not None and t.is_floating_point() else t
            for t in sample.args
        )
        output, weights = torch.ops.seqmem.attention(*sample.args, *options)
        ones = torch.ones_like(output), torch.ones_like(weights)
        wanted = [True, True, True, leaves[3] is not None and leaves[3].is_floating_point()]
        return [
            (torch.ops.seqmem.attention.default, (*leaves, *options)),
            (
                torch.ops.seqmem.attention_backward.default,
                (*ones, *sample.args, weights, *options, wanted),
            ),
        ]


def plain_case(
    batch: int, queries: int, keys: int, width: int, value_width: int, dtype: torch.dtype, name: str
) -> Case:
    sizes = (batch, queries, keys, width, value_width)
    samples = reference.sample_inputs(dtype=dtype, sizes=sizes)
    return next(case_of(s.args, s.kwargs) for s in samples if s.name == name)


# Around the widths of vectors, tiles, panels and blocks of rows, and both sides of packing.
SIZES = [
    *((2, 9, keys, 5, 3) for keys in (1, 2, 7, 8, 9, 15, 31, 32, 33, 63, 65, 129)),
    *((2, queries, 10, 5, 8) for queries in (1, 2, 3, 4, 7, 8, 23, 24, 25, 49, 97)),
    *((1, 9, 11, width, width) for width in (1, 2, 3, 8, 17, 31, 32, 33, 65)),
    (2, 3, 40, 24, 16),
    (1, 200, 170, 16, 8),
    (1, 26, 1100, 8, 40),
    (2, 100, 150, 12, 20),
]


@pytest.mark.isa
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_sizes(sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    for name in ("masked", "added_mask", "causal"):
        check_against_float64(plain_case(*sizes, dtype, name), name)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize(("keys", "width"), [(41, 19), (90, 77), (33, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_few_queries_read_keys_and_values_in_place(
    queries: int, keys: int, width: int, dtype: torch.dtype
) -> None:
    """Rows that are no whole vectors, NaN between them; an infinite feature counts once."""
    query = torch.rand(2, queries, width, dtype=dtype) + 0.5
    around = torch.full((2, 2, keys, width + 3), float("nan"), dtype=dtype)
    around[..., :width] = torch.randn(2, 2, keys, width)
    for feature in range(width):
        around[0, 0, feature, feature] = -float("inf")
    key, value = around[..., :width]
    exact = reference.attention(query.double(), key.double(), value.double())
    for got, want in zip(ops.attention(query, key, value), exact, strict=True):
        assert want.isfinite().all()
        assert error(got, want) <= TOLERANCES[dtype].output


@pytest.mark.isa
@pytest.mark.parametrize("sizes", [(1, 300, 130, 32, 16), (5, 70, 90, 24, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_same_bits_at_any_thread_count(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, restored_threads: None
) -> None:
    for name in ("masked", "causal"):
        case = plain_case(*sizes, dtype, name)
        check_same_bits_at_any_thread_count(case)


LEFT_OVER = [
    (2, 3, 5, 6, 3),
    (2, 50, 5, 6, 3),
    (2, 49, 33, 9, 32),
    (3, 203, 171, 42, 27),  # several threads
    (3, 840, 840, 5, 3),  # weights in reused memory
]


@pytest.mark.isa
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sizes", LEFT_OVER, ids=str)
@pytest.mark.parametrize("name", ["plain", "masked", "added_mask", "causal"])
def test_nothing_is_left_over_from_an_earlier_call(
    name: str, sizes: tuple[int, int, int, int, int], threads: int, restored_threads: None
) -> None:
    batch, queries, keys, width, value_width = sizes
    larger = (batch, queries, keys + 70, width + 40, value_width + 40)
    torch.set_num_threads(threads)
    check_nothing_left_over(
        plain_case(*sizes, torch.float32, name), plain_case(*larger, torch.float32, name)
    )


def operands(*leading: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*leading, *size, dtype=dtype) for size in ((5, 4), (7, 4), (7, 3)))


def test_large_results_are_tensors_like_any_other() -> None:
    """They are stored in memory that is reused once nobody holds them any more."""
    query, key, value = (torch.randn(8, 512, 8) for _ in range(3))
    _, weights = ops.attention(query, key, value)
    seen = weights.clone()
    part = weights[1]
    del weights
    _, other = ops.attention(key, query, value)  # not where `part` is
    assert torch.equal(part, seen[1])
    assert torch.equal(copy.deepcopy(part), seen[1])
    kept = other.clone()
    assert torch.equal(other.resize_(16, 512, 512)[:8], kept)
    del part, other
    assert torch.equal(ops.attention(query, key, value)[1], seen)


@pytest.mark.sanitize
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["none", *MASKS])
def test_without_weights(name: str, is_causal: bool) -> None:
    """torch's own op gives the same outputs and gradients, rows without keys included."""
    mask = None if name == "none" else MASKS[name]()
    tensors = (*operands(2, 3), mask)

    def bind(return_weights: bool) -> Function:
        options = {"is_causal": is_causal, "return_weights": return_weights, "scale": 0.4}
        return lambda *args: ops.attention(*args, **options)[:1]

    assert ops.attention(*tensors, return_weights=False)[1] is None
    compare(bind(False), bind(True), tensors, tensors)


@pytest.mark.parametrize("leading", [(), (2,), (2, 1, 3)], ids=str)
def test_without_weights_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    tensors = operands(*leading)
    mask = torch.rand(5, 7) < 0.5
    mask[2] = False
    expected, _ = ops.attention(*tensors, mask)
    torch.testing.assert_close(ops.attention(*tensors, mask, return_weights=False)[0], expected)


@pytest.mark.sanitize
@pytest.mark.parametrize("return_weights", [True, False])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_row_without_keys_is_uniform(is_causal: bool, return_weights: bool) -> None:
    """Its gradient goes to the values alone."""
    q, k, v = (t.requires_grad_() for t in operands(2))
    mask = torch.zeros(5, 7, dtype=torch.bool)
    output, weights = ops.attention(
        q, k, v, mask, is_causal=is_causal, return_weights=return_weights
    )
    seen = torch.arange(1, 6) if is_causal else torch.full((5,), 7)
    uniform = (torch.arange(7) < seen[:, None]) / seen[:, None].double()
    torch.testing.assert_close(output, uniform @ v)
    if return_weights:
        torch.testing.assert_close(weights, uniform.expand(2, 5, 7))
    (output * torch.randn(2, 5, 3)).sum().backward()
    assert not q.grad.any() and not k.grad.any() and v.grad.any()


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_far_apart(dtype: torch.dtype) -> None:
    """Beyond the range of exp, in both directions; what underflows is zero, never denormal."""
    key = torch.tensor([0.0, -50.0, -86.0, -95.0, -103.0, -700.0, -740.0, -1e4, -1e30], dtype=dtype)
    query = torch.tensor([[1.0], [-1.0]], dtype=dtype)
    value = torch.eye(9, dtype=dtype)
    ours = ops.attention(query, key[:, None], value)
    exact = reference.attention(query.double(), key[:, None].double(), value.double())
    tiny = torch.finfo(dtype).tiny
    for a, b in zip(ours, exact, strict=True):
        assert (((a.double() - b).abs() <= 1e-5 * b.abs()) | (b <= 20 * tiny)).all()
        assert not ((a > 0) & (a < tiny)).any()


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "shape", [(2, 0, 7, 4, 3), (2, 5, 0, 4, 3), (0, 5, 7, 4, 3), (2, 5, 7, 4, 0)]
)
def test_empty_without_weights(shape: tuple[int, int, int, int, int]) -> None:
    batch, queries, keys, width, values = shape
    shapes = (batch, queries, width), (batch, keys, width), (batch, keys, values)
    output, _ = ops.attention(*map(torch.randn, shapes), return_weights=False)
    assert output.shape == (batch, queries, values)
    assert keys or not output.any()


NORMALIZERS = {"sparsemax": 1.5, "entmax15": 1.5, "entmax": 1.3}


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_other_normalizers(normalizer: str) -> None:
    options: dict[str, Any] = {"normalizer": normalizer, "alpha": NORMALIZERS[normalizer]}
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for sample in reference.sample_inputs(dtype=dtype):
            wide = [
                a.double() if a is not None and a.is_floating_point() else a for a in sample.args
            ]
            both = {**sample.kwargs, **options}
            right = reference.attention(*wide, **both)
            ours = ops.attention(*sample.args, **both)
            for a, b in zip(ours, right, strict=True):
                assert a is not None and b is not None and a.dtype == dtype
                assert (a.double() - b).abs().max() <= bound * max(1.0, float(b.abs().max()))
            alone, none = ops.attention(*sample.args, **both, return_weights=False)
            assert none is None and torch.equal(alone, ours[0])


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradients_of_other_normalizers(normalizer: str) -> None:
    given = tuple((0.5 * t).requires_grad_() for t in operands(2))
    mask = torch.arange(given[1].size(-2)) < 3
    alpha = NORMALIZERS[normalizer]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ops.attention(q, k, v, mask, normalizer=normalizer, alpha=alpha)

    assert torch.autograd.gradcheck(call, given)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("alpha", [1.05, 1.3, 1.5, 2.0])
@pytest.mark.parametrize("sharpness", [0.02, 1.0, 8.0])
def test_few_or_many_keys_of_weight(
    sharpness: float, alpha: float, dtype: torch.dtype, bound: float
) -> None:
    """Blocks of rows whose weights are nearly all zero are computed in another way."""
    q, k, v = (torch.randn(2, n, 17, dtype=torch.float64) for n in (60, 83, 83))
    added = (sharpness * torch.randn(60, 83, dtype=torch.float64)).requires_grad_()
    seen = torch.rand(2, 60, 83) < 0.8
    seen[:, 5] = False
    options: dict[str, Any] = {"normalizer": "entmax", "alpha": alpha, "scale": sharpness}
    for causal, mask in ((False, added), (True, seen), (False, None)):
        options["is_causal"] = causal
        wide = [t.detach().requires_grad_() for t in (q, k, v)]
        if mask is added:
            wide.append(added)
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in wide]
        right = reference.attention(*wide[:3], mask, **options)
        ours = ops.attention(*leaves[:3], leaves[3] if mask is added else mask, **options)
        seeds = [torch.randn_like(a) for a in right]
        for a, b in zip(ours, right, strict=True):
            assert error(a, b) <= bound
        torch.autograd.backward(right, seeds)
        torch.autograd.backward(ours, [seed.to(dtype) for seed in seeds])
        for a, b in zip(leaves, wide, strict=True):
            assert error(a.grad, b.grad) <= 10 * bound
        added.grad = None


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_nothing_leaves_its_row_with_other_normalizers(normalizer: str) -> None:
    """Rows of -inf have no weights, NaN fills its row, whatever else is in it."""
    q, k, v = (t.float() for t in operands())
    mask = torch.zeros(5, 7)
    clean, _ = ops.attention(q, k, v, mask, normalizer=normalizer)
    mask[1], mask[2], mask[2, 3], mask[3, 6] = -math.inf, -math.inf, math.nan, math.nan
    output, weights = ops.attention(q, k, v, mask, normalizer=normalizer)
    assert not output[1].any() and not weights[1].any()
    assert output[2:4].isnan().all() and weights[2:4].isnan().all()
    assert torch.equal(output[[0, 4]], clean[[0, 4]])


def test_learned_alpha() -> None:
    """One for each head, differentiable; weights have exact zeros."""
    q, k, v = operands(2, 3)
    alpha = torch.tensor([1.2, 1.5, 2.0], dtype=torch.float64)[:, None, None].requires_grad_()
    output, weights = ops.attention(q, k, v, normalizer="entmax", alpha=alpha)
    twin = reference.attention(q, k, v, normalizer="entmax", alpha=alpha)[0]
    assert torch.allclose(output, twin) and (weights[:, 2] == 0).any()
    ours, right = (torch.autograd.grad(o.square().sum(), alpha)[0] for o in (output, twin))
    assert torch.allclose(ours, right) and ours.all()


def test_learned_alpha_under_autocast() -> None:
    """Scores are as exact as with a number, and results have its dtypes."""
    q, k, v = (t.float() for t in operands(2))
    with torch.autocast("cpu", torch.bfloat16):
        learned = ops.attention(q, k, v, normalizer="entmax", alpha=torch.tensor(1.4))
        number = ops.attention(q, k, v, normalizer="entmax", alpha=1.4)
    exact = reference.attention(q, k, v, normalizer="entmax", alpha=1.4)
    for a, b, c in zip(learned, number, exact, strict=True):
        assert a is not None and b is not None and c is not None
        assert a.dtype == b.dtype == torch.bfloat16
        assert error(a, c) <= 1e-2


def test_normalizers_are_checked() -> None:
    q, k, v = operands()
    with pytest.raises(TypeError, match="expected alpha to be a number with normalizer entmax15"):
        ops.attention(q, k, v, normalizer="entmax15", alpha=torch.tensor(1.5))
    with pytest.raises(ValueError, match="seqmem::attention: expected normalizer softmax, spars"):
        ops.attention(q, k, v, normalizer="hardmax")
    with pytest.raises(ValueError, match="seqmem::attention: expected alpha with 1 < alpha <= 2"):
        ops.attention(q, k, v, normalizer="entmax", alpha=1.0)
    with pytest.raises(ValueError, match="seqmem::attention: expected key of shape"):
        ops.attention(q, k[..., 1:], v, normalizer="sparsemax")
    with pytest.raises(ValueError, match="seqmem::attention: expected normalizer"):
        torch.func.grad(lambda q: ops.attention(q, k, v, normalizer="hardmax")[0].sum())(q)


def test_other_normalizers_under_func() -> None:
    q, k, v = (t.requires_grad_() for t in operands())

    def loss(q: Tensor) -> Tensor:
        return ops.attention(q, k, v, normalizer="entmax15")[0].square().sum()

    assert torch.allclose(torch.func.grad(loss)(q), torch.autograd.grad(loss(q), q)[0])


@pytest.mark.slow
def test_other_normalizers_compile() -> None:
    call = torch.compile(ops.attention, backend="aot_eager", fullgraph=True)
    q, k, v = operands()
    expected = ops.attention(q, k, v, normalizer="entmax15")
    for a, b in zip(call(q, k, v, normalizer="entmax15"), expected, strict=True):
        assert torch.allclose(a, b)


def test_the_usual_example() -> None:
    """Shapes and sums that the example prints."""
    query, key, value = (torch.randn(2, 4, 8) for _ in range(3))
    output, weights = ops.attention(query, key, value)
    assert output.shape == (2, 4, 8) and weights.shape == (2, 4, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4))


def test_gradient_penalty_through_the_weights() -> None:
    """A loss on the gradient of a loss on the weights."""
    found = []
    for op in (ops.attention, reference.attention):
        torch.manual_seed(0)
        q, k, v = (t.requires_grad_() for t in operands(2))
        _, weights = op(q, k, v)
        (grad,) = torch.autograd.grad(weights.square().sum(), q, create_graph=True)
        grad.square().sum().backward()
        found.append((q.grad, k.grad))
    torch.testing.assert_close(*found)


# ---- wrong arguments

BATCH, QUERIES, KEYS, WIDTH, VALUES = 3, 4, 5, 6, 2
z = torch.zeros


def arguments() -> dict[str, Any]:
    return {
        "query": z(BATCH, QUERIES, WIDTH),
        "key": z(BATCH, KEYS, WIDTH),
        "value": z(BATCH, KEYS, VALUES),
        "mask": z(BATCH, QUERIES, KEYS).bool(),
    }


ROWS = [
    *wrong_operands(arguments()),
    Bad("query width 0", {"query": z(3, 4, 0)}, ValueError, "query with at least one feature"),
    Bad("value outer", {"query": z(2, 3, 4, 6), "value": z(4, 3, 5, 2)}, ValueError, "value .*bro"),
    Bad("one query", {"query": z(3, 1, 6), "mask": z(3, 4, 5)}, ValueError, "mask that broadcasts"),
]


class TestHostile(HostileSuite):
    variants = ({}, {"return_weights": False})
    targets = (Target("attention", ops.attention, arguments, ROWS, variants),)
