r"""The delta memory on GPU: launchers of `delta_memory` and its backward.

Formulas, shapes and errors: `ops/delta_memory.py`; the kernels: `delta_memory_kernels.py`, whose
gradients of q and k come as one part for each slice of V and value head. Their sum is torch's, as
are the norms of q and k and their derivative.

State of proof: as in lstm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.delta_memory import Operands, Options
from ..reference.delta_memory import NORM_FLOOR
from .common import accumulator, as_bytes, cdiv, launcher, next_power_of_2, row_lengths, wide
from .delta_memory_kernels import delta_memory_backward_kernel, delta_memory_forward_kernel

_ELEMENTS = 4096  # of a memory's slice
_WIDEST = 32  # columns of V in a slice
_CHUNK, _LONGEST = 16, 1024  # as in csrc/ops/delta_memory.cpp


def _segment(q: Tensor, v: Tensor) -> int:
    """Steps from one kept memory to the next, as the checks of the op have it."""
    narrow = 2 if q.element_size() < 4 else 1
    features, values, segment = q.shape[3], v.shape[3], _CHUNK
    while segment < _LONGEST:
        kept, through = (features + segment) * values, (features + values) * 2 * segment
        if kept * narrow <= through:
            break
        segment *= 2
    return segment


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


def _common(operands: Operands, options: Options) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and what both kernels take."""
    q, _, v, beta, log_decay, _ = operands
    scale, _, lengths, reset = options
    batch, steps, key_heads, features = q.shape
    heads, values = v.shape[2:]
    computed = wide(q.dtype)
    block = next_power_of_2(features)
    most = max(1, min(_WIDEST, _ELEMENTS // block))
    columns = min(most, next_power_of_2(max(1, values)))
    limits = None
    if lengths is not None:
        limits = row_lengths("delta_memory", lengths, q.device, steps)
    common = {
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
    return (batch * heads, cdiv(values, columns)), common


@launcher
def delta_memory(operands: Operands, options: Options, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`seqmem::delta_memory` on GPU."""
    q, k, v, _, _, state = operands
    grid, common = _common(operands, options)
    computed = wide(q.dtype)
    shape = (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
    output = v.new_zeros(v.shape)
    final = q.new_empty(shape, dtype=computed)
    segment = common["segment"]
    kept = cdiv(q.shape[1], segment), shape[2] + segment, shape[3]
    states = q.new_empty((*shape[:2], *kept) if save else 0, dtype=computed)
    if final.numel():
        delta_memory_forward_kernel[grid](
            q_ptr=_unit(q, options.qk_l2norm)[0],
            k_ptr=_unit(k, options.qk_l2norm)[0],
            state_ptr=None if state is None else state.to(dtype=computed).contiguous(),
            output_ptr=output,
            final_ptr=final,
            states_ptr=states if save else None,
            **common,
        )
    return output, final, states


@launcher
def delta_memory_backward(
    grad_output: Tensor | None,
    grad_final_state: Tensor | None,
    operands: Operands,
    options: Options,
    states: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`seqmem::delta_memory_backward` on GPU."""
    q, k, v, beta, log_decay, state = operands
    grid, common = _common(operands, options)
    computed = wide(q.dtype)
    shape = (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
    (unit_q, norm_q), (unit_k, norm_k) = _unit(q, options.qk_l2norm), _unit(k, options.qk_l2norm)
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
            scratch_ptr=q.new_empty(*shape[:2], common["segment"], *shape[2:], dtype=computed),
            grad_q_ptr=of_q,
            grad_k_ptr=of_k,
            grad_v_ptr=of_v,
            grad_beta_ptr=of_beta,
            grad_decay_ptr=of_decay,
            grad_state_ptr=of_state,
            rows=beta.numel(),
            **common,
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
