r"""Indexed attention in plain PyTorch: what ``seqmem::indexed_attention`` computes.

.. math::
    S_{ic} = \text{scale} \cdot q_i \cdot k_{j(i, c)}, \qquad W = \text{softmax}_c(S), \qquad
    O_i = \sum_c W_{ic} v_{j(i, c)}

over the places c of query i's list that name a key j(i, c); sparsemax or entmax may stand in
softmax's place.

Letters: B rows, Hq heads of queries, Hk of keys, Tq queries, Tk keys, D features of a query and a
key, Dv of a value, C places of a list. Child, Gray, Radford & Sutskever, arXiv 1904.10509, 2019;
top-k: Gupta et al., Memory-efficient transformers via top-k attention, arXiv 2106.06899, 2021.

Arguments are not checked: the op does that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Draw, Sample, Weighing, after_dropout, by_query, samples, weights_of_seen


def indexed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    **weighing: Any,
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Tq, D], k [B, Hk, Tk, D], v [B, Hk, Tk, Dv], index int64 [1 or B, 1 or Hq, Tq, C],
    -> output [B, Hq, Tq, Dv], weights [B, Hq, Tq, C]. The others are those of :class:`Weighing`."""
    how = Weighing(**weighing)
    keys, group = k.size(2), q.size(1) // k.size(1)
    index = index.expand(*q.shape[:3], -1)
    seen = (index >= 0) & (index < keys)
    if keys == 0:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    place = torch.where(seen, index, 0).flatten(2).unsqueeze(-1)

    def listed(x: Tensor) -> Tensor:
        """[B, Hq, Tq, C, features]"""
        rows = x.repeat_interleave(group, 1).gather(2, place.expand(-1, -1, -1, x.size(3)))
        return torch.where(seen.unsqueeze(-1), rows.unflatten(2, seen.shape[2:]), 0)

    k, v = listed(k), listed(v)
    weights = weights_of_seen((k @ q.unsqueeze(-1)).squeeze(-1), q.size(3), seen, how)
    weights, met = after_dropout(weights, how)
    return (met.unsqueeze(-2) @ v).squeeze(-2), weights


def top_k_keys(
    q: Tensor,
    k: Tensor,
    count: int,
    *,
    is_causal: bool = False,
    key_end: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """q [B, Hq, Tq, D], k [B, Hk, Tk, D], key_end [B] or [B, Tq] -> int64 [B, Hq, Tq, count]: the
    keys of the highest scores, the highest first, of equal ones the lower index; -1 beyond those
    that the query sees."""
    keys = k.size(2)
    factor = q.size(3) ** -0.5 if scale is None else scale
    scores = (factor * q) @ k.repeat_interleave(q.size(1) // k.size(1), 1).transpose(-1, -2)
    column = torch.arange(keys, device=q.device)
    seen = torch.ones_like(scores, dtype=torch.bool)
    if is_causal:
        seen = seen & (column <= torch.arange(q.size(2), device=q.device)[:, None])
    if key_end is not None:
        seen = seen & (column < by_query(key_end).unsqueeze(1))
    order = scores.sort(dim=-1, descending=True, stable=True).indices  # NaN first
    unseen_last = (~seen).gather(-1, order).sort(dim=-1, stable=True).indices
    order = order.gather(-1, unseen_last)[..., :count]
    found = torch.where(seen.gather(-1, order), order, -1)
    return F.pad(found, (0, count - found.size(-1)), value=-1)


@samples(3, 2, 6, 7, 4, 5)
def sample_inputs(draw: Draw, sizes: Sequence[int]) -> Iterator[Sample]:
    """Calls of :func:`indexed_attention` for every option; sizes = (B, Hk, Tq, Tk, D, Dv)."""
    batch, heads, queries, keys, *_ = sizes

    def index(*lists: int, count: int = 5, none: int = -1) -> Tensor:
        return draw.whole(none, keys, *lists, queries, count).to(draw.device)

    yield Sample("shared", (*draw.heads(sizes), index(1, 1)))
    yield Sample("by_head", (*draw.heads(sizes, 2), index(1, 2 * heads)), {"scale": 0.4})
    yield Sample("by_row", (*draw.heads(sizes, 3), index(batch, 1, count=9, none=0)))
    some = index(batch, 2 * heads, none=-3).clamp(min=-1)
    some[:, :, -1] = -1  # a query without any key
    yield Sample("each", (*draw.heads(sizes, 2), some))
    yield Sample(
        "sparsemax", (*draw.heads(sizes), index(1, 1)), {"normalizer": "sparsemax", "scale": 1.5}
    )
    yield Sample("dropout", (*draw.heads(sizes, 2), some), {"dropout": 0.4, "seed": draw.seed()})
    yield Sample("entmax", (*draw.heads(sizes, 2), some), {"normalizer": "entmax", "alpha": 1.3})
