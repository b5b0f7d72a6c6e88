"""Triton kernels of the regularised LSTM on CPU tensors; run by test_triton_ops.py in a process of
its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead_of_time import Kernel
from torch import Tensor

import seqmem_fast
from seqmem_fast._triton import lstm_regularized as launchers
from seqmem_fast._triton import lstm_regularized_kernels as kernels_of
from seqmem_fast.ops.lstm_regularized import _plain as plain
from seqmem_fast.reference import lstm_regularized as reference

assert seqmem_fast.__version__
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SAMPLES = {sample.name: sample for sample in reference.sample_inputs()}


def arguments(name: str, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    """Those with gradients, and the others, by the op's positions."""
    (args, kwargs) = next(s[1:3] for s in reference.sample_inputs(dtype=dtype) if s.name == name)
    input, hx, *weights, norms = args
    tensors = [input, *(hx or (None, None)), *weights, *(norms or (None,) * 4)]
    usual = {"seed": None, "zoneout_h": 0.0, "zoneout_c": 0.0}
    usual |= {"lengths": None, "reset": None, "batch_sizes": None}
    usual |= {"batch_first": False, "reverse": False}
    return tensors, list({key: kwargs.get(key, value) for key, value in usual.items()}.values())


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


def check(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors, rest = arguments(name, dtype)
    exact = [None if t is None else t.detach().double().clone().requires_grad_() for t in tensors]
    right = plain(*exact, *rest)
    output, hy, cy, *saved = launchers.lstm_regularized(*tensors, *rest, True)
    for a, b in zip((output, hy, cy, *saved[:2]), right, strict=True):
        assert a.dtype == dtype and relative(a, b.detach()) <= TOLERANCES[dtype]
    only = launchers.lstm_regularized(*tensors, *rest, False)
    assert torch.equal(only[0], output) and all(t.numel() == 0 for t in only[3:])
    grads = [torch.randn(t.shape).to(dtype) for t in right]
    if tensors[-1] is None:
        saved[2:] = [None] * 4
    found = launchers.lstm_regularized_backward(
        *grads, *tensors, *rest, output, *saved, [True, True, True]
    )
    leaves = [t for t in exact if t is not None]
    expected = iter(torch.autograd.grad(right, leaves, [g.double() for g in grads]))
    for a, t in zip(found, exact, strict=True):
        if t is None:
            assert a.numel() == 0
        else:
            assert a.dtype == dtype and relative(a, next(expected)) <= 4 * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


def test_nothing_arrives_and_nothing_is_wanted() -> None:
    tensors, rest = arguments("plain norm zoneout", torch.float32)
    output, _, _, *saved = launchers.lstm_regularized(*tensors, *rest, True)
    found = launchers.lstm_regularized_backward(
        *[None] * 5, *tensors, *rest, output, *saved, [True, False, False]
    )
    assert not found[0].any() and all(t.numel() == 0 for t in found[1:])


# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(2, 3, 5, 7), (1, 2, 8, 1030)]


def kernels() -> list[Kernel]:
    shape = {"SHARE_H": 0.1, "SHARE_C": 0.1, "BELOW_H": 1677722, "BELOW_C": 1677722, "BLOCK": 512}
    pointers = {"seed_ptr": "*i64", "valid_ptr": "*u8"}
    exact = {"scales_ptr": "*fp32", "c_ptr": "*fp32", "dh_ptr": "*fp32", "dc_ptr": "*fp32"}
    found = []
    module, step = kernels_of.__name__.rpartition(".")[2], "lstm_regularized_step"
    for name, constants in ((step, {**shape, "EPSILON": 1e-5}), (f"{step}_backward", shape)):
        for storage in ("fp32", "bf16"):
            found.append(Kernel(module, name, storage, 4, constants, pointers | exact))
    return found
