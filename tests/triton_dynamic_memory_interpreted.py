"""Triton dynamic memory on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from ahead_of_time import Kernel
from torch import Tensor

import seqmem_fast
from seqmem_fast._triton import dynamic_memory as launchers
from seqmem_fast.reference import dynamic_memory as reference
from seqmem_fast.reference.common import Sample

assert seqmem_fast.__version__
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 5e-2, torch.float16: 6e-3}
SIZES = (2, 9, 6, 5)  # B, N, m, h
SAMPLES = {s.name: s for s in reference.sample_inputs(sizes=SIZES)}


def assert_near(ours: Tensor, right: Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    assert ours.shape == right.shape and ours.dtype == dtype
    error = (ours.detach().double() - right).norm() / right.norm().clamp_min(1e-30)
    assert error <= factor * TOLERANCES[dtype]


def arguments(sample: Any) -> dict[str, Any]:
    bound = inspect.signature(reference.dynamic_memory).bind(*sample.args, **sample.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def check(
    sample: Any, dtype: torch.dtype = torch.float32, seeded: tuple[bool, bool] = (True, True)
) -> None:
    """Forward and backward beside the reference in float64; seeded: which gradients come in."""
    given = arguments(sample)
    args = {
        name: a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a
        for name, a in given.items()
    }
    exact = {
        name: a.double().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for name, a in args.items()
    }
    right = reference.dynamic_memory(**exact)
    names = ("query", "memory", "gate_weight", "gate_bias", "write_weight", "write_bias")
    first = [args[name] for name in names]
    score, mask, hops = args["score_query"], args["mask"], args["num_hops"]
    final, attention, saved = launchers.dynamic_memory(
        *first, score, mask, hops, args["return_memory"], True
    )
    pairs = [(attention, right[1])]
    if right[0] is not None:
        pairs.append((final, right[0]))
    loss, seeds = torch.zeros((), dtype=torch.float64), []
    for (ours, theirs), is_given in zip(pairs, seeded[::-1], strict=False):
        assert_near(ours, theirs.detach(), dtype)
        # Expanded over the hops or rows, as that of a sum is: a stride of 0.
        seed = torch.randn(theirs.shape[1:]).to(dtype).expand(theirs.shape)
        seeds.append(seed if is_given else None)
        if is_given:
            loss = loss + (theirs * seed).sum()
    grad_attention, grad_final = (*seeds, None)[:2]
    leaves = [a for name, a in exact.items() if isinstance(a, Tensor) and a.requires_grad]
    expected = iter(torch.autograd.grad(loss, leaves, materialize_grads=True))
    grads = launchers.dynamic_memory_backward(
        grad_final, grad_attention, *first, score, mask, attention, saved, [True] * 4
    )
    for name, grad in zip((*names, "score_query"), grads, strict=True):
        if args[name] is None:
            assert grad.shape == (0,)
        else:
            assert_near(grad, next(expected), dtype, 10)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_ELEMENTS", 64)  # two blocks of slots
    check(SAMPLES[name])


@pytest.mark.parametrize("name", SAMPLES)
def test_plain_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_WIDEST", 4)
    check(SAMPLES[name], torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check(SAMPLES["per_sample_masked"], dtype)


@pytest.mark.parametrize("slots", [1, 4])
def test_fewer_numbers_than_threads(slots: int) -> None:
    check(next(reference.sample_inputs(sizes=(1, slots, 15, 5))))


def test_wide_slots_whose_weights_are_not_aligned() -> None:
    samples = {s.name: s for s in reference.sample_inputs(sizes=(1, 3, 66, 5))}
    check(samples["per_sample_masked"])


def test_each_gradient_alone() -> None:
    check(SAMPLES["shared"], seeded=(True, False))
    check(SAMPLES["shared"], seeded=(False, True))


def test_nothing_leaves_its_row_and_no_slot_left() -> None:
    given = arguments(SAMPLES["per_sample_masked"])
    args = [*given.values()][:6]
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False
    tail = (given["score_query"], mask, 2, True, False)
    clean = launchers.dynamic_memory(*args, *tail)
    assert not clean[1][:, 1].any() and clean[2].numel() == 0
    args[1] = args[1].clone()
    args[1][1] = float("nan")  # what is masked is not read
    final, attention, _ = launchers.dynamic_memory(*args, *tail)
    assert torch.equal(attention, clean[1]) and torch.equal(final[0], clean[0][0])


@pytest.mark.parametrize("widest", [4, 128], ids=["plain_path", "on_chip"])
def test_row_without_slots_reads_zero(widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every hop: from the second on, its memory is no longer zero."""
    monkeypatch.setattr(launchers, "_WIDEST", widest)
    name, args, options, *_ = SAMPLES["per_sample_masked"]
    mask = options["mask"].clone()
    mask[1] = False
    check(Sample(name, args, {**options, "mask": mask}))


def test_no_hops_no_rows() -> None:
    given = arguments(SAMPLES["shared"])
    args = [*given.values()][:6]
    final, attention, saved = launchers.dynamic_memory(*args, None, None, 0, True, True)
    assert torch.equal(final, args[1].expand(2, -1, -1)) and attention.shape == (0, 2, 9)
    grads = launchers.dynamic_memory_backward(
        final, None, *args, None, None, attention, saved, [True] * 4
    )
    assert torch.allclose(grads[1], final.sum(0)) and not grads[0].any() and not grads[2].any()
    args[0] = args[0][:0]
    final, attention, saved = launchers.dynamic_memory(*args, None, None, 2, True, True)
    assert final.shape == (0, 9, 6) and attention.shape == (2, 0, 9)
    grads = launchers.dynamic_memory_backward(
        final, None, *args, None, None, attention, saved, [True] * 4
    )
    assert not grads[1].any() and grads[1].shape == (9, 6)
    with pytest.raises(ValueError, match="expected memory"):
        launchers.dynamic_memory(args[0], args[1][0], *args[2:], None, None, 2, True, True)


# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(4, 9, 6, 5), (4, 128, 64, 64), (4, 50, 128, 100)]


def kernels() -> list[Kernel]:
    file, shape = "dynamic_memory_kernels", {"BN": 64, "BD": 64}
    fp32 = "z scores saved maps dz du de ds grad".split()
    pointers = {"mask_ptr": "*u8", **{f"{name}_ptr": "*fp32" for name in fp32}}
    names = ("forward", "final", "backward", "shared_grad")
    return [
        Kernel(file, f"dynamic_memory_{name}", "bf16", 8, shape, pointers, ("width",))
        for name in names
    ]
