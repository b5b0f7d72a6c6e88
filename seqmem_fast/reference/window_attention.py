r"""Window attention in plain PyTorch: what ``seqmem::window_attention`` computes.

.. math::
    S_{ic} = \text{scale} \cdot q_i \cdot k_{j(i, c)}, \qquad
    j(i, c) = \text{offset} + i + (c - \text{left}) \cdot \text{dilation}, \qquad
    W = \text{softmax}_c(S), \qquad O_i = \sum_c W_{ic} v_{j(i, c)}

over the columns c that are keys which query i may see, and the global keys besides; sparsemax or
entmax may stand in softmax's place.

Letters: B rows, Hq heads of queries, Hk of keys, Tq queries, Tk keys, D features of a query and a
key, Dv of a value, W = left + 1 + right columns, G global keys. Beltagy, Peters & Cohan,
Longformer, arXiv 2004.05150, 2020.

The keys of each query are written out: everything here works under ``torch.func`` and any order of
derivative, and a key that a query does not see may hold anything; nothing here is fast. Arguments
are not checked: the op does that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Draw, Sample, Weighing, after_dropout, by_query, samples, weights_of_seen


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    *,
    dilation: int = 1,
    offset: int = 0,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    global_keys: int = 0,
    **weighing: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, Hq, Tq, D], k [B, Hk, Tk, D], v [B, Hk, Tk, Dv], key_start and key_end [B] or [B, Tq]
    -> output [B, Hq, Tq, Dv], weights [B, Hq, Tq, W], global weights [B, Hq, Tq, G].

    The others are those of :class:`Weighing`; global keys drop as columns after the band's."""
    heads, queries, width = q.shape[1:]
    keys = k.size(2)
    left, right = bounds(left, right, dilation, offset, queries, keys)
    how = Weighing(**weighing)
    rows = torch.arange(queries, device=q.device)[:, None]
    columns = torch.arange(-left, right + 1, device=q.device)
    band = offset + rows + columns * dilation  # [Tq, W]: which key a column is
    far = torch.arange(global_keys, device=q.device).expand(queries, -1)
    index = torch.cat((far, band), 1)
    seen = torch.cat((far >= 0, (band >= global_keys) & (band < keys)), 1).unsqueeze(0)
    if key_start is not None:
        seen = seen & (index >= by_query(key_start))
    if key_end is not None:
        seen = seen & (index < by_query(key_end))
    seen = seen.unsqueeze(1)  # [1 or B, 1, Tq, G + W]
    if keys == 0:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    place = index.clamp(0, max(keys - 1, 0))
    group = heads // k.size(1)
    # [B, Hq, Tq, G + W, D or Dv]
    k, v = (
        torch.where(seen.unsqueeze(-1), x[:, :, place], 0).repeat_interleave(group, 1)
        for x in (k, v)
    )
    weights = weights_of_seen((k @ q.unsqueeze(-1)).squeeze(-1), width, seen, how)
    weights, met = after_dropout(weights, how, placed=lambda drop: drop.roll(global_keys, -1))
    output = (met.unsqueeze(-2) @ v).squeeze(-2)
    global_weights, weights = weights.split([global_keys, left + 1 + right], -1)
    return output, weights, global_weights


def bounds(
    left: int, right: int, dilation: int, offset: int, queries: int, keys: int
) -> tuple[int, int]:
    """Columns on either side; -1 is as far as any query's keys reach."""
    if left < 0:
        left = max(offset + queries - 1, 0) // dilation
    if right < 0:
        right = max(keys - 1 - offset, 0) // dilation
    return left, right


@samples(3, 2, 6, 7, 4, 5)
def sample_inputs(draw: Draw, sizes: Sequence[int]) -> Iterator[Sample]:
    """Calls of :func:`window_attention` that reach every option; sizes = (B, Hk, Tq, Tk, D, Dv)."""
    batch, _, queries, keys, *_ = sizes

    wide = max(2, keys // 3)
    yield Sample("causal", (*draw.heads(sizes), wide, 0))
    yield Sample("both_sides", (*draw.heads(sizes, 2), wide, 1), {"scale": 0.4})
    yield Sample("dilated", (*draw.heads(sizes), 2, 1), {"dilation": 2, "offset": 1})
    yield Sample("global", (*draw.heads(sizes, 2), 1, 1), {"global_keys": min(2, keys)})
    end = draw.whole(0, keys + 1, batch).to(draw.device)
    start = draw.whole(0, max(1, keys // 2), batch, queries).to(draw.device)
    start[:, -1] = keys  # a row without any key
    options = {"key_start": start, "key_end": end, "global_keys": min(2, keys)}
    yield Sample("ranges", (*draw.heads(sizes), 1, 2), options)
    yield Sample(
        "entmax",
        (*draw.heads(sizes), wide, 1),
        {"global_keys": 1, "normalizer": "entmax", "alpha": 1.3},
    )
    yield Sample(
        "sparsemax", (*draw.heads(sizes), wide, 2), {"scale": 1.5, "normalizer": "sparsemax"}
    )
    options = {"global_keys": min(2, keys), "dropout": 0.4, "seed": draw.seed(), "dilation": 2}
    yield Sample("dropout", (*draw.heads(sizes, 2), wide, 1), options)
    whole = {"global_keys": min(3, keys), "dilation": 3, "key_start": end // 2}
    yield Sample("everything", (*draw.heads(sizes, 3), -1, -1), whole)
