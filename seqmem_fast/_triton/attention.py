r"""Attention with its weights on GPU: launchers of `attention` and `attention_backward`.

Formulas, shapes and errors: `ops/attention.py`; kernels: attention_kernels.py, for the forward in
float32 those of attention_split.py, between torch's products attention_softmax_kernels.py.
Leading dimensions of any number become two, each argument keeping its own strides: nothing that
broadcasts is copied, except a non-collapsible expansion over more than two. Gradients of what was
broadcast come out at full size and are summed by torch, in a fixed order.

Products run on tensor cores: 16-bit storage as it is, float32 as six products of bfloat16 forward
and three of TF32 backward, which keep its precision to a few units in the last place (one of TF32
where `torch.backends.cuda.matmul` allows it; AMD multiplies float32 itself). Float64, heads wider
than `tiles` can hold and backwards with many scores take torch's products with one kernel between
them, for the softmax or its gradient; their results are wide, so that scores are rounded no more
than within one kernel.

Where the package was built with nvcc, csrc/cuda/attention.cpp runs small calls in their place.

State of proof: as in lstm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.attention import scores_of
from . import attention_kernels as kernels
from . import attention_softmax_kernels as between
from . import attention_split as split
from .attention_call import Call, Operands, Tiles
from .common import cdiv, launcher, next_power_of_2, strides, wide, wide_product

_SCORES = 4096  # that a program of the softmax kernels holds
_MANY, _MANY_OF_16_BITS = 1 << 20, 1 << 22  # scores of a call


def tiles(width: int, dtype: torch.dtype, scores: int) -> Tiles | None:
    """The blocks for heads of this width (the larger of D and Dv), None for torch's products.

    The largest that spill nothing on any target that we compile for. In float32 a backward pays
    three TF32 products for one, which only a launch saved is worth: with many scores torch's are
    faster. So they are in 16 bits, where four warps walk over all keys alone.
    """
    narrow = dtype not in (torch.float32, torch.float64)
    if narrow and scores >= _MANY_OF_16_BITS and torch.version.hip is None:
        return None
    if dtype == torch.float64:
        return None
    if dtype == torch.float32:
        return Tiles(32, 32, 8) if width <= 64 and scores < _MANY else None
    if width <= 128:
        return Tiles(64, 64, 4) if width <= 64 else Tiles(64, 32, 8)
    return Tiles(32, 32, 8) if width <= 256 else None


@launcher
def attention(
    operands: Operands, scale: float | None, is_causal: bool, alpha: float
) -> tuple[Tensor, Tensor]:
    """`seqmem::attention` on GPU."""
    call = Call(operands, scale)
    weights = call.empty(call.queries, call.keys)
    output = call.empty(call.queries, call.value_width)
    if weights.numel() == 0:
        return output.zero_(), weights
    if alpha != 1:
        return _sparsely(call, operands.mask, is_causal, alpha)
    if split.serves(call):
        split.by_parts(call, is_causal, output, weights)
        return output, weights
    tile = tiles(max(call.width, call.value_width), weights.dtype, weights.numel())
    if tile is None:
        _by_products(call, is_causal, output, weights)
        return output, weights
    arguments = call.arguments(tile, tile.queries, call.queries)
    kernels.attention_forward[(call.batch * arguments["blocks"],)](
        q_ptr=call.query,
        k_ptr=call.key,
        v_ptr=call.value,
        mask_ptr=call.mask,
        output_ptr=output,
        weights_ptr=weights,
        CAUSAL=is_causal,
        ONE_BLOCK=call.keys <= tile.keys,
        **strides("q", call.query, "0", "1", "t"),
        **strides("k", call.key, "0", "1", "t"),
        **strides("v", call.value, "0", "1", "t"),
        **strides("m", call.mask, "0", "1", "i", "j"),
        **arguments,
    )
    return output, weights


@launcher
def attention_backward(
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    operands: Operands,
    weights: Tensor,
    scale: float | None,
    is_causal: bool,
    alpha: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`seqmem::attention_backward` on GPU: one kernel by rows, one by columns."""
    call, mask = Call(operands, scale), operands.mask
    of_mask = output_mask[3] and mask is not None and mask.is_floating_point()
    wanted = (*output_mask[:3], of_mask)
    sizes = (
        (call.queries, call.width),
        (call.keys, call.width),
        (call.keys, call.value_width),
        (call.queries, call.keys),
    )
    tile = tiles(max(call.width, call.value_width), weights.dtype, weights.numel())
    grads: list[Tensor | None]
    if weights.numel() == 0:
        grads = [
            call.empty(*size).zero_() if is_wanted else None
            for size, is_wanted in zip(sizes, wanted, strict=True)
        ]
    elif tile is None or alpha != 1:
        grads = _back_by_products(call, grad_output, grad_weights, weights, wanted, alpha)
    else:
        grads = [
            call.empty(*size) if is_wanted else None
            for size, is_wanted in zip(sizes, wanted, strict=True)
        ]
        _backward(call, tile, grad_output, grad_weights, weights, is_causal, grads)
    return tuple(
        weights.new_empty(0) if grad is None or like is None else grad.sum_to_size(like.shape)
        for grad, like in zip(grads, operands, strict=True)
    )


