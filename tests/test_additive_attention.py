"""Additive attention: the inherited suite, and edges of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_suite import (
    TOLERANCES,
    Case,
    OpSuite,
    check_against_float64,
    check_nothing_left_over,
    compare,
    error,
    values_and_gradients,
)
from peak_memory import growth_mib

from seqmem_fast import ops
from seqmem_fast.reference import additive_attention as reference

NAMES = [sample.name for sample in reference.sample_inputs()]


def case_of(sample: reference.Sample) -> Case:
    *_, mask = sample.args
    rows = (0, 0, 0, None, None if mask is None or sample.name == "broadcast" else 0)
    if sample.name == "broadcast":
        rows = (0, None, 0, None, None)
    return Case(ops.additive_attention, reference.additive_attention, sample.args, rows, (0, 0))


def plain_case(*sizes: int, dtype: torch.dtype = torch.float32, name: str = "plain") -> Case:
    """sizes = (B, Tq, Tk, A, Dv)."""
    samples = reference.sample_inputs(dtype=dtype, sizes=sizes)  # type: ignore[arg-type]
    return case_of(next(s for s in samples if s.name == name))


class TestAdditiveAttention(OpSuite):
    names = NAMES

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        samples = reference.sample_inputs(
            dtype=dtype, sizes=(2, 2, 3, 2, 2) if tiny else (3, 5, 7, 6, 4)
        )
        return case_of(next(s for s in samples if s.name == name))

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        tensors = self.case(name).tensors
        leaves = tuple(
            t.clone().requires_grad_() if t is not None and t.is_floating_point() else t
            for t in tensors
        )
        output, weights = torch.ops.seqmem.additive_attention(*tensors)
        mask = tensors[4]
        wanted = [True] * 4 + [mask is not None and mask.is_floating_point()]
        backward = (*map(torch.ones_like, (output, weights)), *tensors, weights, wanted)
        return [
            (torch.ops.seqmem.additive_attention.default, leaves),
            (torch.ops.seqmem.additive_attention_backward.default, backward),
        ]


# Around the widths of vectors and register blocks, and both sides of every split of work.
SIZES = [
    *((2, 3, 5, width, 4) for width in (1, 7, 8, 9, 16, 31)),
    *((2, queries, 9, 8, 4) for queries in (1, 2, 4, 15, 17, 33)),
    *((2, 3, keys, 8, 4) for keys in (1, 3, 4, 8, 17, 65)),
    *((2, 5, 6, 4, width) for width in (1, 8, 32, 45)),
    (1, 200, 130, 20, 40),
    (19, 70, 33, 8, 8),
    *((2, queries, keys, 5, 3) for queries, keys in ((8, 16), (9, 17), (23, 40), (16, 31))),
]


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_sizes(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    check_against_float64(plain_case(*sizes, dtype=dtype))


@pytest.mark.isa
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "sizes", [(2, 3, 5, 6, 3), (2, 17, 5, 6, 3), (1, 33, 41, 9, 11), (3, 203, 171, 10, 27)], ids=str
)
@pytest.mark.parametrize("name", ["plain", "masked", "added_mask"])
def test_nothing_is_left_over_from_an_earlier_call(
    name: str, sizes: tuple[int, ...], threads: int, restored_threads: None
) -> None:
    batch, queries, keys, width, value_width = sizes
    larger = (batch, queries, keys + 70, width + 40, value_width + 40)
    torch.set_num_threads(threads)
    check_nothing_left_over(plain_case(*sizes, name=name), plain_case(*larger, name=name))


@pytest.mark.isa
def test_long_rows() -> None:
    check_against_float64(plain_case(1, 130, 1100, 24, 16))


@pytest.mark.isa
@pytest.mark.parametrize("largest", [7, 12])
@pytest.mark.parametrize("copies", [1, 8])
def test_tanh_keeps_its_relative_accuracy(copies: int, largest: int) -> None:
    """Near zero and into saturation, read off the gradient of score_weight.

    With score_weight 0 and keys 0 and -2x all weights are equal, and tanh is x's and minus that, so
    that the gradient of the first keys' share is tanh(x) / 2. With several copies of all and
    projections up to 15 the kernels take tanh from factors.
    """
    x = torch.cat((torch.logspace(-30, -2, 57), torch.linspace(0.01, largest, 400)))
    for query in (x, -x):
        keys = torch.stack((torch.zeros_like(x), -2 * query)).repeat_interleave(copies, 0)
        score_weight = torch.zeros_like(x, requires_grad=True)
        queries = query.expand(copies, -1)
        _, weights = ops.additive_attention(queries, keys, keys, score_weight)
        share = weights[:, :copies].sum() / copies
        (grad,) = torch.autograd.grad(share, score_weight)
        rtol = 8e-7 if copies == 1 else 3e-6  # 128 terms are added up
        torch.testing.assert_close(2 * grad.double(), query.double().tanh(), rtol=rtol, atol=0)


@pytest.mark.isa
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0, 40.0])
def test_projections_of_any_size(scale: float) -> None:
    """Within the factors' range, astride its end (a few rows of one batch row only) and beyond."""
    case = plain_case(2, 40, 35, 12, 8)
    query, key = case.tensors[0] * scale, case.tensors[1] * scale
    query[0, 17, 3] = 16.0
    tensors = (query, key, *case.tensors[2:])
    check_against_float64(case._replace(tensors=tensors))


