"""Entmax: the inherited suites, edges of its own, peers, and the modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hostile_suite import Bad, HostileSuite, Target
from op_suite import (
    TOLERANCES,
    Case,
    OpSuite,
    Threaded,
    cast,
    check_against_float64,
    check_same_bits_at_any_thread_count,
    differentiable,
    sample_of,
)
from torch import Tensor

import seqmem_fast as sf
from seqmem_fast import ops
from seqmem_fast.reference import entmax as reference
from seqmem_fast.reference.common import Sample

NAMES = [sample.name for sample in reference.sample_inputs() if sample.name != "masked"]


def bound(module: Any, sample: Sample) -> Callable[..., tuple[Tensor, ...]]:
    function = getattr(module, sample.function or "entmax")

    def call(input: Tensor, *alpha: Any) -> tuple[Tensor, ...]:
        given = alpha or sample.args[1:]
        return (function(input, *given, **sample.kwargs),)

    return call


def case_of(sample: Sample) -> Case:
    tensors = tuple(t for t in sample.args if isinstance(t, Tensor))
    rows = (0, None)[: len(tensors)]
    return Case(bound(ops, sample), bound(reference, sample), tensors, rows, (0,))


def sized(name: str, sizes: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> Case:
    samples = reference.sample_inputs(dtype=dtype, sizes=sizes)
    return case_of(next(s for s in samples if s.name == name))


def raw_arguments(sample: Sample) -> tuple[Any, ...]:
    """The op's: input, alpha, power, dim."""
    alpha = sample.args[1] if len(sample.args) > 1 else None
    power = {"entmax15": 1.5, "sparsemax": 2.0}.get(sample.function, 1.5)
    if isinstance(alpha, float):
        alpha, power = None, alpha
    return sample.args[0], alpha, power, sample.kwargs.get("dim", -1)


def threaded() -> Threaded:
    """Calls below and above the size at which one takes several threads."""
    cases = [sized("entmax15", one, torch.float32) for one in ((4, 3, 7), (60, 20, 900))]
    return [(case.op, case.tensors) for case in cases]


class TestEntmax(OpSuite):
    names = NAMES

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        return sized(name, (2, 2, 4) if tiny else (4, 3, 7), dtype)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        sample = sample_of(reference, name, dtype=torch.float64)
        arguments = raw_arguments(sample)
        output = torch.ops.seqmem.entmax(*arguments)
        leaves = tuple(
            a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments
        )
        wanted = [True, arguments[1] is not None]
        backward = (torch.ones_like(output), *arguments, output, wanted)
        return [
            (torch.ops.seqmem.entmax.default, leaves),
            (torch.ops.seqmem.entmax_backward.default, backward),
        ]

    def test_autocast(self, name: str) -> None:
        """In float32, as torch's softmax."""
        case = self.case(name, torch.bfloat16)
        halved = differentiable(case.tensors)
        whole = differentiable(cast(case.tensors, torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            (output,) = case.op(*halved)
        (expected,) = case.op(*whole)
        assert output.dtype == torch.float32 and torch.equal(output, expected)
        torch.autograd.backward([output.square().sum()])
        torch.autograd.backward([expected.square().sum()])
        assert torch.equal(halved[0].grad, whole[0].grad.bfloat16())


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["entmax15", "sparsemax", "number", "learned"])
def test_sizes(name: str, dtype: torch.dtype) -> None:
    """Around the widths of vectors."""
    for count in (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33, 100, 1000):
        if count == 1 and name != "sparsemax":
            continue  # the gradient is zero, and its error is measured against itself
        check_against_float64(sized(name, (2, 3, max(count, 2)), dtype), str(count))


@pytest.mark.isa
@pytest.mark.parametrize("alpha", [1.001, 1.05, 1.25, 1.5, 1.9, 2.0])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 10.0, 1e4])
def test_any_alpha_and_scale(alpha: float, scale: float) -> None:
    """Sums to one, and where alpha is nearly 1 it is nearly softmax."""
    torch.manual_seed(0)
    z = torch.randn(6, 300, dtype=torch.float64) * scale
    for dtype in (torch.float64, torch.float32):
        p = ops.entmax(z.to(dtype), alpha)
        exact = reference.entmax(z.to(dtype).double(), alpha)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(p.double(), exact, rtol=tolerance, atol=tolerance)
        sums = p.double().sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-5, atol=1e-5)
    if alpha == 1.001 and scale <= 1:
        softmax = torch.softmax(z, -1)
        torch.testing.assert_close(ops.entmax(z, alpha), softmax, rtol=0.1, atol=1e-4)


