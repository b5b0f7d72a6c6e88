r"""Block-sparse attention on GPU: launchers of `block_sparse_attention` and its backward.

Formulas, shapes and errors: `ops/block_sparse_attention.py`; the kernels:
block_sparse_attention_kernels.py. Products run on tensor cores, as in attention.py, but for
float64. Heads wider than 128 features, 32 in float64, take plain PyTorch, which computes every
score.

NaN in a key or value that only some queries of a block see may reach the others.

State of proof: by the interpreter and the emulated PTX; not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.block_sparse_attention import Operands, Options, _plain
from ..ops.common import Rule
from . import block_sparse_attention_kernels as kernels
from .common import (
    cdiv,
    launcher,
    next_power_of_2,
    of_dropout,
    only,
    product_precision,
    through_reference,
    wide,
)
from .normalizers import SOFTMAX, of_normalizer
from .sparse_attention import (
    begins_of,
    dense_rows,
    fits_heads,
    int_bound,
    of_heads,
    of_lists,
    placed,
)

_BLOCK = 32  # most queries, and keys, of a part of a block


def _part(size: int, q: Tensor) -> int:
    most = 16 if q.dtype == torch.float64 else _BLOCK
    return min(most, max(16, next_power_of_2(size)))


def _common(operands: Operands, options: Options, rule: Rule) -> dict[str, Any]:
    """What every kernel takes."""
    q, k, v, blocks, *block = operands
    queries, keys = q.shape[2], k.shape[2]
    flat = blocks.contiguous().flatten(0, 1)
    rows = cdiv(queries, block[0])
    row = flat[..., 0]
    row = torch.where((row >= 0) & (row < rows), row, rows)
    return {
        **of_heads(q, k, v, options.scale, rule.dropout),
        **of_normalizer(rule.alpha, q),
        "blocks_ptr": flat,
        "rows_ptr": begins_of(row, rows),
        "places": blocks.shape[2],
        "row_blocks": rows,
        "column_blocks": cdiv(keys, block[1]),
        **of_lists(blocks.shape[:2]),
        "block_queries": block[0],
        "block_keys": block[1],
        "PRECISION": product_precision(q.dtype, q.device),
        "BM": _part(block[0], q),
        "BN": _part(block[1], q),
    }


@launcher
def block_sparse_attention(
    operands: Operands, options: Options, rule: Rule, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """`seqmem::block_sparse_attention` on GPU."""
    q, k, v, blocks, *block = operands
    if not fits_heads(q, v):
        found = _plain(*operands, *options, *rule)
        return found if need_weights else (found[0], q.new_empty(0))
    shape = q.shape[:3]
    output = q.new_empty(*shape, v.shape[3])
    weights = q.new_zeros((*shape[:2], blocks.shape[2], *block) if need_weights else 0)
    if shape.numel():
        common = _common(operands, options, rule)
        if rule.alpha != 1:
            common["BN"] = 16  # a threshold takes registers, too
        q, k, v = dense_rows(q, k, v)
        programs = common["row_blocks"] * cdiv(operands.block_queries, common["BM"])
        kernels.block_sparse_attention_forward[(shape[0] * shape[1] * programs,)](
            output_ptr=output,
            weights_ptr=weights if need_weights else None,
            CAUSAL=options.is_causal,
            **int_bound("end", options.key_end),
            **placed(q=q, k=k, v=v),
            **of_dropout(rule.dropout, rule.seed),
            **common,
        )
    return output, weights


@launcher
def block_sparse_attention_backward(
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    operands: Operands,
    options: Options,
    rule: Rule,
    weights: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`seqmem::block_sparse_attention_backward` on GPU: one kernel by rows, one by columns."""
    q, k, v, *pattern = operands
    seeds = (grad_output, grad_weights)
    if not fits_heads(q, v):
        return through_reference(
            lambda *heads: _plain(*heads, *pattern, *options, *rule),
            (q, k, v),
            seeds,
            output_mask,
        )
    grads = [q.new_zeros(t.shape) for t in (q, k, v)]
    if q.shape[:3].numel() and k.shape[2]:
        _backward(_common(operands, options, rule), seeds, (q, k, v), weights, grads)
    return only(output_mask, grads)


def _backward(
    common: dict[str, Any],
    seeds: Sequence[Tensor | None],
    operands: Sequence[Tensor],
    weights: Tensor,
    grads: Sequence[Tensor],
) -> None:
    q, k, v = dense_rows(*operands)
    of_output, of_weights = (None if t is None else t.contiguous() for t in seeds)
    weights = weights.contiguous()
    delta = q.new_empty(q.shape[:3], dtype=wide(q.dtype))
    programs = common["row_blocks"] * cdiv(common["block_queries"], common["BM"])
    kernels.block_sparse_attention_backward_rows[(q.shape[0] * q.shape[1] * programs,)](
        grad_output_ptr=of_output,
        grad_weights_ptr=of_weights,
        weights_ptr=weights,
        delta_ptr=delta,
        grad_q_ptr=grads[0],
        **placed(k=k, v=v),
        **{**common, "BN": common["BN"] if q.element_size() == 2 else 16},  # spills nothing
    )
    del common["rows_ptr"]
    columns = common["column_blocks"]
    column = common["blocks_ptr"][..., 1]
    column = torch.where((column >= 0) & (column < columns), column, columns)
    column, by_key = column.sort(dim=-1, stable=True)
    programs = columns * cdiv(common["block_keys"], common["BN"])
    kernels.block_sparse_attention_backward_columns[(k.shape[0] * k.shape[1] * programs,)](
        grad_output_ptr=of_output,
        grad_weights_ptr=of_weights,
        by_key_ptr=by_key,
        columns_ptr=begins_of(column, columns),
        weights_ptr=weights,
        delta_ptr=delta,
        grad_k_ptr=grads[1],
        grad_v_ptr=grads[2],
        **placed(q=q, v=v),
        **{**common, "BM": common["BM"] if common["KIND"] == SOFTMAX.value else 16},
    )
