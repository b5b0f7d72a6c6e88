"""Triton delta memory on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead_of_time import Kernel
from torch import Tensor

import seqmem_fast
from seqmem_fast._triton import delta_memory as launchers
from seqmem_fast.reference import delta_memory as reference
from seqmem_fast.reference.common import Sample

assert seqmem_fast.__version__
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 5e-2, torch.float16: 6e-3}
SAMPLES = {s.name: s for s in reference.sample_inputs(sizes=(2, 4, 1, 4, 3))}
NAMES = ("q", "k", "v", "beta", "log_decay", "state")


def assert_near(ours: Tensor, right: Tensor, bound: float) -> None:
    assert ours.shape == right.shape
    assert (ours.double() - right).norm() <= bound * right.norm().clamp_min(1e-30)


def check(
    sample: Sample, dtype: torch.dtype = torch.float32, seeded: tuple[bool, bool] = (True, True)
) -> None:
    """Forward and backward beside the reference in float64; seeded: which gradients come in."""
    tensors: list[Any] = [t.to(dtype) for t in sample.args]
    exact = [t.double().requires_grad_() for t in tensors]
    right = reference.delta_memory(*exact, **sample.kwargs)
    tensors += [None] * (6 - len(tensors))
    options = {"scale": None, "qk_l2norm": False, "lengths": None, "reset": None, **sample.kwargs}
    output, final, states = launchers.delta_memory(*tensors, *options.values(), True)
    assert output.dtype == dtype and final.dtype == launchers.wide(dtype)
    seeds: list[Any] = []
    for ours, theirs, given in zip((output, final), right, seeded, strict=True):
        assert_near(ours, theirs.detach(), TOLERANCES[dtype])
        seeds.append(torch.randn(ours.shape).to(ours.dtype) if given else None)
    loss = sum((a * s.double()).sum() for a, s in zip(right, seeds, strict=True) if s is not None)
    expected = torch.autograd.grad(loss, exact, materialize_grads=True)
    found = launchers.delta_memory_backward(*seeds, *tensors, *options.values(), states, [True] * 6)
    for ours, theirs, like in zip(found, expected, tensors, strict=False):
        assert ours.dtype == like.dtype
        assert_near(ours, theirs, 10 * TOLERANCES[dtype])
    assert all(t.shape == (0,) for t in found[len(exact) :])


@pytest.mark.parametrize("name", SAMPLES)
def test_every_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_WIDEST", 2)  # two slices
    check(SAMPLES[name])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check(SAMPLES["gated"], dtype)


@pytest.mark.parametrize("name", ["by_feature", "ended"])
def test_segments(name: str) -> None:
    samples = {s.name: s for s in reference.sample_inputs(sizes=(2, 19, 1, 2, 2))}
    check(samples[name], torch.float64)


def test_each_gradient_alone() -> None:
    check(SAMPLES["gated"], seeded=(True, False))
    check(SAMPLES["gated"], seeded=(False, True))


def test_no_rows_no_steps_and_wrong_shapes() -> None:
    *series, state = SAMPLES["gated"].args
    tail = (None, True, None, None)
    for part in ([x[:, :0] for x in series], [x[:0] for x in series]):
        rows = state[: part[0].shape[0]]
        output, final, states = launchers.delta_memory(*part, rows, *tail, True)
        assert output.shape == part[2].shape and torch.equal(final, rows)
        grads = launchers.delta_memory_backward(None, final, *part, rows, *tail, states, [True] * 6)
        assert torch.equal(grads[5], final) and grads[0].shape == part[0].shape
    with pytest.raises(ValueError, match="expected k of shape"):
        launchers.delta_memory(series[0], series[0][:1], *series[2:], state, *tail, True)


# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(3, 5, 2, 4, 3), (2, 40, 2, 64, 64), (1, 20, 1, 128, 128)]


def kernels() -> list[Kernel]:
    shape = {"BK": 128, "BV": 32, "SCALE": 0.1, "FEATURE": False}
    wide = "beta decay state final states scratch grad_final grad_q grad_k grad_beta grad_decay"
    pointers = {f"{name}_ptr": "*fp32" for name in (*wide.split(), "grad_state")}
    pointers |= {"lengths_ptr": "*i64", "reset_ptr": "*u8"}
    return [
        Kernel("delta_memory_kernels", f"delta_memory_{name}_kernel", "bf16", 8, shape, pointers)
        for name in ("forward", "backward")
    ]
