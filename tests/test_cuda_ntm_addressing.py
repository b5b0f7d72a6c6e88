"""The NTM functionals' CUDA C++: it compiles without spills, and its arithmetic is right.

As in test_cuda_lstm.py, neither needs a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cuda_stand_in import (
    TOLERANCES,
    assert_near,
    check_each_alone,
    sources_on_cpu,
    spills,
)

from seqmem_fast.reference import ntm_addressing as reference
from seqmem_fast.reference.common import Sample

pytestmark = pytest.mark.slow  # the sources are compiled first
SIZES = {  # (B, N, M, H, taps)
    "odd": (3, 8, 5, 2, 3),
    "vectors": (2, 37, 24, 3, 5),
    "wide": (1, 20, 528, 1, 3),
    "one slot": (2, 1, 8, 2, 1),
    "many slots": (2, 3100, 4, 1, 3),  # more than a block's shared memory holds
    "all taps": (1, 6, 8, 2, 7),
    "many rows": (70, 9, 16, 1, 3),
}


# 4 kernels in each file, 4 types, vectors and single elements
test_addressing_compiles_without_spills = spills("ntm_addressing", 32)
test_reads_and_writes_compile_without_spills = spills("ntm_addressing_memory", 32)
# 3 types, forward one slot a thread or two
test_sequence_compiles_without_spills = spills("ntm_sequence", 6)
test_sequence_backward_compiles_without_spills = spills("ntm_sequence_backward", 3)
ops = sources_on_cpu("ntm_addressing")


def check(ops: Any, sample: Sample) -> None:
    """A call and all its gradients against the reference in float64."""
    function = sample.function
    wide = [t.double().requires_grad_() for t in sample.args]
    right = getattr(reference, function)(*wide)
    ours = getattr(ops, function)(*sample.args)
    assert_near(ours, right, sample.name)
    seed = torch.randn_like(ours)
    grads = torch.autograd.grad(right, wide, seed.double())
    wanted = [True] * len(grads)
    found = getattr(ops, f"{function}_backward")(seed, *sample.args, wanted)
    for k, (a, b) in enumerate(zip(found, grads, strict=True)):
        assert_near(a, b, f"{sample.name}, gradient {k}", 4)
    backward = partial(getattr(ops, f"{function}_backward"), seed, *sample.args)
    check_each_alone(backward, found, len(found))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", SIZES)
def test_agrees_with_the_reference(ops: Any, sizes: str, dtype: torch.dtype) -> None:
    for sample in reference.sample_inputs(dtype=dtype, sizes=SIZES[sizes]):
        check(ops, sample)


def test_unaligned(ops: Any) -> None:
    """Whole vectors that begin between two of 16 bytes."""
    for sample in reference.sample_inputs(sizes=(2, 6, 8, 2, 3)):
        args = [torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in sample.args]
        check(ops, sample._replace(args=tuple(args)))


def test_empty_batch(ops: Any) -> None:
    for sample in reference.sample_inputs(sizes=(0, 6, 8, 2, 3)):
        if "unbatched" not in sample.name:
            assert getattr(ops, sample.function)(*sample.args).numel() == 0


def test_zero_vectors_and_empty_slots(ops: Any) -> None:
    """A slot and a key of zeros, and slots that no weight reaches, have gradients of 0."""
    for sample in reference.sample_inputs(dtype=torch.float64, sizes=(1, 8, 4, 1, 3)):
        if sample.name != "addressing":
            continue
        memory, key, beta, gate, shift, gamma, prev = (t.clone() for t in sample.args)
        memory[0, 2] = 0
        prev[:] = 0
        prev[0, 3] = 1
        check(ops, sample._replace(args=(memory, key, beta, gate * 0, shift, gamma, prev)))
        check(ops, sample._replace(args=(memory, key * 0, beta, gate, shift, gamma, prev)))


def test_nan_stays_in_its_row(ops: Any) -> None:
    for sample in reference.sample_inputs(sizes=(3, 8, 4, 1, 3)):
        if "unbatched" in sample.name:
            continue
        args = [t.clone() for t in sample.args]
        args[0][1] = float("nan")
        out = getattr(ops, sample.function)(*args)
        assert out[1].isnan().all() and not out[[0, 2]].isnan().any()
