"""Additive attention: the inherited suites, edges of its own, and the module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from attention_suite import AttentionSuite, wrong_operands
from hostile_suite import Bad, HostileSuite, Target, check_refused_by_module
from op_suite import (
    TOLERANCES,
    Case,
    Threaded,
    check_against_float64,
    check_nothing_left_over,
    check_same_bits_at_any_thread_count,
    differentiable,
    error,
)
from peak_memory import growth_mib
from torch import Tensor

import seqmem_fast as sf
from seqmem_fast import ops
from seqmem_fast.reference import additive_attention as reference
from seqmem_fast.reference.common import Sample

NAMES = [sample.name for sample in reference.sample_inputs()]


def case_of(sample: Sample) -> Case:
    *_, mask = sample.args
    rows = (0, 0, 0, None, None if mask is None or sample.name == "broadcast" else 0)
    if sample.name == "broadcast":
        rows = (0, None, 0, None, None)
    return Case(ops.additive_attention, reference.additive_attention, sample.args, rows, (0, 0))


def plain_case(*sizes: int, dtype: torch.dtype = torch.float32, name: str = "plain") -> Case:
    """sizes = (B, Tq, Tk, A, Dv)."""
    samples = reference.sample_inputs(dtype=dtype, sizes=sizes)  # type: ignore[arg-type]
    return case_of(next(s for s in samples if s.name == name))


def threaded() -> Threaded:
    """Calls below and above the size at which one takes several threads."""
    cases = plain_case(1, 3, 9, 8, 8), plain_case(4, 48, 64, 16, 16)
    return [(case.op, case.tensors) for case in cases]


class TestAdditiveAttention(AttentionSuite):
    names = NAMES
    op = staticmethod(ops.additive_attention)
    reference = staticmethod(reference.additive_attention)

    def operands(self, *batch: int, sizes: Sequence[int] = (5, 7, 4, 3)) -> tuple[Tensor, ...]:
        score_weight = torch.randn(sizes[2], dtype=torch.float64)
        return (*super().operands(*batch, sizes=sizes), score_weight)

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        sizes = (2, 2, 3, 2, 2) if tiny else (3, 5, 7, 6, 4)
        return plain_case(*sizes, dtype=dtype, name=name)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        tensors = self.case(name).tensors
        leaves = tuple(differentiable(tensors))
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
    check_same_bits_at_any_thread_count(plain_case(*sizes, dtype=dtype))


def test_extreme_projections_saturate() -> None:
    values = torch.tensor([-1e30, -100.0, -9.5, 0.0, 9.5, 100.0, 1e30])
    query, key = values[:, None].repeat(2, 1, 3)
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


# ---- wrong arguments

B, TQ, TK, A, DV = 2, 3, 4, 5, 6
z = torch.zeros


def arguments() -> dict[str, Any]:
    return {
        "query": z(B, TQ, A),
        "key": z(B, TK, A),
        "value": z(B, TK, DV),
        "score_weight": z(A),
        "mask": z(B, TQ, TK).bool(),
    }


ROWS = [
    *wrong_operands(arguments()),
    Bad("score_weight size", {"score_weight": z(4)}, ValueError, r"score_weight of shape \[5\]"),
    Bad("score_weight 2-D", {"score_weight": z(1, A)}, ValueError, r"score_weight of shape \[5\]"),
    Bad("score_weight dtype", {"score_weight": z(A).bfloat16()}, TypeError, "score_weight"),
    Bad("score_weight integer", {"score_weight": z(A).long()}, TypeError, "score_weight"),
]


class TestHostile(HostileSuite):
    targets = (Target("additive_attention", ops.additive_attention, arguments, ROWS),)


# ---- the module

QUERY, KEY = 7, 8


def module(dtype: torch.dtype = torch.float64) -> sf.AdditiveAttention:
    torch.manual_seed(1)
    return sf.AdditiveAttention(QUERY, KEY, A, dtype=dtype)


def inputs(*batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((*batch, 3, QUERY), (*batch, 4, KEY), (*batch, 4, 2))
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_it_is_bahdanaus_formula(batch: tuple[int, ...]) -> None:
    attention, (s, h, value) = module(), inputs(*batch)
    mask = torch.rand(*batch, 3, 4) < 0.7
    output, weights = attention(s, h, value, mask)
    e = torch.zeros(*batch, 3, 4, dtype=s.dtype)
    for i in range(3):
        for j in range(4):
            hidden = torch.tanh(
                s[..., i, :] @ attention.query_proj.weight.t()
                + h[..., j, :] @ attention.key_proj.weight.t()
            )
            e[..., i, j] = hidden @ attention.score_weight
    expected = e.masked_fill(~mask, -1e9).softmax(-1)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(output, expected @ value)


def test_keys_projected_once_give_the_same() -> None:
    attention, (s, h, value) = module(), inputs(2)
    whole = attention(s, h, value)
    keys = attention.project_keys(h)
    for i in range(3):
        step = attention(s[:, i : i + 1], keys, value, keys_projected=True)
        torch.testing.assert_close(step, tuple(t[:, i : i + 1] for t in whole))


def test_every_parameter_learns() -> None:
    attention, given = module(), inputs(2)
    output, weights = attention(*given)
    (output.square().sum() + weights.square().sum()).backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_parameters_and_their_bounds() -> None:
    attention = sf.AdditiveAttention(16, 25, 100)
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    assert shapes == {
        "score_weight": (100,),
        "query_proj.weight": (100, 16),
        "key_proj.weight": (100, 25),
    }
    for parameter, bound in zip(attention.parameters(), (0.1, 0.25, 0.2), strict=True):
        assert 0.8 * bound < float(parameter.detach().abs().max()) <= bound
    assert repr(attention).startswith("AdditiveAttention(\n  16, 25, 100\n")


@pytest.mark.slow
def test_compiled_exported_copied_pickled_and_loaded() -> None:
    attention, given = module(), inputs(2)
    expected = attention(*given)
    other = sf.AdditiveAttention(QUERY, KEY, A, dtype=torch.float64)
    other.load_state_dict(attention.state_dict())
    for same in (
        torch.compile(attention, fullgraph=True, backend="aot_eager"),
        torch.export.export(attention, given).module(),
        copy.deepcopy(attention),
        pickle.loads(pickle.dumps(attention)),
        other,
    ):
        torch.testing.assert_close(same(*given), expected)


def test_autocast_and_vmap() -> None:
    attention, given = module(torch.float32), inputs(2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = attention(*given)
    assert output.dtype == weights.dtype == torch.bfloat16
    expected = attention(*given)
    torch.testing.assert_close(weights.float(), expected[1], atol=0.02, rtol=0.02)
    torch.testing.assert_close(torch.vmap(attention)(*given), expected)


@pytest.mark.slow
def test_it_trains() -> None:
    """Learns to pick the key that equals the query."""
    torch.manual_seed(0)
    attention = sf.AdditiveAttention(4, 4, 32)
    optimizer = torch.optim.Adam(attention.parameters(), lr=0.02)
    keys = torch.eye(4)
    losses = []
    for _ in range(150):
        _, weights = attention(keys, keys, keys)
        loss = -weights.diagonal().log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 1.2 and losses[-1] < 0.1


single = partial(module, torch.float32)
MODULE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no width": (lambda: sf.AdditiveAttention(7, 0, A), ValueError, "key_dim > 0, got 0"),
    "query is a list": (lambda: single()([], z(B, TK, 8), z(B, TK, DV)), TypeError, "query to be"),
    "key is None": (lambda: single()(z(B, TQ, 7), None, z(B, TK, DV)), TypeError, "key to be"),
    "query width": (
        lambda: single()(z(B, TQ, 6), z(B, TK, 8), z(B, TK, DV)),
        ValueError,
        r"query of shape \[..., T, 7\], got \[2, 3, 6\]",
    ),
    "query 1-D": (lambda: single()(z(7), z(B, TK, 8), z(B, TK, DV)), ValueError, "query of shape"),
    "key width": (lambda: single()(z(TQ, 7), z(TK, 7), z(TK, DV)), ValueError, "key of shape"),
    "key dtype": (
        lambda: single()(z(TQ, 7), z(TK, 8).double(), z(TK, DV)),
        TypeError,
        "key of dtype torch.float32, got torch.float64",
    ),
    "projected key width": (
        lambda: single()(z(TQ, 7), z(TK, 8), z(TK, DV), keys_projected=True),
        ValueError,
        "key of shape",
    ),
}


@pytest.mark.parametrize("name", MODULE)
def test_module_refuses(name: str) -> None:
    check_refused_by_module(*MODULE[name])
