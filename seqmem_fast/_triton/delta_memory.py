r"""The delta memory on GPU: launchers of `delta_memory` and its backward.

Formulas, shapes and errors: `ops/delta_memory.py`. A program takes one row, one head and a slice of
V, whose memory [K, slice] stays in registers while it goes through the steps. The backward computes
the memories within a segment again from the one kept at its beginning, leaves them in scratch
memory and goes back through them; gradients of q and k come as one part for each slice and value
head, whose sum is torch's, as are the norms of q and k and their derivative.

State of proof: by the interpreter and the emulated PTX; not run on a GPU yet.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.delta_memory import NORM_FLOOR
from .common import accumulator, as_bytes, row_lengths, wide

_ELEMENTS = 4096  # of a memory's slice
_WIDEST = 32  # columns of V in a slice
_CHUNK, _LONGEST = 16, 1024  # as in csrc/ops/delta_memory.cpp


def _segment(q: Tensor, v: Tensor) -> int:
    """Steps from one kept memory to the next, as the checks of the op have it."""
    narrow = 2 if q.element_size() < 4 else 1
    features, values, segment = q.shape[3], v.shape[3], _CHUNK
    while segment < _LONGEST and features * values * narrow > (features + values) * 2 * segment:
        segment *= 2
    return segment


@triton.jit
def _load(ptr, n, mask, ACC: tl.constexpr):
    value = tl.load(ptr + n, mask=mask, other=0.0)
    if value.dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)  # the interpreter knows no direct way to float64
    return value.to(ACC)


@triton.jit
def _store(ptr, n, value, mask):
    if ptr.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    tl.store(ptr + n, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _decay(decay_ptr, at, k, K, FEATURE: tl.constexpr, ACC: tl.constexpr):
    """exp(g) [BK], of the head's step number `at`."""
    if FEATURE:
        factor = tl.exp(_load(decay_ptr + at * K, k, k < K, ACC))
    else:
        factor = tl.exp(_load(decay_ptr + at, k * 0, k < K, ACC))
    return factor


@triton.jit
def _is_reset(reset_ptr, at):
    return tl.load(reset_ptr + at) != 0


