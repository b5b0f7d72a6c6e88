r"""Block-sparse attention in plain PyTorch: what ``seqmem::block_sparse_attention`` computes.

.. math::
    S_{ij} = \text{scale} \cdot q_i \cdot k_j, \qquad W = \text{softmax}_j(S), \qquad
    O_i = \sum_j W_{ij} v_j

over the keys j of the blocks that the list names for query i's block, before the query's end;
sparsemax or entmax may stand in softmax's place. Weights come back block by block.

Letters: B rows, Hq heads of queries, Hk of keys, Tq queries, Tk keys, D features of a query and a
key, Dv of a value, N places of a list, Bq queries and Bk keys of a block. Child, Gray, Radford &
Sutskever, arXiv 1904.10509, 2019; Zaheer et al., Big Bird, arXiv 2007.14062, 2020.

This is dense attention with a mask: every score is computed. Arguments are not checked: the op does
that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Draw, Sample, Weighing, after_dropout, by_query, samples, weights_of_seen


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block: tuple[int, int],
    *,
    is_causal: bool = False,
    key_end: Tensor | None = None,
    **weighing: Any,
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Tq, D], k [B, Hk, Tk, D], v [B, Hk, Tk, Dv], blocks int64 [1 or B, 1 or Hq, N, 2],
    key_end [B] or [B, Tq] -> output [B, Hq, Tq, Dv], weights [B, Hq, N, Bq, Bk]. The others are
    those of :class:`Weighing`."""
    queries, width = q.shape[2:]
    keys = k.size(2)
    how = Weighing(**weighing)
    rows, columns = (-(-n // size) for n, size in zip((queries, keys), block, strict=True))
    there, place = _places(blocks, rows, columns)
    listed = blocks.new_zeros((*blocks.shape[:2], rows * columns + 1), dtype=torch.bool)
    listed = listed.scatter(2, torch.where(there, place, rows * columns), True)[..., :-1]
    seen = (
        listed.unflatten(2, (rows, columns))
        if rows * columns
        else listed.new_zeros((*blocks.shape[:2], rows, columns))
    )
    seen = seen.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)
    seen = seen[:, :, :queries, :keys]
    column = torch.arange(keys, device=q.device)
    if is_causal:
        seen = seen & (column <= torch.arange(queries, device=q.device)[:, None])
    if key_end is not None:
        seen = seen & (column < by_query(key_end).unsqueeze(1))
    group = q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    weights = weights_of_seen(q @ k.transpose(-1, -2), width, seen, how)

    def dense(listed: Tensor) -> Tensor:
        return to_dense(listed.to(q.dtype), blocks, block, queries, keys) > 0

    shape = *weights.shape[:2], blocks.size(2), *block
    weights, met = after_dropout(weights, how, shape, dense)
    output = torch.where(seen.any(-1, keepdim=True), met @ v, 0)
    return output, to_blocks(weights, blocks, block)


def to_blocks(weights: Tensor, blocks: Tensor, block: tuple[int, int]) -> Tensor:
    """weights [B, Hq, Tq, Tk] -> those of the listed blocks [B, Hq, N, Bq, Bk]."""
    rows, columns = (-(-n // size) for n, size in zip(weights.shape[2:], block, strict=True))
    rest = rows * block[0] - weights.size(2), columns * block[1] - weights.size(3)
    cut = F.pad(weights, (0, rest[1], 0, rest[0])).reshape(
        *weights.shape[:2], rows, block[0], columns, block[1]
    )
    cut = F.pad(cut.transpose(3, 4).flatten(2, 3), (0, 0, 0, 0, 0, 1))  # the last one is none
    there, place = _places(blocks, rows, columns)
    place = torch.where(there, place, rows * columns)
    place = place.expand(*weights.shape[:2], -1)[..., None, None]
    return cut.gather(2, place.expand(-1, -1, -1, *block))


def to_dense(
    weights: Tensor, blocks: Tensor, block: tuple[int, int], queries: int, keys: int
) -> Tensor:
    """The inverse: zero where no block is listed."""
    rows, columns = (-(-n // size) for n, size in zip((queries, keys), block, strict=True))
    there, place = _places(blocks, rows, columns)
    place = torch.where(there, place, rows * columns)
    place = place.expand(*weights.shape[:2], -1)[..., None, None].expand(-1, -1, -1, *block)
    dense = weights.new_zeros(*weights.shape[:2], rows * columns + 1, *block)
    dense = dense.scatter(2, place, weights)[:, :, :-1]
    dense = dense.reshape(*weights.shape[:2], rows, columns, *block).transpose(3, 4)
    dense = dense.reshape(*weights.shape[:2], rows * block[0], columns * block[1])
    return dense[:, :, :queries, :keys]


def _places(blocks: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Whether a place holds a block, and which of the grid's, row by row."""
    row, column = blocks.unbind(-1)
    there = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return there, row * columns + column


def block_list(block_mask: Tensor) -> Tensor:
    """bool [.., nQ, nK], of up to 4 dimensions -> int64 [1 or B, 1 or Hq, N, 2]."""
    mask = block_mask[(None,) * (4 - block_mask.dim())]
    heads, grid = mask.shape[:2], mask.flatten(2)
    if heads.numel() == 1:
        return mask[0, 0].nonzero()[None, None]
    count = grid.sum(-1)
    widest = int(count.max()) if count.numel() else 0
    order = grid.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :widest]
    pairs = torch.stack((order // max(mask.size(3), 1), order % max(mask.size(3), 1)), -1)
    known = torch.arange(widest, device=mask.device) < count[..., None]
    return torch.where(known[..., None], pairs, -1)


@samples(3, 2, 6, 7, 4, 5)
def sample_inputs(draw: Draw, sizes: Sequence[int]) -> Iterator[Sample]:
    """Calls of :func:`block_sparse_attention` that reach every option; sizes = (B, Hk, Tq, Tk, D,
    Dv)."""
    batch, heads, queries, keys, *_ = sizes
    block = max(1, queries // 3), max(1, keys // 3)
    rows, columns = -(-queries // block[0]), -(-keys // block[1])

    def some(*lists: int) -> tuple[Tensor, tuple[int, int]]:
        mask = draw.mask(*lists, rows, columns, share=0.6)
        mask[..., 0, 0] = True
        return block_list(mask), block

    end = draw.whole(0, keys + 1, batch).to(draw.device)
    yield Sample("shared", (*draw.heads(sizes), *some()))
    yield Sample("by_head", (*draw.heads(sizes, 2), *some(2 * heads)), {"scale": 0.4})
    yield Sample("by_row", (*draw.heads(sizes), *some(batch, 1)), {"key_end": end})
    each = draw.whole(0, keys + 1, batch, queries).to(draw.device)
    options = {"is_causal": True, "key_end": each}
    yield Sample("causal", (*draw.heads(sizes, 2), *some(batch, 2 * heads)), options)
    yield Sample(
        "sparsemax", (*draw.heads(sizes), *some()), {"normalizer": "sparsemax", "scale": 1.5}
    )
    options = {"is_causal": True, "dropout": 0.4, "seed": draw.seed()}
    yield Sample("dropout", (*draw.heads(sizes, 2), *some(2 * heads)), options)
    options = {"normalizer": "entmax", "alpha": 1.3, "key_end": end}
    yield Sample("entmax", (*draw.heads(sizes, 2), *some(2 * heads)), options)
