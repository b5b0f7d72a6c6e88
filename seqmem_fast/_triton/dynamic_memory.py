r"""Dynamic memory on GPU: launchers of `dynamic_memory` and `dynamic_memory_backward`.

Formulas, shapes and errors: `ops/dynamic_memory.py`. Forward: one product for the query's part of
all gates, one kernel for all hops (a program a row), and one that writes the final memory where it
is wanted. Backward: one kernel back over the hops, then a product per gradient.

Slots wider than 128 do not keep their gate matrices on chip; they take a plain path, torch's
operations hop by hop, in the same affine form.

State of proof: as in lstm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.dynamic_memory import Operands
from . import dynamic_memory_kernels as kernels
from .common import accumulator, cdiv, launcher, next_power_of_2, strides, wide

_WIDEST = 128
_ELEMENTS = 4096  # of a block of slots


def _blocks(slots: int, width: int) -> tuple[int, int]:
    """Slots and padded width of a block.

    At least an element for every thread: of a smaller block, warps hold copies that may differ in
    the last bit, and which of them a sum takes is not defined.
    """
    block_d = max(16, next_power_of_2(width))
    least = 32 * _warps(block_d) // block_d
    return max(least, min(next_power_of_2(slots), _ELEMENTS // block_d)), block_d


def _warps(block_d: int) -> int:
    return 4 if block_d < 64 else min(block_d // 8, 16)


@launcher
def dynamic_memory(
    operands: Operands, num_hops: int, return_memory: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`seqmem::dynamic_memory` on GPU."""
    query, memory, gate_weight, gate_bias, write_weight, write_bias, score_query, mask = operands
    batch, (slots, width) = query.shape[0], memory.shape[-2:]
    dtype = wide(query.dtype)
    attention = query.new_empty(num_hops, batch, slots)
    saved = query.new_empty(num_hops, batch, 3, width, dtype=dtype) if save else None
    final = query.new_empty(batch, slots, width) if return_memory else query.new_empty(0)
    kept = query.new_empty(0, dtype=dtype) if saved is None else saved
    if batch == 0:
        return final, attention, kept
    score = (query if score_query is None else score_query).contiguous()
    memory = memory.contiguous()
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    parts = ((gate_weight, gate_bias), (write_weight, write_bias))
    z = torch.stack(
        [torch.addmm(c.to(dtype), query.to(dtype), w[:, width:].to(dtype).t()) for w, c in parts],
        1,
    )  # [B, 2, m]
    if width > _WIDEST:
        maps = _plain_hops(score, memory, z, (gate_weight, write_weight), mask, attention, saved)
    else:
        maps = torch.empty_like(z)
        gate_rows, write_rows = (_aligned(w, width) for w in (gate_weight, write_weight))
        block_n, block_d = _blocks(slots, width)
        kernels.dynamic_memory_forward[(batch,)](
            score_ptr=score,
            z_ptr=z,
            gate_weight_ptr=gate_rows,
            write_weight_ptr=write_rows,
            mask_ptr=mask,
            attention_ptr=attention,
            scores_ptr=z.new_empty(batch, slots),
            saved_ptr=saved,
            maps_ptr=maps,
            batch=batch,
            hops=num_hops,
            weight_t=gate_rows.stride(0),
            ACC=accumulator(query.dtype),
            num_stages=1,
            **_common(memory, slots, block_n, block_d),
        )
    if return_memory:
        block_n, block_d = _blocks(slots, width)
        blocks = cdiv(slots, block_n)
        kernels.dynamic_memory_final[(batch * blocks,)](
            maps_ptr=maps,
            final_ptr=final,
            blocks=blocks,
            **_common(memory, slots, block_n, block_d),
        )
    return final, attention, kept


def _aligned(weight: Tensor, width: int) -> Tensor:
    """Rows that start with weight's first columns, all that the kernels read.

    Where 16 does not divide their distance, the addresses of wide ones cost registers and spill.
    """
    if width <= 64 or weight.shape[1] % 16 == 0:
        return weight.contiguous()
    padded = weight.new_empty(len(weight), cdiv(width, 16) * 16)
    padded[:, :width] = weight[:, :width]
    return padded


def _common(memory: Tensor, slots: int, block_n: int, block_d: int) -> dict[str, Any]:
    return {
        "memory_ptr": memory,
        "memory_b": 0 if memory.dim() == 2 else memory.stride(0),
        "slots": slots,
        "width": memory.shape[-1],
        "BN": block_n,
        "BD": block_d,
        "num_warps": _warps(block_d),
    }


def _where_filled(mask: Tensor | None, a: Tensor) -> Tensor:
    """a [..., B, m], with zeros in rows whose mask leaves no slot to read."""
    return a if mask is None else a.masked_fill((mask == 0).all(-1, keepdim=True), 0)