def _backward(
    call: Call,
    tile: Tiles,
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    weights: Tensor,
    is_causal: bool,
    grads: Sequence[Tensor | None],
) -> None:
    grad_query, grad_key, grad_value, grad_scores = grads
    g_weights = None if grad_weights is None else call.scores(grad_weights)
    delta = weights.new_empty(call.batch * call.queries, dtype=torch.float32)
    common = {
        "grad_output_ptr": None if grad_output is None else grad_output.contiguous(),
        "grad_weights_ptr": g_weights,
        "v_ptr": call.value,
        "mask_ptr": call.mask,
        "weights_ptr": weights.contiguous(),
        "delta_ptr": delta,
        **strides("g", g_weights, "0", "1", "i", "j"),
        **strides("v", call.value, "0", "1", "t"),
        **strides("m", call.mask, "0", "1", "i", "j"),
    }
    if grad_query is not None or grad_key is not None or grad_scores is not None:
        arguments = call.arguments(tile, tile.queries, call.queries)
        kernels.attention_backward_rows[(call.batch * arguments["blocks"],)](
            k_ptr=call.key,
            grad_q_ptr=grad_query,
            grad_scores_ptr=grad_scores,
            **strides("k", call.key, "0", "1", "t"),
            **common,
            **arguments,
        )
    if grad_key is not None or (grad_value is not None and grad_output is not None):
        arguments = call.arguments(tile, tile.keys, call.keys)
        kernels.attention_backward_columns[(call.batch * arguments["blocks"],)](
            q_ptr=call.query,
            grad_k_ptr=grad_key,
            grad_v_ptr=grad_value,
            CAUSAL=is_causal,
            **strides("q", call.query, "0", "1", "t"),
            **common,
            **arguments,
        )
    elif grad_value is not None:
        grad_value.zero_()


