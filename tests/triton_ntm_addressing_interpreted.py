"""Triton NTM functionals on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead_of_time import Kernel
from torch import Tensor

import seqmem_fast
from seqmem_fast._triton import machine
from seqmem_fast._triton import ntm_addressing as launchers
from seqmem_fast.reference import ntm_addressing as reference

assert seqmem_fast.__version__
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 8e-2, torch.float16: 1e-2}
SIZES = (2, 9, 5, 2, 5)  # B, N, M, H, S: no power of two in sight
SAMPLES = {s.name: s for s in reference.sample_inputs(sizes=SIZES)}


def assert_near(ours: Tensor, right: Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    assert ours.shape == right.shape and ours.dtype == dtype
    error = (ours.detach().double() - right).norm() / right.norm().clamp_min(1e-30)
    assert error <= factor * TOLERANCES[dtype]


def check(sample: Any, dtype: torch.dtype) -> None:
    args = [a.to(dtype) for a in sample.args]
    exact = [a.double().requires_grad_() for a in args]
    right = getattr(reference, sample.function)(*exact)
    assert_near(getattr(launchers, sample.function)(*args), right.detach(), dtype)
    seed = torch.randn(right.shape).to(dtype)
    expected = torch.autograd.grad(right, exact, seed.double())
    backward = getattr(launchers, f"{sample.function}_backward")
    grads = backward(seed, *args, [True] * len(args))
    for grad, theirs in zip(grads, expected, strict=True):
        assert_near(grad, theirs, dtype, 10)
    assert all(g.shape == (0,) for g in backward(seed, *args, [False] * len(args)))


@pytest.mark.parametrize("name", SAMPLES)
def test_every_form(name: str) -> None:
    check(SAMPLES[name], torch.float32)


def test_two_taps_on_one_slot() -> None:
    """An even number of slots, and shifts by up to half of them."""
    samples = reference.sample_inputs(sizes=(2, 4, 3, 2, 5))
    check(next(s for s in samples if s.name == "addressing_heads"), torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["addressing_heads", "write_heads"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    check(SAMPLES[name], dtype)


@pytest.mark.parametrize("name", ["content", "addressing", "write"])
def test_plain_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_ELEMENTS", 8)
    check(SAMPLES[name], torch.float64)


def test_zero_memory_zero_key_and_one_hot_weights() -> None:
    """Norms, a logarithm and a sum of zero: values and gradients stay finite."""
    memory, key, beta, gate, _, gamma, _ = (a.clone() for a in SAMPLES["addressing"].args)
    memory[0], key[1], gate[:] = 0, 0, 0
    shift, prev = torch.eye(3)[1].repeat(2, 1), torch.eye(9)[:2].clone()
    prev[1] = 0
    args = (memory, key, beta, gate, shift, gamma, prev)
    weights = launchers.ntm_addressing(*args)
    assert torch.equal(weights, prev)
    grads = launchers.ntm_addressing_backward(torch.randn(2, 9), *args, [True] * 7)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("gamma", [1.0, 11.0, 1000.0])
def test_weights_sum_to_one(gamma: float) -> None:
    memory, key, beta, gate, shift, old, prev = SAMPLES["addressing"].args
    flat = torch.full_like(prev, 1 / 9)
    args = (memory, key, beta, torch.zeros_like(gate), shift, torch.full_like(old, gamma), flat)
    assert torch.allclose(launchers.ntm_addressing(*args).sum(-1), torch.ones(2))


def test_nothing_leaves_its_row() -> None:
    args = SAMPLES["addressing"].args
    clean = launchers.ntm_addressing(*args)
    memory = args[0].clone()
    memory[1, 3, 2] = float("nan")
    weights = launchers.ntm_addressing(memory, *args[1:])
    assert torch.equal(weights[0], clean[0]) and weights[1].isnan().all()


def test_no_rows_and_checks() -> None:
    memory, key, beta = SAMPLES["content"].args
    assert launchers.ntm_content_addressing(memory[:0], key[:0], beta[:0]).shape == (0, 9)
    memory, weights, erase, add = SAMPLES["write"].args
    empty = (memory[:0], weights[:0], erase[:0], add[:0])
    assert launchers.ntm_write(*empty).shape == (0, 9, 5)
    with pytest.raises(ValueError, match="expected weights of shape"):
        launchers.ntm_write(memory, weights[:, 1:], erase, add)


# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(3, 8, 5, 2, 3), (3, 128, 64, 2, 3)]


def kernels() -> list[Kernel]:
    """N = 128, M = 64: the most that stays on chip."""
    shape = {"BN": 128, "BW": 64, "BS": 4}
    names = ("ntm_address", "ntm_address_backward", "ntm_write_heads", "ntm_write_heads_backward")
    return [
        Kernel("ntm_addressing_kernels", name, "bf16", 8, shape, {}, ("slots", "width"))
        for name in names
    ]
