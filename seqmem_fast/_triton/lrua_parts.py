"""The steps of a head with least recently used access in one row's program; lrua_kernels.py."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import sigmoid
from .machine_kernels import softplus


@triton.jit
def gate_at(width, OWN: tl.constexpr):
    """Where a head's gate stands among its values."""
    if OWN:
        width += width
    return width


@triton.jit
def head_size(width, OWN: tl.constexpr, STRENGTH: tl.constexpr):
    size = gate_at(width, OWN) + 1
    if STRENGTH:
        size += 1
    return size


@triton.jit
def strength_of(p_ptr, width, OWN: tl.constexpr, STRENGTH: tl.constexpr):
    beta = 1.0
    if STRENGTH:
        beta = 1.0 + softplus(tl.load(p_ptr + gate_at(width, OWN) + 1))
    return beta


@triton.jit
def write_weights_of(p_ptr, prev, slot, width, OWN: tl.constexpr, BN: tl.constexpr):
    """A head's weighting to write with, and its gate."""
    gate = sigmoid(tl.load(p_ptr + gate_at(width, OWN)))
    here = tl.arange(0, BN) == slot
    return gate * prev + tl.where(here, 1.0 - gate, 0.0), gate


@triton.jit
def kept_of(memory, slots_ptr, erased, BN: tl.constexpr):
    """The memory without the erased slots."""
    n = tl.arange(0, BN)
    for h in range(erased):
        memory = tl.where((n == tl.load(slots_ptr + h))[:, None], 0.0, memory)
    return memory