@pytest.mark.sanitize
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_no_keys_and_no_queries(mask: str | None) -> None:
    for queries, keys in ((3, 0), (0, 3), (0, 0)):
        case = plain_case(2, queries, keys, 5, 4)
        given = None if mask is None else torch.ones(queries, keys).to(getattr(torch, mask))
        tensors = (*case.tensors[:4], given)
        output, weights = case.op(*tensors)
        assert output.shape == (2, queries, 4) and weights.shape == (2, queries, keys)
        assert not output.any()
        compare(case.op, case.reference, tensors, tensors)


def test_no_features_means_uniform_weights() -> None:
    case = plain_case(2, 3, 5, 0, 4)
    _, weights = case.op(*case.tensors)
    torch.testing.assert_close(weights, torch.full((2, 3, 5), 0.2))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_row_without_any_key_is_uniform_and_teaches_nothing(dtype: torch.dtype) -> None:
    case = plain_case(2, 3, 5, 6, 4, dtype=dtype)
    query = case.tensors[0].requires_grad_()
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[1] = 0
    output, weights = case.op(query, *case.tensors[1:4], mask)
    torch.testing.assert_close(weights[:, 1], torch.full_like(weights[:, 1], 0.2))
    (grad,) = torch.autograd.grad(output[..., 0].sum(), query)
    assert not grad[:, 1].any() and grad[:, 0].any()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 1), (3, 1, 1), (1, 5, 7), (3, 1, 7)])
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_masks_broadcast(shape: tuple[int, ...], kind: torch.dtype) -> None:
    case = plain_case(3, 5, 7, 4, 4, dtype=torch.float64)
    mask = torch.randint(0, 3, shape).to(kind)
    compare(case.op, case.reference, (*case.tensors[:4], mask), (*case.tensors[:4], mask))


def test_a_mask_may_bring_the_batch() -> None:
    case = plain_case(1, 5, 7, 4, 4, dtype=torch.float64)
    tensors = (
        *(t if t.dim() < 3 else t[0] for t in case.tensors[:4]),
        torch.rand(3, 2, 5, 7) < 0.5,
    )
    assert case.op(*tensors)[0].shape == (3, 2, 5, 4)
    compare(case.op, case.reference, tensors, tensors)


@pytest.mark.isa
def test_minus_infinity_shuts_a_key_out_and_a_row_of_it_is_nan() -> None:
    case = plain_case(1, 2, 9, 4, 4)
    mask = torch.zeros(2, 9)
    mask[0, 3:], mask[1] = -torch.inf, -torch.inf
    output, weights = case.op(*case.tensors[:4], mask)
    assert (
        not weights[0, 0, 3:].any() and weights[0, 1].isnan().all() and output[0, 1].isnan().all()
    )
    torch.testing.assert_close(weights[0, 0].sum(), torch.tensor(1.0))


def test_masked_scores_cost_no_denormals() -> None:
    """exp(-1e9 - top) is exactly zero."""
    case = plain_case(1, 3, 40, 8, 4)
    mask = torch.arange(40) % 2 == 0
    _, weights = case.op(*case.tensors[:4], mask)
    assert not weights[..., 1::2].any()


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("sizes", [(5, 130, 70, 33, 20), (1, 300, 90, 16, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_large_same_bits_at_any_thread_count(
    sizes: tuple[int, ...], dtype: torch.dtype, restored_threads: None
) -> None:
    case = plain_case(*sizes, dtype=dtype)
    runs = []
    for threads in (1, 2, 3, 4, 2):
        torch.set_num_threads(threads)
        runs.append(values_and_gradients(case.op, case.tensors))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_extreme_projections_saturate() -> None:
    values = torch.tensor([-1e30, -100.0, -9.5, 0.0, 9.5, 100.0, 1e30])
    query, key = (
        values[:, None].expand(7, 3).contiguous(),
        values[:, None].expand(7, 3).contiguous(),
    )
    args = (query, key, key.clamp(-1, 1), torch.tensor([1.0, -2.0, 0.5]))
    for ours, exact in zip(
        ops.additive_attention(*args),
        reference.additive_attention(*(a.double() for a in args)),
        strict=True,
    ):
        assert torch.isfinite(ours).all() and error(ours, exact) < 1e-6


@pytest.mark.slow
def test_memory_grows_with_the_weights_alone() -> None:
    """A training step at A = 256 fits where the [B, Tq, Tk, A] intermediates would take 2 GiB."""
    definitions = """
import torch
from seqmem_fast import ops
def step(queries, keys):
    shapes = ((queries, 256), (keys, 256), (keys, 64), (256,))
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    ops.additive_attention(*leaves)[0].sum().backward()
"""
    # The weights and the like are 8 MiB each.
    assert growth_mib(definitions, "step(8, 8)", "step(1024, 2048)") < 64
