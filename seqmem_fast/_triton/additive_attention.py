r"""Additive attention on GPU: launchers of `additive_attention` and `additive_attention_backward`.

Formulas, shapes and errors: `ops/additive_attention.py`. The Tq Tk A hyperbolic tangents are nearly
all of the work and never reach memory. Forward: one kernel gives the scores, torch does softmax and
the product with the values. Backward: torch gives the scores' gradient dS, then one kernel, run
once by rows and once by columns, recomputes t = tanh(q_i + k_j) and sums

    dq_i = v (sum_j dS_ij (1 - t^2)),   dk_j = v (sum_i dS_ij (1 - t^2)),   dv = sum_ij dS_ij t

without atomics: each program owns its rows, dv is summed per program and then over programs, in a
fixed order. Memory is a few times Tq Tk of the wide dtype (float32, float64 for float64).

State of proof: as in lstm.py.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    accumulator,
    as_bytes,
    cdiv,
    launcher,
    masked_scores,
    moved,
    next_power_of_2,
    place,
    strides,
    tanh,
    two_leading,
    wide,
)

# Sizes that change from call to call: specialising on them would only compile the same code twice.
VARYING = ("queries", "keys", "own", "others", "heads", "blocks", "width_blocks")

_ROWS = 16  # of a block at most, queries or keys whose gradients it owns
_FEATURES = 32  # of a block of the backward


class Block(NamedTuple):
    """What one program of four warps has in registers at once."""

    rows: int
    others: int
    features: int


def forward_block(queries: int) -> Block:
    """Few queries, as of a decoder's step, leave more programs and more features to each."""
    rows = min(_ROWS, next_power_of_2(max(1, queries)))
    return Block(rows, 64, 4) if rows == _ROWS else Block(rows, 16, max(4, 64 // rows))


def backward_block(own: int) -> Block:
    """Two sums of this size are kept."""
    rows = min(_ROWS, next_power_of_2(max(1, own)))
    return Block(rows, min(32, 64 // rows), _FEATURES)


@triton.jit(do_not_specialize=VARYING)
def additive_scores(
    q_ptr,  # [Z0, Z1, Tq, A]
    k_ptr,  # [Z0, Z1, Tk, A]
    v_ptr,  # [A]
    mask_ptr,  # [Z0, Z1, Tq, Tk] uint8 (0 = masked) or floating (added), or None
    scores_ptr,  # [Z0 * Z1, Tq, Tk], dense, of the wide dtype
    queries, keys, width,
    heads,  # Z1
    blocks,  # of queries
    q_0, q_1, q_t,
    k_0, k_1, k_t,
    m_0, m_1, m_i, m_j,
    ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """Masked scores of BM queries and BN keys, BA features at a time, whose sums come last."""
    z, i = place(blocks, BM)
    j = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    q_at = moved(q_ptr, z, heads, q_0, q_1) + i[:, None] * q_t
    k_at = moved(k_ptr, z, heads, k_0, k_1) + j[:, None] * k_t
    parts = tl.zeros([BM, BN, BA], ACC)
    for start in range(0, width, BA):
        a = start + tl.arange(0, BA)
        inside = (a < width)[None, :]
        q = tl.load(q_at + a[None, :], mask=(i < queries)[:, None] & inside, other=0.0).to(ACC)
        k = tl.load(k_at + a[None, :], mask=(j < keys)[:, None] & inside, other=0.0).to(ACC)
        v = tl.load(v_ptr + a, mask=a < width, other=0.0).to(ACC)
        parts += v[None, None, :] * tanh(q[:, None, :] + k[None, :, :])
    s = tl.sum(parts, axis=2)
    mask_ptr = moved(mask_ptr, z, heads, m_0, m_1)
    there = (i < queries)[:, None] & (j < keys)[None, :]
    s = masked_scores(s, mask_ptr, i, j, m_i, m_j, there, there)
    tl.store(scores_ptr + (z * queries + i[:, None]) * keys + j[None, :], s, mask=there)


@triton.jit(do_not_specialize=VARYING)
def additive_backward(
    own_ptr,  # [Z0, Z1, own, A]: queries, or keys
    other_ptr,  # [Z0, Z1, others, A]: keys, or queries
    v_ptr,  # [A]
    grad_scores_ptr,  # [Z0 * Z1, Tq, Tk], of the wide dtype
    grad_own_ptr,  # [Z0 * Z1, own, A], dense, or None
    grad_v_ptr,  # [Z0 * Z1 * blocks, A] partial sums of the wide dtype, or None
    own, others, width, heads,
    blocks,  # of own
    own_0, own_1, own_t,
    other_0, other_1, other_t,
    s_own, s_other,  # strides of grad_scores
    ACC: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """The gradients of BM own rows and BA features over all others, BO at a time."""
    z, i = place(blocks, BM)
    a = tl.program_id(1) * BA + tl.arange(0, BA)
    mine = (i < own)[:, None] & (a < width)[None, :]
    at = moved(own_ptr, z, heads, own_0, own_1) + i[:, None] * own_t + a[None, :]
    x = tl.load(at, mask=mine, other=0.0).to(ACC)
    v = tl.load(v_ptr + a, mask=a < width, other=0.0).to(ACC)
    other_ptr = moved(other_ptr, z, heads, other_0, other_1)
    ds_at = grad_scores_ptr + z * own * others + i[:, None] * s_own
    grads = tl.zeros([BM, BO, BA], ACC)
    grads_v = tl.zeros([BM, BO, BA], ACC)
    for start in range(0, others, BO):
        j = start + tl.arange(0, BO).to(tl.int64)
        there = (j < others)[:, None] & (a < width)[None, :]
        y = tl.load(other_ptr + j[:, None] * other_t + a[None, :], mask=there, other=0.0).to(ACC)
        known = (i < own)[:, None] & (j < others)[None, :]
        ds = tl.load(ds_at + j[None, :] * s_other, mask=known, other=0.0)[:, :, None]
        t = tanh(x[:, None, :] + y[None, :, :])
        grads += ds * (1.0 - t * t)
        if grad_v_ptr is not None:
            grads_v += ds * t
    grad = tl.sum(grads, axis=1)
    grad_v = tl.sum(grads_v, axis=1)
    if grad_own_ptr is not None:
        to = grad_own_ptr + (z * own + i[:, None]) * width + a[None, :]
        tl.store(to, (grad * v[None, :]).to(grad_own_ptr.dtype.element_ty), mask=mine)
    if grad_v_ptr is not None:
        to = grad_v_ptr + tl.program_id(0).to(tl.int64) * width + a
        tl.store(to, tl.sum(grad_v, axis=0), mask=a < width)


class Operands(NamedTuple):
    """Of both ops."""

    query: Tensor
    key: Tensor
    value: Tensor
    score_weight: Tensor
    mask: Tensor | None


class _Call:
    """One call's sizes, and its arguments as [Z0, Z1, rows, columns]."""

    def __init__(self, operands: Operands) -> None:
        query, key, value, _, mask = operands
        mask_lead = () if mask is None else mask.shape[:-2]
        shapes = [t.shape[:-2] for t in (query, key, value)]
        self.lead = tuple(torch.broadcast_shapes(*shapes, mask_lead))
        self.queries, self.width = query.shape[-2:]
        self.keys, self.value_width = value.shape[-2:]
        self.batch = math.prod(self.lead)
        self.heads = self.lead[-1] if self.lead else 1
        self.query, self.key = (self.dense_rows(t) for t in (query, key))
        self.mask = None
        if mask is not None:
            whole = as_bytes(mask).expand(*self.lead, self.queries, self.keys)
            self.mask = two_leading(whole, self.lead)

    def dense_rows(self, t: Tensor) -> Tensor:
        return two_leading(t if t.stride(-1) == 1 else t.contiguous(), self.lead)


@launcher
def additive_attention(operands: Operands) -> tuple[Tensor, Tensor]:
    """`seqmem::additive_attention` on GPU."""
    call = _Call(operands)
    query, _, value, score_weight, _ = operands
    scores = query.new_empty(*call.lead, call.queries, call.keys, dtype=wide(query.dtype))
    if scores.numel() == 0:
        output = query.new_zeros(*call.lead, call.queries, call.value_width)
        return output, scores.to(query.dtype)
    block = forward_block(call.queries)
    blocks = cdiv(call.queries, block.rows)
    additive_scores[(call.batch * blocks, cdiv(call.keys, block.others))](
        q_ptr=call.query,
        k_ptr=call.key,
        v_ptr=score_weight.contiguous(),
        mask_ptr=call.mask,
        scores_ptr=scores,
        queries=call.queries,
        keys=call.keys,
        width=call.width,
        heads=call.heads,
        blocks=blocks,
        ACC=accumulator(query.dtype),
        BM=block.rows,
        BN=block.others,
        BA=block.features,
        num_warps=4,
        **strides("q", call.query, "0", "1", "t"),
        **strides("k", call.key, "0", "1", "t"),
        **strides("m", call.mask, "0", "1", "i", "j"),
    )
    weights = scores.softmax(-1).to(query.dtype)
    return weights @ value, weights


@launcher
def additive_attention_backward(
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    operands: Operands,
    weights: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`seqmem::additive_attention_backward` on GPU."""
    query, key, value, score_weight, mask = operands
    of_query, of_key, of_value, of_score_weight, of_mask = output_mask
    of_mask = of_mask and mask is not None and mask.is_floating_point()
    call = _Call(operands)
    dtype = query.dtype
    none = query.new_empty(0)
    w = weights.to(wide(dtype))
    p = torch.zeros_like(w) if grad_output is None else (grad_output @ value.mT).to(w.dtype)
    if grad_weights is not None:
        p = p + grad_weights
    scores = w * (p - (w * p).sum(-1, keepdim=True))
    if mask is not None and not mask.is_floating_point():
        scores = scores.masked_fill(mask == 0, 0)
    scores = scores.contiguous()
    grad_query, grad_key, grad_value, grad_v = none, none, none, none
    if of_query or of_score_weight:
        wanted = of_query, of_score_weight
        grad_query, grad_v = _sums(call, call.query, call.key, scores, score_weight, *wanted)
    if of_key:
        grad_key, _ = _sums(call, call.key, call.query, scores.mT, score_weight, True, False)
    if of_value and grad_output is not None:
        grad_value = (weights.mT @ grad_output).sum_to_size(value.shape)
    elif of_value:
        grad_value = torch.zeros_like(value)
    return (
        grad_query.sum_to_size(query.shape) if of_query else none,
        grad_key.sum_to_size(key.shape) if of_key else none,
        grad_value,
        grad_v.to(dtype) if of_score_weight else none,
        scores.sum_to_size(mask.shape).to(dtype) if mask is not None and of_mask else none,
    )


def _sums(
    call: _Call,
    own: Tensor,
    other: Tensor,
    scores: Tensor,
    score_weight: Tensor,
    of_own: bool,
    of_v: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `own` and of the score weight; scores [..., own, others] are dense or a .mT."""
    rows, others = own.shape[2], other.shape[2]
    block = backward_block(rows)
    blocks = cdiv(rows, block.rows)
    grad_own = score_weight.new_empty(*call.lead, rows, call.width)
    grad_v = scores.new_empty(call.batch * blocks, call.width)
    if grad_v.numel() > 0:
        additive_backward[(call.batch * blocks, cdiv(call.width, block.features))](
            own_ptr=own,
            other_ptr=other,
            v_ptr=score_weight.contiguous(),
            grad_scores_ptr=scores,
            grad_own_ptr=grad_own if of_own else None,
            grad_v_ptr=grad_v if of_v else None,
            own=rows,
            others=others,
            width=call.width,
            heads=call.heads,
            blocks=blocks,
            s_own=scores.stride(-2),
            s_other=scores.stride(-1),
            ACC=accumulator(own.dtype),
            BM=block.rows,
            BO=block.others,
            BA=block.features,
            num_warps=4,
            **strides("own", own, "0", "1", "t"),
            **strides("other", other, "0", "1", "t"),
        )
    return grad_own, grad_v.sum(0) if of_v else grad_v
