"""Triton entmax on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import Kernel

import seqmem_fast
from seqmem_fast._triton import entmax as launchers
from seqmem_fast._triton.normalizers import ANY, SPARSEMAX
from seqmem_fast.reference import entmax as reference

assert seqmem_fast.__version__
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CALLS = {"sparsemax": (2.0, False), "entmax15": (1.5, False), "any": (1.3, False), "own": (1, True)}


@pytest.fixture(params=[4096, 16], ids=["one_block", "blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_BLOCK", request.param)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


def check(name: str, dtype: torch.dtype) -> None:
    power, own = CALLS[name]
    torch.manual_seed(0)
    z = torch.randn(2, 21, 3).to(dtype)
    z[0, 5:, 1] = float("-inf")
    alpha = torch.tensor([1.2, 1.6, 2.0]).to(dtype) if own else None
    exact = z.double().requires_grad_()
    alphas = power if alpha is None else alpha.double().requires_grad_()
    right = reference.entmax(exact, alphas, 1)
    output = launchers.entmax(z, alpha, float(power), 1)
    assert relative(output, right.detach()) <= TOLERANCES[dtype]
    seed = torch.randn(right.shape).to(dtype)
    leaves = [exact] if alpha is None else [exact, alphas]
    expected = torch.autograd.grad(right, leaves, seed.double())
    found = launchers.entmax_backward(seed, z, alpha, float(power), 1, output, [True, own])
    for a, b in zip(found, expected, strict=False):
        assert relative(a, b) <= 4 * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name: str, dtype: torch.dtype, block: None) -> None:
    check(name, dtype)


def test_edges(block: None) -> None:
    z = torch.randn(6, 20)
    clean = launchers.entmax(z, None, 1.5, 1)
    z[1, 2], z[2, 3], z[3] = float("nan"), float("inf"), float("-inf")
    found = launchers.entmax(z, None, 1.5, 1)
    assert found[1:3].isnan().all() and found[3].eq(0).all()
    assert torch.equal(found[[0, 4, 5]], clean[[0, 4, 5]])
    grad, _ = launchers.entmax_backward(z, z, None, 1.5, 1, found, [True, False])
    assert grad[3].eq(0).all() and grad[[0, 4, 5]].isfinite().all() and grad[1].isnan().any()
    assert launchers.entmax(z[:0], None, 2.0, 1).shape == (0, 20)
    assert launchers.entmax(z[:, :0], None, 2.0, 1).shape == (6, 0)
    with pytest.raises(ValueError, match="expected dim in"):
        launchers.entmax(z, None, 2.0, 2)


# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(4, 3, 7), (4, 3, 9000)]


def kernels() -> list[Kernel]:
    found = []
    for kind, storage, block in ((SPARSEMAX, "bf16", 1024), (ANY, "fp32", 512)):
        acc = launchers.tl.float64 if kind == ANY else launchers.tl.float32
        shape = {"BLOCK": block, "KIND": kind.value, "ACC": acc}
        pointers = {"alpha_ptr": "*fp64", "grad_alpha_ptr": "*fp64"}
        label = f"kind {kind.value}"
        for name, more in (("forward", {"ONE": True}), ("backward", {})):
            kernel = f"entmax_{name}_kernel"
            found.append(Kernel("entmax", kernel, storage, 4, shape | more, pointers, label=label))
    return found