def _softmax_blocks(call: Call) -> dict[str, Any]:
    """What both softmax kernels take: a few rows a program, 4096 scores at a time."""
    keys = min(next_power_of_2(call.keys), _SCORES)
    rows = max(1, min(_SCORES // keys, 16))
    return {
        "queries": call.queries,
        "keys": call.keys,
        "heads": call.heads,
        "blocks": cdiv(call.queries, rows),
        "mask_ptr": call.mask,
        **strides("m", call.mask, "0", "1", "i", "j"),
        "ONE_BLOCK": call.keys <= keys,
        "BM": rows,
        "BN": keys,
        # A score for every thread: copies of one would be read while its place is written.
        "num_warps": max(1, min(8, rows * keys // 32)),
    }


def _by_products(call: Call, is_causal: bool, output: Tensor, weights: Tensor) -> None:
    """The forward by torch's products, one kernel between them."""
    query, key, value = (t.flatten(0, 1) for t in (call.query, call.key, call.value))
    matrices = (call.batch, call.queries, -1)
    scale = call.scale
    if weights.dtype == wide(weights.dtype):  # in place, with the scale in its own precision
        products, scale = weights.view(matrices), 1.0
        torch.baddbmm(products, query, key.mT, beta=0, alpha=call.scale, out=products)
    else:
        products = wide_product(query, key.mT)
    blocks = _softmax_blocks(call)
    between.attention_softmax[(call.batch * blocks["blocks"],)](
        scores_ptr=products, weights_ptr=weights, scale=scale, CAUSAL=is_causal, **blocks
    )
    torch.bmm(weights.view(matrices), value, out=output.view(matrices))


def _sparsely(
    call: Call, mask: Tensor | None, is_causal: bool, alpha: float
) -> tuple[Tensor, Tensor]:
    """The forward by torch's products, entmax's op between them."""
    products = wide_product(call.query.flatten(0, 1), call.key.flatten(0, 1).mT)
    products = products.view(*call.lead, *products.shape[-2:])
    scores = scores_of(products, mask, call.width, call.scale, is_causal)
    weights = torch.ops.seqmem.entmax(scores, None, alpha, -1).to(call.like.dtype)
    output = call.scores(weights) @ call.value
    return output.view(*call.lead, call.queries, call.value_width), weights


def _softmax_gradient(
    call: Call, p: Tensor, weights: Tensor, grad_weights: Tensor | None
) -> Tensor:
    """That of the scores, from the weights' by the outputs, p, and their own."""
    scores = p if p.dtype == call.like.dtype else torch.empty_like(p, dtype=call.like.dtype)
    blocks = _softmax_blocks(call)
    between.attention_softmax_backward[(call.batch * blocks["blocks"],)](
        p_ptr=p,
        weights_ptr=weights.contiguous(),
        grad_weights_ptr=grad_weights,
        grad_scores_ptr=scores,
        **strides("g", grad_weights, "0", "1", "i", "j"),
        **blocks,
    )
    return scores


def _entmax_gradient(call: Call, p: Tensor, weights: Tensor, alpha: float) -> Tensor:
    weights = weights.to(p.dtype)
    found = torch.ops.seqmem.entmax_backward(p, weights, None, alpha, -1, weights, [True, False])
    scores: Tensor = found[0].to(call.like.dtype)
    if call.mask is not None and call.mask.dtype == torch.uint8:
        scores = scores.masked_fill(call.mask == 0, 0)
    return scores


def _back_by_products(
    call: Call,
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    weights: Tensor,
    wanted: Sequence[bool],
    alpha: float,
) -> list[Tensor | None]:
    """The backward by torch's products, one kernel between them."""
    of_query, of_key, of_value, of_mask = wanted
    w = call.scores(weights)
    g = call.empty(call.queries, call.value_width).zero_() if grad_output is None else grad_output
    g = call.matrices(g)
    found: list[Tensor | None] = [None] * 4
    if of_query or of_key or of_mask:
        p = wide_product(g.flatten(0, 1), call.value.flatten(0, 1).mT).view_as(w)
        g_weights = None if grad_weights is None else call.scores(grad_weights)
        if alpha == 1:
            scores = _softmax_gradient(call, p, weights, g_weights)
        else:
            p = p if g_weights is None else p + g_weights
            scores = _entmax_gradient(call, p, w, alpha)
        found[0] = (scores @ call.key).mul_(call.scale) if of_query else None
        found[1] = (scores.mT @ call.query).mul_(call.scale) if of_key else None
        found[3] = scores if of_mask else None
    found[2] = w.mT @ g if of_value else None
    return [None if grad is None else grad.reshape(*call.lead, *grad.shape[-2:]) for grad in found]
