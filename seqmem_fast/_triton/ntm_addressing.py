r"""NTM addressing, reading and writing on GPU: launchers of the four functionals.

Formulas, shapes and errors: `ops/ntm_addressing.py`. A program holds a row's whole memory on chip:
one kernel for all four stages of addressing, one for all writes of a row, one backward for each,
which recompute what the forward went through. Reading is a matrix product, and torch's. Memories
above `machine.fits` values a row do not fit and take the plain path: the reference, on the GPU.

Where the package was built with nvcc, csrc/cuda/ntm_addressing.cpp runs in their place.

State of proof: as in lstm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import ntm_addressing as reference
from . import ntm_addressing_kernels as kernels
from .common import accumulator, launcher, next_power_of_2, only, through_reference
from .machine import blocks, fits


def _shape(memory: Tensor, of_head: Tensor) -> tuple[int, int, dict[str, Any]]:
    """B, H and what every kernel takes; `of_head` is [B, H, ...] with or without B and H."""
    dims = memory.dim()
    heads = of_head.shape[dims - 2] if of_head.dim() == dims else 1
    slots, width = memory.shape[-2:]
    common = {"count": heads, "slots": slots, "width": width, "ACC": accumulator(memory.dtype)}
    return memory.shape[0] if dims == 3 else 1, heads, {**common, **blocks(slots, width)}


def _taps(shift: Tensor) -> dict[str, int]:
    return {"taps": shift.shape[-1], "BS": max(2, next_power_of_2(shift.shape[-1]))}


class Addressing(NamedTuple):
    """What a head's weighting is made of."""

    memory: Tensor
    key: Tensor
    beta: Tensor
    gate: Tensor
    shift: Tensor
    gamma: Tensor
    prev_weights: Tensor


@launcher
def ntm_content_addressing(memory: Tensor, key: Tensor, beta: Tensor) -> Tensor:
    """`seqmem::ntm_content_addressing` on GPU."""
    return _address(memory, key, beta, None)


@launcher
def ntm_addressing(given: Addressing) -> Tensor:
    """`seqmem::ntm_addressing` on GPU."""
    memory, key, beta, *rest = given
    return _address(memory, key, beta, rest)


def _address(memory: Tensor, key: Tensor, beta: Tensor, rest: Sequence[Tensor] | None) -> Tensor:
    slots, width = memory.shape[-2:]
    if not fits(slots, width):
        if rest is None:
            return reference.ntm_content_addressing(memory, key, beta)
        return reference.ntm_addressing(memory, key, beta, *rest)
    batch, heads, common = _shape(memory, key)
    weights = memory.new_empty(*key.shape[:-1], slots)
    if weights.numel():
        kernels.ntm_address[(batch * heads,)](
            memory_ptr=memory.contiguous(),
            key_ptr=key.contiguous(),
            beta_ptr=beta.contiguous(),
            weights_ptr=weights,
            **_optional(rest),
            **common,
        )
    return weights


def _optional(rest: Sequence[Tensor] | None) -> dict[str, Any]:
    names = ("gate_ptr", "shift_ptr", "gamma_ptr", "prev_ptr")
    if rest is None:
        return {**dict.fromkeys(names), "taps": 1, "BS": 2}
    dense = (a.contiguous() for a in rest)
    return {**dict(zip(names, dense, strict=True)), **_taps(rest[1])}


@launcher
def ntm_content_addressing_backward(
    grad_weights: Tensor, memory: Tensor, key: Tensor, beta: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    """`seqmem::ntm_content_addressing_backward` on GPU."""
    return _address_backward(grad_weights, (memory, key, beta), output_mask)


@launcher
def ntm_addressing_backward(
    grad_weights: Tensor, given: Addressing, output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    """`seqmem::ntm_addressing_backward` on GPU."""
    return _address_backward(grad_weights, given, output_mask)


def _address_backward(
    grad: Tensor, inputs: tuple[Tensor, ...], output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    memory, key, beta, *rest = inputs
    if not fits(*memory.shape[-2:]):
        whole = bool(rest)
        function = reference.ntm_addressing if whole else reference.ntm_content_addressing
        return through_reference(lambda *a: (function(*a),), inputs, [grad], output_mask)
    batch, _, common = _shape(memory, key)
    grads = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in inputs]
    names = ("memory", "key", "beta", "gate", "shift", "gamma", "prev")
    found = dict(zip(names, grads, strict=False))
    if batch:
        kernels.ntm_address_backward[(batch,)](
            grad_ptr=grad.contiguous(),
            memory_ptr=memory.contiguous(),
            key_ptr=key.contiguous(),
            beta_ptr=beta.contiguous(),
            **{f"d_{name}_ptr": found.get(name) for name in names},
            **_optional(rest or None),
            **common,
        )
    return only(output_mask, grads)


@launcher
def ntm_read(memory: Tensor, weights: Tensor) -> Tensor:
    """`seqmem::ntm_read` on GPU."""
    if weights.dim() == memory.dim():
        return weights @ memory
    return (weights.unsqueeze(-2) @ memory).squeeze(-2)


@launcher
def ntm_read_backward(
    grad_reads: Tensor, memory: Tensor, weights: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    """`seqmem::ntm_read_backward` on GPU: dM = w^T dr, dw = dr M^T."""
    none = memory.new_empty(0)
    single = weights.dim() < memory.dim()
    w = weights.unsqueeze(-2) if single else weights
    g = grad_reads.unsqueeze(-2) if single else grad_reads
    return (
        w.mT @ g if output_mask[0] else none,
        (g @ memory.mT).view(weights.shape) if output_mask[1] else none,
    )


@launcher
def ntm_write(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """`seqmem::ntm_write` on GPU."""
    if not fits(*memory.shape[-2:]):
        return reference.ntm_write(memory, weights, erase, add)
    batch, _, common = _shape(memory, weights)
    new = torch.empty_like(memory, memory_format=torch.contiguous_format)
    if batch:
        kernels.ntm_write_heads[(batch,)](
            memory_ptr=memory.contiguous(),
            weights_ptr=weights.contiguous(),
            erase_ptr=erase.contiguous(),
            add_ptr=add.contiguous(),
            new_ptr=new,
            **common,
        )
    return new


@launcher
def ntm_write_backward(
    grad_new_memory: Tensor,
    memory: Tensor,
    weights: Tensor,
    erase: Tensor,
    add: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`seqmem::ntm_write_backward` on GPU."""
    inputs = (memory, weights, erase, add)
    if not fits(*memory.shape[-2:]):
        return through_reference(
            lambda *a: (reference.ntm_write(*a),), inputs, [grad_new_memory], output_mask
        )
    batch, _, common = _shape(memory, weights)
    grads = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in inputs]
    names = ("memory", "weights", "erase", "add")
    if batch:
        kernels.ntm_write_heads_backward[(batch,)](
            grad_ptr=grad_new_memory.contiguous(),
            **{f"{k}_ptr": a.contiguous() for k, a in zip(names, inputs, strict=True)},
            **{f"d_{k}_ptr": a for k, a in zip(names, grads, strict=True)},
            **common,
        )
    return only(output_mask, grads)