def _plain_hops(
    score: Tensor,
    memory: Tensor,
    z: Tensor,
    weights: tuple[Tensor, Tensor],
    mask: Tensor | None,
    attention: Tensor,
    saved: Tensor | None,
) -> Tensor:
    """The forward kernel in torch's operations; [B, 2, m], A and B after the last hop."""
    width, dtype = memory.shape[-1], z.dtype
    slots = memory.to(dtype)
    score = score.to(dtype)
    if mask is not None:
        slots = slots.expand(len(score), -1, -1).masked_fill((mask == 0)[..., None], 0)
    A, B = torch.ones_like(score), torch.zeros_like(score)
    for k in range(attention.shape[0]):
        scores = (slots @ (A * score)[..., None]).squeeze(-1)  # [B, N]
        if mask is not None:
            scores = scores.masked_fill(mask == 0, torch.finfo(dtype).min)
        weighting = scores.softmax(-1)
        if mask is not None:
            weighting = weighting.masked_fill(mask == 0, 0)
        attention[k] = weighting
        u = (weighting[:, None] @ slots).squeeze(1)
        r = _where_filled(mask, A * u + B)
        gate, write = (r @ w[:, :width].to(dtype).t() + z[:, n] for n, w in enumerate(weights))
        gate, write = gate.sigmoid(), write.tanh()
        if saved is not None:
            saved[k] = torch.stack((gate, write, u), 1)
        A, B = (1 - gate) * A, (1 - gate) * B + gate * write
    return torch.stack((A, B), 1)