@triton.jit
def delta_memory_forward_kernel(
    q_ptr,  # [B, T, Hk, K], normalised if asked for; so k
    k_ptr,
    v_ptr,  # [B, T, H, V]
    beta_ptr,  # ACC [B, T, H]
    decay_ptr,  # ACC [B, T, H] or [B, T, H, K], or None
    state_ptr,  # ACC [B, H, K, V], or None
    lengths_ptr,  # int64 [B], or None
    reset_ptr,  # uint8 [B, T], or None
    output_ptr,  # [B, T, H, V]
    final_ptr,  # ACC [B, H, K, V]
    states_ptr,  # ACC [B, H, segments, K, V], or None
    T,
    Hk,
    H,
    K,
    V,
    segment,
    SCALE: tl.constexpr,  # an argument would be rounded to float32
    FEATURE: tl.constexpr,
    ACC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    b = head // H
    h = head % H
    key_head = h // (H // Hk)
    k = tl.arange(0, BK)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    at = k[:, None].to(tl.int64) * V + v[None, :]
    there = (k < K)[:, None] & (v < V)[None, :]
    memory = tl.zeros([BK, BV], ACC)
    if state_ptr is not None:
        memory = _load(state_ptr + head * K * V, at, there, ACC)
    end = T
    if lengths_ptr is not None:
        end = tl.load(lengths_ptr + b).to(tl.int32)
    segments = (T + segment - 1) // segment
    for t in range(end):
        step = b * T + t
        if reset_ptr is not None:
            memory = tl.where(_is_reset(reset_ptr, step), 0.0, memory)
        if states_ptr is not None:
            if t % segment == 0:
                kept = head * segments + t // segment
                tl.store(states_ptr + kept * K * V + at, memory, mask=there)
        row = (step * Hk + key_head) * K
        query = SCALE * _load(q_ptr + row, k, k < K, ACC)
        key = _load(k_ptr + row, k, k < K, ACC)
        value = _load(v_ptr + (step * H + h) * V, v, v < V, ACC)
        if decay_ptr is not None:
            memory *= _decay(decay_ptr, step * H + h, k, K, FEATURE, ACC)[:, None]
        held = tl.sum(memory * key[:, None], axis=0)
        write = tl.load(beta_ptr + step * H + h).to(ACC) * (value - held)
        memory += key[:, None] * write[None, :]
        output = tl.sum(memory * query[:, None], axis=0)
        _store(output_ptr + (step * H + h) * V, v, output, v < V)
    tl.store(final_ptr + head * K * V + at, memory, mask=there)


@triton.jit
def delta_memory_backward_kernel(
    grad_ptr,  # [B, T, H, V], of the output; or None
    grad_final_ptr,  # ACC [B, H, K, V], or None
    q_ptr,
    k_ptr,
    v_ptr,
    beta_ptr,
    decay_ptr,
    lengths_ptr,
    reset_ptr,
    states_ptr,
    scratch_ptr,  # ACC [B, H, segment, K, V]
    grad_q_ptr,  # ACC [slices, B, T, H, K]; so grad_k
    grad_k_ptr,
    grad_v_ptr,  # [B, T, H, V]
    grad_beta_ptr,  # ACC [slices, B, T, H]
    grad_decay_ptr,  # ACC [slices, B, T, H] or [slices, B, T, H, K], or None
    grad_state_ptr,  # ACC [B, H, K, V]
    T,
    Hk,
    H,
    K,
    V,
    segment,
    rows,  # B T H
    SCALE: tl.constexpr,
    FEATURE: tl.constexpr,
    ACC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    slice_row = tl.program_id(1).to(tl.int64) * rows
    b = head // H
    h = head % H
    key_head = h // (H // Hk)
    k = tl.arange(0, BK)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    at = k[:, None].to(tl.int64) * V + v[None, :]
    there = (k < K)[:, None] & (v < V)[None, :]
    grad = tl.zeros([BK, BV], ACC)  # of the memory
    if grad_final_ptr is not None:
        grad = _load(grad_final_ptr + head * K * V, at, there, ACC)
    end = T
    if lengths_ptr is not None:
        end = tl.load(lengths_ptr + b).to(tl.int32)
    segments = (T + segment - 1) // segment
    count = (end + segment - 1) // segment
    for n in range(count):
        begin = (count - 1 - n) * segment
        stop = tl.minimum(end, begin + segment)
        kept = head * segments + count - 1 - n
        memory = _load(states_ptr + kept * K * V, at, there, ACC)
        tl.debug_barrier()
        for t in range(begin, stop):
            step = b * T + t
            if reset_ptr is not None:
                memory = tl.where(_is_reset(reset_ptr, step), 0.0, memory)
            place = head * segment + t - begin
            tl.store(scratch_ptr + place * K * V + at, memory, mask=there)
            key = _load(k_ptr + (step * Hk + key_head) * K, k, k < K, ACC)
            value = _load(v_ptr + (step * H + h) * V, v, v < V, ACC)
            if decay_ptr is not None:
                memory *= _decay(decay_ptr, step * H + h, k, K, FEATURE, ACC)[:, None]
            held = tl.sum(memory * key[:, None], axis=0)
            write = tl.load(beta_ptr + step * H + h).to(ACC) * (value - held)
            memory += key[:, None] * write[None, :]
        tl.debug_barrier()
        for m in range(stop - begin):
            t = stop - 1 - m
            step = b * T + t
            to = step * H + h
            row = (step * Hk + key_head) * K
            query = SCALE * _load(q_ptr + row, k, k < K, ACC)
            key = _load(k_ptr + row, k, k < K, ACC)
            value = _load(v_ptr + to * V, v, v < V, ACC)
            beta = tl.load(beta_ptr + to).to(ACC)
            before = _load(scratch_ptr + (head * segment + t - begin) * K * V, at, there, ACC)
            decay = tl.zeros([BK], ACC) + 1.0
            if decay_ptr is not None:
                decay = _decay(decay_ptr, to, k, K, FEATURE, ACC)
            before *= decay[:, None]
            error = value - tl.sum(before * key[:, None], axis=0)
            write = beta * error
            of_query = tl.zeros([BK], ACC)
            if grad_ptr is not None:
                given = _load(grad_ptr + to * V, v, v < V, ACC)
                grad += query[:, None] * given[None, :]
                after = before + key[:, None] * write[None, :]
                of_query = SCALE * tl.sum(after * given[None, :], axis=1)
            of_write = tl.sum(grad * key[:, None], axis=0)
            of_value = beta * of_write
            of_key = tl.sum(grad * write[None, :] - before * of_value[None, :], axis=1)
            grad -= key[:, None] * of_value[None, :]
            part = slice_row + to
            tl.store(grad_q_ptr + part * K + k, of_query, mask=k < K)
            tl.store(grad_k_ptr + part * K + k, of_key, mask=k < K)
            _store(grad_v_ptr + to * V, v, of_value, v < V)
            tl.store(grad_beta_ptr + part, tl.sum(of_write * error, axis=0))
            if grad_decay_ptr is not None:
                of_decay = tl.sum(grad * before, axis=1)
                if FEATURE:
                    tl.store(grad_decay_ptr + part * K + k, of_decay, mask=k < K)
                else:
                    tl.store(grad_decay_ptr + part, tl.sum(of_decay, axis=0))
            grad *= decay[:, None]
            if reset_ptr is not None:
                grad = tl.where(_is_reset(reset_ptr, step), 0.0, grad)
    tl.store(grad_state_ptr + head * K * V + at, grad, mask=there)


def _unit(x: Tensor, qk_l2norm: bool) -> tuple[Tensor, Tensor | None]:
    """What the kernels read as q or k, and by what it was multiplied."""
    if not qk_l2norm:
        return x.contiguous(), None
    x = x.to(wide(x.dtype))
    inverse = torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_FLOOR)
    return (x * inverse).contiguous(), inverse


def _gradient(parts: Tensor, like: Tensor, unit: Tensor, inverse: Tensor | None) -> Tensor:
    """Of q or k, from the parts [slices, B, T, H, K] of that of `unit`."""
    grad = parts.sum(0).unflatten(2, (like.shape[2], -1)).sum(3)
    if inverse is not None:
        grad = inverse * (grad - unit * (unit * grad).sum(-1, keepdim=True))
    return grad.to(like.dtype)


def _options(
    q: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float | None,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and what both kernels take."""
    batch, steps, key_heads, features = q.shape
    heads, values = v.shape[2:]
    computed = wide(q.dtype)
    block = triton.next_power_of_2(features)
    most = max(1, min(_WIDEST, _ELEMENTS // block))
    columns = min(most, triton.next_power_of_2(max(1, values)))
    limits = None
    if lengths is not None:
        limits = row_lengths("delta_memory", lengths, q.device, steps)
    options = {
        "v_ptr": v.contiguous(),
        "beta_ptr": beta.to(computed).contiguous(),
        "decay_ptr": None if log_decay is None else log_decay.to(computed).contiguous(),
        "lengths_ptr": limits,
        "reset_ptr": None if reset is None else as_bytes(reset.contiguous()),
        "SCALE": features**-0.5 if scale is None else float(scale),
        "T": steps,
        "Hk": key_heads,
        "H": heads,
        "K": features,
        "V": values,
        "segment": _segment(q, v),
        "FEATURE": log_decay is not None and log_decay.dim() == 4,
        "ACC": accumulator(q.dtype),
        "BK": block,
        "BV": columns,
        "num_warps": max(1, min(8, block * columns // 512)),
    }
    return (batch * heads, triton.cdiv(values, columns)), options


def delta_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float | None,
    qk_l2norm: bool,
    lengths: Tensor | None,
    reset: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`seqmem::delta_memory` on GPU."""
    torch.ops.seqmem.check_delta_memory(
        q, k, v, beta, log_decay, state, scale, qk_l2norm, lengths, reset, save
    )
    with torch.cuda.device_of(q):
        grid, options = _options(q, v, beta, log_decay, scale, lengths, reset)
        computed = wide(q.dtype)
        shape = (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
        output = v.new_zeros(v.shape)
        final = q.new_empty(shape, dtype=computed)
        count = triton.cdiv(q.shape[1], options["segment"])
        states = q.new_empty((*shape[:2], count, *shape[2:]) if save else 0, dtype=computed)
        if final.numel():
            delta_memory_forward_kernel[grid](
                q_ptr=_unit(q, qk_l2norm)[0],
                k_ptr=_unit(k, qk_l2norm)[0],
                state_ptr=None if state is None else state.to(dtype=computed).contiguous(),
                output_ptr=output,
                final_ptr=final,
                states_ptr=states if save else None,
                **options,
            )
    return output, final, states


def delta_memory_backward(
    grad_output: Tensor | None,
    grad_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float | None,
    qk_l2norm: bool,
    lengths: Tensor | None,
    reset: Tensor | None,
    states: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`seqmem::delta_memory_backward` on GPU."""
    arguments = (q, k, v, beta, log_decay, state, scale, qk_l2norm, lengths, reset)
    torch.ops.seqmem.check_delta_memory_backward(
        grad_output, grad_final_state, *arguments, states, output_mask
    )
    with torch.cuda.device_of(q):
        grid, options = _options(q, v, beta, log_decay, scale, lengths, reset)
        computed = wide(q.dtype)
        shape = (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
        (unit_q, norm_q), (unit_k, norm_k) = _unit(q, qk_l2norm), _unit(k, qk_l2norm)
        slices, by_key = grid[1], (*v.shape[:3], q.shape[3])
        of_q, of_k = (q.new_zeros((slices, *by_key), dtype=computed) for _ in range(2))
        of_v = v.new_zeros(v.shape)
        of_beta = q.new_zeros((slices, *beta.shape), dtype=computed)
        of_decay = None
        if log_decay is not None:
            of_decay = q.new_zeros((slices, *log_decay.shape), dtype=computed)
        of_state = q.new_zeros(shape, dtype=computed)
        if of_state.numel():
            delta_memory_backward_kernel[grid](
                grad_ptr=None if grad_output is None else grad_output.contiguous(),
                grad_final_ptr=None if grad_final_state is None else grad_final_state.contiguous(),
                q_ptr=unit_q,
                k_ptr=unit_k,
                states_ptr=states.contiguous(),
                scratch_ptr=q.new_empty(*shape[:2], options["segment"], *shape[2:], dtype=computed),
                grad_q_ptr=of_q,
                grad_k_ptr=of_k,
                grad_v_ptr=of_v,
                grad_beta_ptr=of_beta,
                grad_decay_ptr=of_decay,
                grad_state_ptr=of_state,
                rows=beta.numel(),
                **options,
            )
        found = (
            _gradient(of_q, q, unit_q, norm_q),
            _gradient(of_k, k, unit_k, norm_k),
            of_v,
            of_beta.sum(0).to(beta.dtype),
            None if log_decay is None or of_decay is None else of_decay.sum(0).to(log_decay.dtype),
            None if state is None else of_state.to(state.dtype),
        )
    none = q.new_empty(0)
    first, second, third, fourth, fifth, sixth = (
        none if grad is None or not wanted else grad
        for grad, wanted in zip(found, output_mask, strict=True)
    )
    return first, second, third, fourth, fifth, sixth
