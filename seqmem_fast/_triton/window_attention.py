r"""Window attention on GPU: launchers of `window_attention` and `window_attention_backward`.

Formulas, shapes and errors: `ops/window_attention.py`; the kernels: window_attention_kernels.py.
Products run on tensor cores, as in attention.py, but for float64. Heads wider than 128 features, 32
in float64, take plain PyTorch, which writes out the keys of each query.

NaN in a key or value that only some queries of a block see may reach the others.

State of proof: by the interpreter and the emulated PTX; on an H200 with softmax and global keys
(docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.common import Rule
from ..ops.window_attention import Operands, Options, _plain
from ..reference import window_attention as reference
from . import window_attention_kernels as kernels
from .common import cdiv, launcher, of_dropout, only, product_precision, through_reference, wide
from .normalizers import of_normalizer
from .sparse_attention import dense_rows, fits_heads, int_bound, of_heads, placed

_BLOCK = 32  # queries, and keys, of a block


def _common(operands: Operands, options: Options, rule: Rule) -> dict[str, Any]:
    """What every kernel takes."""
    q, k, v, left, right = operands
    dilation, offset = options.dilation, options.offset
    left, right = reference.bounds(left, right, dilation, offset, q.shape[2], k.shape[2])
    # Dropout's numbers take registers, too.
    narrow = q.dtype == torch.float64 or (rule.dropout and q.element_size() == 4)
    return {
        **of_heads(q, k, v, options.scale, rule.dropout),
        **of_normalizer(rule.alpha, q),
        "left": left,
        "right": right,
        "dilation": dilation,
        "offset": offset,
        "count": options.global_keys,
        "PRECISION": product_precision(q.dtype, q.device),
        "BM": 16 if q.dtype == torch.float64 else _BLOCK,
        "BN": 16 if narrow else _BLOCK,
    }


def _by_queries(common: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Programs of a head, and how they are counted."""
    classes = min(common["dilation"], common["queries"])
    blocks = cdiv(cdiv(common["queries"], common["dilation"]), common["BM"])
    return classes * blocks, {"classes": classes, "blocks": blocks}


@launcher
def window_attention(
    operands: Operands, options: Options, rule: Rule, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`seqmem::window_attention` on GPU."""
    q, k, v, *_ = operands
    if not fits_heads(q, v):
        found = _plain(*operands, *options, *rule)
        return found if need_weights else (found[0], q.new_empty(0), q.new_empty(0))
    common = _common(operands, options, rule)
    if rule.alpha != 1:
        common["BM"] = 16  # a threshold takes registers, too
    shape = q.shape[:3]
    output = q.new_empty(*shape, v.shape[3])
    columns = common["left"] + 1 + common["right"]
    weights = q.new_zeros((*shape, columns) if need_weights else 0)
    of_global = q.new_empty((*shape, options.global_keys) if need_weights else 0)
    q, k, v = dense_rows(q, k, v)
    programs, counted = _by_queries(common)
    if shape.numel():
        kernels.window_attention_forward[(shape[0] * shape[1] * programs,)](
            output_ptr=output,
            weights_ptr=weights if need_weights else None,
            global_ptr=of_global if need_weights else None,
            **int_bound("start", options.key_start),
            **int_bound("end", options.key_end),
            **placed(q=q, k=k, v=v),
            **counted,
            **of_dropout(rule.dropout, rule.seed),
            **common,
        )
    return output, weights, of_global


@launcher
def window_attention_backward(
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    grad_global_weights: Tensor | None,
    operands: Operands,
    options: Options,
    rule: Rule,
    weights: Tensor,
    global_weights: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`seqmem::window_attention_backward` on GPU: one kernel by rows, one by columns."""
    q, k, v, *sides = operands
    seeds = (grad_output, grad_weights, grad_global_weights)
    if not fits_heads(q, v):
        return through_reference(
            lambda *heads: _plain(*heads, *sides, *options, *rule), (q, k, v), seeds, output_mask
        )
    common = _common(operands, options, rule)
    rows, heads, queries = q.shape[:3]
    grads = [q.new_zeros(t.shape) for t in (q, k, v)]
    if rows * heads * queries and k.shape[2]:
        _backward(common, seeds, (q, k, v), (weights, global_weights), grads)
    return only(output_mask, grads)


def _backward(
    common: dict[str, Any],
    seeds: Sequence[Tensor | None],
    operands: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> None:
    q, k, v = dense_rows(*operands)
    of_output, of_weights, of_global = (None if t is None else t.contiguous() for t in seeds)
    weights, global_weights = (t.contiguous() for t in saved)
    delta = q.new_empty(q.shape[:3], dtype=wide(q.dtype))
    programs, counted = _by_queries(common)
    kernels.window_attention_backward_rows[(q.shape[0] * q.shape[1] * programs,)](
        grad_output_ptr=of_output,
        grad_weights_ptr=of_weights,
        grad_global_ptr=of_global,
        weights_ptr=weights,
        global_ptr=global_weights,
        delta_ptr=delta,
        grad_q_ptr=grads[0],
        **placed(k=k, v=v),
        **counted,
        **{**common, "BN": common["BN"] if q.element_size() == 2 else 16},  # spills nothing
    )
    classes = min(common["dilation"], common["keys"])
    blocks = cdiv(cdiv(common["keys"], common["dilation"]), common["BN"])
    for is_global, own, given, counts in (
        (False, weights, of_weights, (classes, blocks)),
        (True, global_weights, of_global, (1, cdiv(common["count"], common["BN"]))),
    ):
        if counts[1] == 0:
            continue
        programs = k.shape[0] * k.shape[1] * counts[0] * counts[1]
        kernels.window_attention_backward_columns[(programs,)](
            grad_output_ptr=of_output,
            grad_weights_ptr=given,
            weights_ptr=own,
            delta_ptr=delta,
            grad_k_ptr=grads[1],
            grad_v_ptr=grads[2],
            classes=counts[0],
            blocks=counts[1],
            GLOBAL=is_global,
            **placed(q=q, v=v),
            **{**common, "BM": common["BN"]},
        )