@launcher
def dynamic_memory_backward(
    grad_final: Tensor | None,
    grad_attention: Tensor | None,
    operands: Operands,
    attention: Tensor,
    saved: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`seqmem::dynamic_memory_backward` on GPU."""
    query, memory, gate_weight, _, write_weight, _, score_query, mask = operands
    hops, batch, slots = attention.shape
    width = memory.shape[-1]
    of_query, of_memory, of_weights, of_score = output_mask
    dtype, none = wide(query.dtype), query.new_empty(0)
    score = (query if score_query is None else score_query).contiguous()
    memory, attention, saved = memory.contiguous(), attention.contiguous(), saved.contiguous()
    bytes_ = None if mask is None else mask.contiguous().view(torch.uint8)
    maps = _maps(saved, batch, width)
    dz = query.new_empty(hops, batch, 2, width, dtype=dtype)
    du = query.new_empty(hops, batch, width, dtype=dtype)
    de = query.new_empty(hops, batch, slots, dtype=dtype)
    ds = query.new_empty(batch, width, dtype=dtype)
    weights, grads = (gate_weight, write_weight), (grad_attention, grad_final)
    given = _Given(score, memory, weights, bytes_, attention, saved, *grads, maps)
    if width > _WIDEST:
        _plain_hops_back(given, _Found(dz, du, de, ds))
    elif batch > 0:
        _hops_back(given, _Found(dz, du, de, ds))

    reads = maps[:-1, :, 0] * saved[:, :, 2] + maps[:-1, :, 1]  # [K, B, m]
    reads = _where_filled(mask, reads)
    dz_sum = dz.sum(0)  # [B, 2, m]
    wide_query = query.to(dtype)
    grad_query = none
    if of_query:
        total = ds if score_query is None else torch.zeros_like(wide_query)
        for k, weight in enumerate((gate_weight, write_weight)):
            total = total + dz_sum[:, k] @ weight[:, width:].to(dtype)
        grad_query = total.to(query.dtype)
    of_networks = [none] * 4
    if of_weights:
        for k in range(2):
            of_read = dz[:, :, k].flatten(0, 1).t() @ reads.flatten(0, 1)
            of_given = dz_sum[:, k].t() @ wide_query
            of_networks[2 * k] = torch.cat((of_read, of_given), 1).to(query.dtype)
            of_networks[2 * k + 1] = dz_sum[:, k].sum(0).to(query.dtype)
    grad_memory = none
    if of_memory:
        p = maps[:-1, :, 0] * score.to(dtype)  # [K, B, m]
        grad_memory = _grad_memory(memory, attention, du, de, p, grad_final, maps[-1])
    of_score = of_score and score_query is not None
    return grad_query, grad_memory, *of_networks, ds.to(query.dtype) if of_score else none


def _maps(saved: Tensor, batch: int, width: int) -> Tensor:
    """[K + 1, B, 2, m]: A and B before each hop, and after the last."""
    A, B = saved.new_ones(batch, width), saved.new_zeros(batch, width)
    found = [torch.stack((A, B), 1)]
    for gate, write in zip(saved[:, :, 0], saved[:, :, 1], strict=True):
        A, B = (1 - gate) * A, (1 - gate) * B + gate * write
        found.append(torch.stack((A, B), 1))
    return torch.stack(found)


class _Given(NamedTuple):
    """What the way back over the hops reads."""

    score: Tensor  # [B, m]
    memory: Tensor
    weights: tuple[Tensor, Tensor]  # of gate and write
    mask: Tensor | None
    attention: Tensor  # [K, B, N]
    saved: Tensor  # [K, B, 3, m]
    grad_attention: Tensor | None
    grad_final: Tensor | None
    maps: Tensor  # [K + 1, B, 2, m]


class _Found(NamedTuple):
    """What it fills, in the wide dtype."""

    dz: Tensor  # [K, B, 2, m]
    du: Tensor  # [K, B, m]
    de: Tensor  # [K, B, N]
    ds: Tensor  # [B, m]


def _hops_back(given: _Given, found: _Found) -> None:
    score, memory, weights, mask, attention, saved, grad_attention, grad_final, maps = given
    hops, batch, slots = attention.shape
    gate_rows, write_rows = (_aligned(w, memory.shape[-1]) for w in weights)
    block_n, block_d = _blocks(slots, memory.shape[-1])
    kernels.dynamic_memory_backward[(batch,)](
        score_ptr=score,
        gate_weight_ptr=gate_rows,
        write_weight_ptr=write_rows,
        mask_ptr=mask,
        attention_ptr=attention,
        saved_ptr=saved,
        grad_attention_ptr=grad_attention,
        grad_final_ptr=grad_final,
        maps_ptr=maps,
        batch=batch,
        hops=hops,
        weight_t=gate_rows.stride(0),
        ACC=accumulator(score.dtype),
        num_stages=1,
        **{f"{name}_ptr": tensor for name, tensor in found._asdict().items()},
        **strides("a", grad_attention, "0", "1", "2"),
        **strides("f", grad_final, "0", "1", "2"),
        **_common(memory, slots, block_n, block_d),
    )


def _plain_hops_back(given: _Given, found: _Found) -> None:
    """The backward kernel in torch's operations."""
    score, memory, weights, mask, attention, saved, grad_attention, grad_final, maps = given
    dz, du, de, ds = found
    width, dtype = memory.shape[-1], dz.dtype
    whole, score = memory.to(dtype), score.to(dtype)
    slots = whole
    if mask is not None:
        slots = whole.expand(len(score), -1, -1).masked_fill((mask == 0)[..., None], 0)
    d_A, d_B = torch.zeros_like(score), torch.zeros_like(score)
    if grad_final is not None:
        d_A, d_B = (grad_final * whole).sum(1), grad_final.to(dtype).sum(1)
    ds.zero_()
    for k in reversed(range(attention.shape[0])):
        (A, B), (g, w, u) = maps[k].unbind(1), saved[k].unbind(1)
        dz[k, :, 0] = (d_B * (w - B) - d_A * A) * g * (1 - g)
        dz[k, :, 1] = d_B * g * (1 - w * w)
        of_gate, of_write = (
            dz[k, :, n] @ weight[:, :width].to(dtype) for n, weight in enumerate(weights)
        )
        dr = of_gate + of_write
        d_A, d_B = (1 - g) * d_A + dr * u, (1 - g) * d_B + _where_filled(mask, dr)
        du[k] = dr * A
        da = (slots @ du[k][..., None]).squeeze(-1)
        if grad_attention is not None:
            da = da + grad_attention[k]
        a = attention[k].to(dtype)
        de[k] = a * (da - (a * da).sum(-1, keepdim=True))
        dp = (de[k][:, None] @ slots).squeeze(1)
        d_A = d_A + dp * score
        ds += dp * A


def _grad_memory(
    memory: Tensor,
    attention: Tensor,
    du: Tensor,
    de: Tensor,
    p: Tensor,
    grad_final: Tensor | None,
    maps: Tensor,
) -> Tensor:
    """sum_k a_k du_k^T + de_k p_k^T, over the batch too where all rows share the memory."""
    a = attention.to(du.dtype)
    if memory.dim() == 3:
        grad = torch.baddbmm(
            a.permute(1, 2, 0) @ du.transpose(0, 1), de.permute(1, 2, 0), p.transpose(0, 1)
        )
        if grad_final is not None:
            grad += grad_final * maps[:, 0, None]
        return grad.to(memory.dtype)
    grad = torch.addmm(
        a.flatten(0, 1).t() @ du.flatten(0, 1), de.flatten(0, 1).t(), p.flatten(0, 1)
    )
    if grad_final is not None:
        slots, width = memory.shape
        block_n, block_d = _blocks(slots, width)
        part = torch.empty_like(grad)
        kernels.dynamic_memory_shared_grad[(cdiv(slots, block_n),)](
            grad_final_ptr=grad_final,
            maps_ptr=maps,
            grad_ptr=part,
            batch=grad_final.shape[0],
            slots=slots,
            width=width,
            BN=block_n,
            BD=block_d,
            **strides("f", grad_final, "0", "1", "2"),
        )
        grad += part
    return grad.to(memory.dtype)