def test_sparsemax_is_the_projection_onto_the_simplex() -> None:
    """By the sort of the paper's algorithm 1."""
    torch.manual_seed(0)
    z = torch.randn(50, 40, dtype=torch.float64)
    ordered, _ = z.sort(-1, descending=True)
    sums, rank = ordered.cumsum(-1), torch.arange(1, 41)
    support = (1 + rank * ordered > sums).sum(-1, keepdim=True)
    tau = (sums.gather(-1, support - 1) - 1) / support
    torch.testing.assert_close(ops.sparsemax(z), (z - tau).clamp(min=0))


@pytest.mark.isa
def test_masked_entries_and_rows() -> None:
    z = torch.randn(5, 12)
    z[0, 3:] = -torch.inf
    z[1] = -torch.inf
    z[2, 4] = torch.nan
    z[3, 0] = torch.inf
    alpha = torch.full((5, 1), 1.3, requires_grad=True)
    for function in (ops.sparsemax, ops.entmax15, lambda z: ops.entmax(z, alpha)):
        leaf = z.clone().requires_grad_()
        p = function(leaf)
        assert p[0, 3:].eq(0).all() and p[0].sum().sub(1).abs() < 1e-6
        assert p[1].eq(0).all()
        assert p[2].isnan().all() and p[3].isnan().all()
        assert torch.equal(p[4], function(z)[4]) and p[4].isfinite().all()
        (p * torch.arange(12.0)).sum().backward()
        grad = leaf.grad
        assert grad is not None
        assert grad[[0, 4]].isfinite().all() and grad[0, 3:].eq(0).all() and grad[1].eq(0).all()
        assert grad[2].isnan().any()
    assert alpha.grad is not None and alpha.grad[[0, 1, 4]].isfinite().all()


