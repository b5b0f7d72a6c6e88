"""The dynamic memory op: the inherited suite, and edges of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hostile_suite import Bad, HostileSuite, Target
from hypothesis import given, settings
from hypothesis import strategies as st
from op_suite import (
    TOLERANCES,
    Case,
    Function,
    OpSuite,
    Threaded,
    check_against_float64,
    check_same_bits_at_any_thread_count,
    differentiable,
    sample_of,
)
from torch import Tensor

from seqmem_fast import ops
from seqmem_fast.reference import dynamic_memory as reference

NAMES = [sample.name for sample in reference.sample_inputs()]


def make_case(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Case:
    """Of positional tensors: query, memory, four weights, score_query, mask."""
    tensors = (*args[:6], kwargs.get("score_query"), kwargs.get("mask"))
    hops = args[6] if len(args) > 6 else 3
    returned = kwargs.get("return_memory", True)

    def bind(function: Any) -> Function:
        def call(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            *rest, score_query, mask = tensors
            options = {"score_query": score_query, "mask": mask, "return_memory": returned}
            final, attention = function(*rest, hops, **options)
            return (final, attention) if returned else (attention,)

        return call

    own = 0 if args[1].dim() == 3 else None
    batch_in = (0, own, None, None, None, None, 0, 0)
    return Case(
        bind(ops.dynamic_memory),
        bind(reference.dynamic_memory),
        tensors,
        batch_in,
        (0, 1) if returned else (1,),
    )


def threaded() -> Threaded:
    """Calls below and above the size at which one takes several threads."""
    sizes = (2, 9, 8, 8), (32, 256, 32, 32)
    cases = [make_case(next(iter(reference.sample_inputs(sizes=one))).args, {}) for one in sizes]
    return [(case.op, case.tensors) for case in cases]


class TestDynamicMemory(OpSuite):
    names = NAMES

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        sizes = (2, 3, 2, 3) if tiny else (4, 9, 6, 5)
        sample = sample_of(reference, name, dtype=dtype, sizes=sizes)
        return make_case(sample.args, sample.kwargs)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        sample = sample_of(reference, name, dtype=torch.float64)
        tensors = make_case(sample.args, sample.kwargs).tensors
        hops = sample.args[6] if len(sample.args) > 6 else 3
        leaves = tuple(differentiable(tensors))
        op = torch.ops.seqmem.dynamic_memory
        final, attention, saved = op(*tensors, hops, True, True)
        seeds = torch.ones_like(final), torch.ones_like(attention)
        return [
            (op.default, (*leaves, hops, True, False)),
            (op.default, (*leaves, hops, False, False)),
            (
                torch.ops.seqmem.dynamic_memory_backward.default,
                (*seeds, *tensors, attention, saved, [True] * 4),
            ),
        ]


def plain_case(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, name: str = "shared", hops: int = 3
) -> Case:
    """Of that name, with the final memory; "unmasked" is per_sample_masked without its mask."""
    samples = {s.name: s for s in reference.sample_inputs(dtype=dtype, sizes=sizes)}
    sample = samples["per_sample_masked" if name == "unmasked" else name]
    options = {k: v for k, v in sample.kwargs.items() if k == "score_query" or name != "unmasked"}
    return make_case((*sample.args[:6], hops), {**options, "return_memory": True})


# Around the widths of vectors, panels and row blocks, and both sides of every choice of kernel.
SIZES = [
    *((5, 12, m, 3) for m in (1, 7, 9, 16, 33, 130)),
    *((b, 20, 8, 8) for b in (1, 2, 3, 4, 25, 101)),
    *((6, n, 8, 5) for n in (1, 15, 31, 33, 65, 300)),
    *((4, 10, 6, h) for h in (1, 17, 130)),
]


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_sizes(dtype: torch.dtype) -> None:
    for k, sizes in enumerate(SIZES):
        for name in ("projected", ("per_sample_masked", "unmasked")[k % 2]):
            check_against_float64(plain_case(sizes, dtype, name, 2), f"{name} {sizes}")


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True, print_blob=True)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40)),
    st.integers(1, 4),
    st.sampled_from(["projected", "per_sample_masked", "unmasked"]),
)
def test_any_configuration(sizes: tuple[int, int, int, int], hops: int, name: str) -> None:
    torch.manual_seed(0)
    check_against_float64(plain_case(sizes, torch.float32, name, hops), f"{sizes} {hops}")


@pytest.mark.isa
@pytest.mark.parametrize("name", ["shared", "unmasked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_same_bits_at_any_thread_count(
    name: str, dtype: torch.dtype, restored_threads: None
) -> None:
    check_same_bits_at_any_thread_count(plain_case((37, 200, 64, 64), dtype, name))


@pytest.mark.parametrize("name", ["shared", "per_sample_masked"])
@pytest.mark.parametrize("shape", ["all", "slots", "rows", "transposed", "columns"])
def test_gradients_of_the_memory_by_any_strides(name: str, shape: str) -> None:
    """Expanded or transposed, as sums and permutations after the op make them."""
    case = plain_case((5, 12, 8, 8), torch.float64, name)

    def loss(final: Tensor) -> Tensor:
        if shape == "transposed":
            weight = torch.arange(8.0)[:, None, None] + torch.arange(12.0)[:, None]
            return (final.permute(2, 1, 0).contiguous() * weight).sum()
        if shape == "all":
            return final.sum()
        dims = {"slots": 1, "rows": 0, "columns": 2}
        return final.sum(dims[shape]).square().sum()

    found = []
    for op in (case.op, case.reference):
        leaves = differentiable(case.tensors)
        loss(op(*leaves)[0]).backward()
        found.append([leaf.grad for leaf in leaves if leaf is not None and leaf.requires_grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_an_expanded_gradient_is_not_copied() -> None:
    """The gradient of a sum is one number, however many elements it stands for."""
    args = reference.sample_inputs(sizes=(1, 3, 4, 4))
    query, memory, *weights = next(iter(args)).args
    query, memory = query.expand(2, 4), memory.repeat(2**16, 1).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        final, _ = ops.dynamic_memory(query, memory, *weights, 1)
        final.sum().backward()
    copies = [event for event in profile.events() if event.name in ("aten::copy_", "aten::clone")]
    assert all(event.cpu_memory_usage < 2**20 for event in copies)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("filler", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [2, 9])
def test_masked_slots_are_never_read(rows: int, filler: float) -> None:
    case = plain_case((rows, 20, 8, 5), torch.float32, "per_sample_masked")
    query, memory, *weights, score, mask = case.tensors
    mask[-1] = False  # a row without slots
    results = []
    for value in (0.0, filler):
        spoiled = torch.where(mask[..., None], memory, value).requires_grad_()
        _, attention = ops.dynamic_memory(query, spoiled, *weights, score_query=score, mask=mask)
        (grad,) = torch.autograd.grad(attention.square().sum(), spoiled)
        results.append((attention, grad))
        assert not attention.masked_select(~mask).any() and not attention[:, -1].any()
        assert not grad.masked_select(~mask[..., None]).any()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_hops() -> None:
    case = plain_case((3, 4, 5, 5), torch.float32, hops=0)
    final, attention = case.op(*case.tensors)
    assert attention.shape == (0, 3, 4)
    assert torch.equal(final, case.tensors[1].expand(3, -1, -1))
    grads = []
    for op in (case.op, case.reference):
        leaves = differentiable(case.tensors)
        op(*leaves)[0].square().sum().backward()
        grads.append(leaves[1].grad)
    torch.testing.assert_close(*grads)


def test_scores_far_apart_underflow_to_zero() -> None:
    """Weights below the smallest normal number are zero, as is their gradient; no NaN."""
    query = torch.tensor([[100.0, 0.0]])
    memory = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    weight, bias = torch.zeros(2, 4), torch.zeros(2)
    args = [t.requires_grad_() for t in (query, memory, weight, bias, weight.clone(), bias.clone())]
    final, attention = ops.dynamic_memory(*args, 1)
    assert attention.tolist() == [[[1.0, 0.0, 0.0]]]
    (final.sum() + attention.square().sum()).backward()
    assert all(torch.isfinite(t.grad).all() for t in args)


def test_saturated_networks_are_exact() -> None:
    case = plain_case((5, 12, 8, 8), torch.float32)
    tensors = [*case.tensors]
    for k, bias in ((3, [-1e30, -90.0, -30.0, 0.0] * 2), (5, [1e30, 30.0, -1e4, 0.0] * 2)):
        tensors[k] = torch.tensor(bias)
    check_against_float64(Case(case.op, case.reference, tuple(tensors), (), ()))


# ---- wrong arguments

B, N, M, H = 4, 3, 5, 6
z = torch.zeros


def arguments() -> dict[str, Any]:
    return {
        "query": z(B, H),
        "memory": z(N, M),
        "gate_weight": z(M, M + H),
        "gate_bias": z(M),
        "write_weight": z(M, M + H),
        "write_bias": z(M),
        "score_query": z(B, M),
        "mask": torch.ones(B, N, dtype=torch.bool),
        "num_hops": 2,
    }


def of_type(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {
        k: change(v) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in arguments().items()
    }


ROWS = [
    Bad("query 1-D", {"query": z(H)}, ValueError, "query with 2 dimensions, got 1"),
    Bad("query 3-D", {"query": z(1, B, H)}, ValueError, "query with 2 dimensions, got 3"),
    Bad("query width", {"query": z(B, 7)}, ValueError, r"gate_weight of shape \[5, 12\]"),
    Bad("query rows", {"query": z(2, H)}, ValueError, r"score_query of shape \[2, 5\]"),
    Bad("query integer", {"query": z(B, H).int()}, TypeError, "query of dtype"),
    Bad("query complex", {"query": z(B, H).cfloat()}, TypeError, "query of dtype"),
    Bad("query float8", {"query": z(B, H).to(torch.float8_e4m3fn)}, TypeError, "query of dtype"),
    Bad("query sparse", {"query": z(B, H).to_sparse()}, TypeError, "query to be a dense"),
    Bad("query csr", {"query": z(B, H).to_sparse_csr()}, TypeError, "query to be a dense"),
    Bad("memory 1-D", {"memory": z(M)}, ValueError, r"memory of shape \[N, m\] or \[B, N, m\]"),
    Bad("memory 4-D", {"memory": z(1, B, N, M)}, ValueError, "memory of shape"),
    Bad("memory rows", {"memory": z(2, N, M)}, ValueError, r"\[4, 3, 5\], got \[2, 3, 5\]"),
    Bad("memory width", {"memory": z(N, 4)}, ValueError, r"gate_weight of shape \[4, 10\]"),
    Bad("no slots", {"memory": z(0, M)}, ValueError, "at least one slot"),
    Bad("empty slots", {"memory": z(N, 0)}, ValueError, "at least one slot"),
    Bad("memory dtype", {"memory": z(N, M).double()}, TypeError, "memory of query's dtype"),
    Bad("memory sparse", {"memory": z(N, M).to_sparse()}, TypeError, "memory to be a dense"),
    Bad("gate_weight rows", {"gate_weight": z(4, 11)}, ValueError, r"\[5, 11\], got \[4, 11\]"),
    Bad("gate_weight 1-D", {"gate_weight": z(55)}, ValueError, r"\[5, 11\], got \[55\]"),
    Bad("gate_weight dtype", {"gate_weight": z(M, 11).half()}, TypeError, "gate_weight of query"),
    Bad("gate_bias size", {"gate_bias": z(6)}, ValueError, r"gate_bias of shape \[5\], got \[6\]"),
    Bad("gate_bias integer", {"gate_bias": z(M).long()}, TypeError, "gate_bias of query's dtype"),
    Bad("write_weight width", {"write_weight": z(M, M)}, ValueError, r"\[5, 11\], got \[5, 5\]"),
    Bad("write_weight sparse", {"write_weight": z(M, 11).to_sparse()}, TypeError, "write_weight"),
    Bad("write_bias 2-D", {"write_bias": z(M, 1)}, ValueError, r"\[5\], got \[5, 1\]"),
    Bad("score_query width", {"score_query": z(B, H)}, ValueError, r"\[4, 5\], got \[4, 6\]"),
    Bad("score_query absent", {"score_query": None}, ValueError, "score_query where query is 6"),
    Bad("score_query dtype", {"score_query": z(B, M).bfloat16()}, TypeError, "score_query of"),
    Bad("mask dtype", {"mask": z(B, N)}, TypeError, "mask of dtype bool"),
    Bad("mask integer", {"mask": z(B, N).long()}, TypeError, "mask of dtype bool"),
    Bad("mask shape", {"mask": z(B, M).bool()}, ValueError, r"\[4, 3\], got \[4, 5\]"),
    Bad("mask 1-D", {"mask": z(N).bool()}, ValueError, r"mask of shape \[4, 3\], got \[3\]"),
    Bad("hops negative", {"num_hops": -1}, ValueError, "num_hops >= 0, got -1"),
    Bad("all integer", of_type(Tensor.long), TypeError, "query of dtype"),
    Bad("all complex", of_type(Tensor.cfloat), TypeError, "query of dtype"),
]


class TestHostile(HostileSuite):
    targets = (Target("dynamic_memory", ops.dynamic_memory, arguments, ROWS),)