def test_nan_in_alpha_stays_in_its_rows() -> None:
    z, alpha = torch.randn(3, 2, 6), torch.tensor([[1.4], [torch.nan]])
    p = ops.entmax(z, alpha)
    assert p[:, 1].isnan().all() and torch.equal(p[:, 0], ops.entmax(z[:, 0], alpha[0]))
    assert reference.entmax(z, alpha)[:, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_by_alpha_stays_right_towards_softmax(dtype: torch.dtype) -> None:
    """Its two parts grow as 1 / (alpha - 1)^2 there, and cancel."""
    z, weights = torch.randn(2, 9, dtype=torch.float64).to(dtype).unbind(0)
    found = []
    for above in (1e-3, 1e-4, 1e-5, 1e-6, 1e-8 if dtype == torch.float64 else 1e-6):
        alpha = torch.tensor(1 + above, dtype=dtype, requires_grad=True)
        found += torch.autograd.grad((ops.entmax(z, alpha) * weights).sum(), alpha)
    first = found[1].expand(len(found) - 2)
    torch.testing.assert_close(torch.stack(found[2:]), first, rtol=2e-3, atol=0)
    difference = (reference.entmax(z, 1 + 1e-3) - reference.entmax(z, 1 + 0.9e-3)) / 1e-4
    torch.testing.assert_close((difference * weights).sum(), found[0], rtol=5e-2, atol=0)


def test_gradient_of_masked_entries_equals_the_references() -> None:
    samples = reference.sample_inputs(dtype=torch.float64)
    sample = next(s for s in samples if s.name == "masked")
    found = []
    for module in (ops, reference):
        z, alpha = (t.clone().requires_grad_() for t in sample.args)
        (module.entmax(z, alpha) * torch.arange(7.0)).sum().backward()
        found.append((z.grad, alpha.grad))
    torch.testing.assert_close(*found)


def test_empty() -> None:
    for shape in ((0, 5), (5, 0), (0,)):
        z = torch.randn(shape, requires_grad=True)
        p = ops.entmax15(z)
        assert p.shape == shape
        p.sum().backward()
        assert z.grad is not None and z.grad.shape == shape
    alpha = torch.full((3, 1), 1.5, requires_grad=True)
    ops.entmax(torch.randn(0, 3, 4), alpha).sum().backward()
    assert alpha.grad is not None and alpha.grad.eq(0).all()


@pytest.mark.isa
def test_same_bits_at_any_thread_count(restored_threads: None) -> None:
    for name in ("sparsemax", "entmax15", "learned"):
        check_same_bits_at_any_thread_count(sized(name, (400, 5, 90), torch.float32))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_dimension(dim: int) -> None:
    z = torch.randn(4, 5, 6, dtype=torch.float64)
    moved = ops.sparsemax(z.movedim(dim, -1).contiguous()).movedim(-1, dim)
    torch.testing.assert_close(ops.sparsemax(z, dim), moved)
    assert torch.equal(sf.Sparsemax(dim)(z), ops.sparsemax(z, dim))
    assert torch.equal(sf.Entmax15(dim)(z), ops.entmax15(z, dim))
    assert repr(sf.Entmax15(dim)) == f"Entmax15(dim={dim})"


def test_equals_the_entmax_package() -> None:
    entmax = pytest.importorskip("entmax")
    z = torch.randn(30, 50, dtype=torch.float64)
    torch.testing.assert_close(ops.sparsemax(z), entmax.sparsemax(z, -1))
    torch.testing.assert_close(ops.entmax15(z), entmax.entmax15(z, -1))
    bisected = entmax.entmax_bisect(z, 1.3, -1, n_iter=60)
    torch.testing.assert_close(ops.entmax(z, 1.3), bisected, rtol=1e-8, atol=1e-10)


# ---- wrong arguments

x = torch.zeros
WRONG = [
    Bad("no dimension", {"input": x(())}, ValueError, "input with a dimension"),
    Bad("dim high", {"dim": 2}, ValueError, r"dim in -2..1, got 2"),
    Bad("dim low", {"dim": -3}, ValueError, r"dim in -2..1, got -3"),
    Bad("input integer", {"input": x(4, 5).long()}, TypeError, "input of dtype"),
    Bad("input complex", {"input": x(4, 5).cfloat()}, TypeError, "input of dtype"),
    Bad("input sparse", {"input": x(4, 5).to_sparse()}, TypeError, "input to be a dense"),
    Bad("alpha 1", {"alpha": 1.0}, ValueError, r"1 < alpha <= 2, got 1"),
    Bad("alpha large", {"alpha": 2.01}, ValueError, r"1 < alpha <= 2, got 2.01"),
    Bad("alpha nan", {"alpha": float("nan")}, ValueError, r"1 < alpha <= 2, got nan"),
    Bad("alphas low", {"alpha": x(4, 1) + 0.5}, ValueError, r"<= 2, got 0.5", True),
    Bad("alpha wide", {"alpha": x(4, 5) + 1.5}, ValueError, r"along dim 1, got \[4, 5\]"),
    Bad("alpha rows", {"alpha": x(3, 1) + 1.5}, ValueError, r"along dim 1, got \[3, 1\]"),
    Bad("alpha 3-D", {"alpha": x(1, 4, 1) + 1.5}, ValueError, r"got \[1, 4, 1\]"),
    Bad("alpha dtype", {"alpha": x(4, 1).double()}, TypeError, "alpha of input's dtype"),
    Bad("alpha sparse", {"alpha": x(4, 1).to_sparse()}, TypeError, "alpha to be a dense"),
]


class TestHostile(HostileSuite):
    targets = (
        Target(
            "entmax",
            ops.entmax,
            lambda: {"input": torch.randn(4, 5), "alpha": torch.full((4, 1), 1.5), "dim": -1},
            WRONG,
        ),
    )
