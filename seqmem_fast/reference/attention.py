r"""Attention with its weights in plain PyTorch: what ``seqmem::attention`` computes.

.. math::
    S = \text{scale} \cdot Q K^\top, \qquad
    S_{ij} = -10^9 \text{ where masked}, \qquad
    W = \text{softmax}_j(S), \qquad O = W V

Letters: Tq queries, Tk keys, D features of a query and a key, Dv features of a value.
Vaswani et al. 2017 (arXiv 1706.03762); the mask's -1e9 makes a row without any allowed key uniform.

Everything here works under ``torch.func`` and any order of derivative; nothing here is fast.
Arguments are not checked: the op does that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .common import Draw, Sample, attend, masked, normalized, samples


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    return_weights: bool = True,
    normalizer: str = "softmax",
    alpha: Tensor | float = 1.5,
) -> tuple[Tensor, Tensor | None]:
    """query [..., Tq, D], key [..., Tk, D], value [..., Tk, Dv], mask broadcast to [..., Tq, Tk]
    -> output [..., Tq, Dv], weights [..., Tq, Tk]; all leading dimensions broadcast."""
    products = query @ key.transpose(-2, -1)
    scores = scores_of(products, mask, query.size(-1), scale, is_causal)
    output, weights = attend(normalized(scores, normalizer, alpha), value)
    return output, weights if return_weights else None


def scores_of(
    products: Tensor, mask: Tensor | None, width: int, scale: float | None, is_causal: bool
) -> Tensor:
    """Of products [..., Tq, Tk] of queries and keys of this width."""
    scores = masked(products * (1 / math.sqrt(width) if scale is None else scale), mask)
    if is_causal:  # keys after a query take no part at all
        scores = scores.masked_fill(_ahead(scores), -math.inf)
    return scores


def _ahead(scores: Tensor) -> Tensor:
    """bool [Tq, Tk]: whether key j comes after query i."""
    rows, columns = scores.shape[-2:]
    i = torch.arange(rows, device=scores.device)
    j = torch.arange(columns, device=scores.device)
    return j > i[:, None]


@samples(3, 5, 7, 4, 6)
def sample_inputs(draw: Draw, sizes: Sequence[int]) -> Iterator[Sample]:
    """Calls of :func:`attention` that reach every option once; sizes = (B, Tq, Tk, D, Dv)."""
    batch, queries, keys, width, value_width = sizes
    q, k, v = draw(batch, queries, width), draw(batch, keys, width), draw(batch, keys, value_width)
    mask = draw.mask(batch, queries, keys)
    mask[:, -1] = False  # a row without any allowed key
    yield Sample("plain", (q, k, v, None))
    yield Sample("masked", (q, k, v, mask))
    yield Sample("integer_mask", (q, k, v, draw.mask(batch, 1, keys).int()), {"scale": 0.3})
    yield Sample("added_mask", (q, k, v, draw(batch, queries, keys)))
    yield Sample("causal", (q, k, v, None), {"is_causal": True})
    behind = draw.mask(batch, queries, keys)
    behind[..., 0] = True
    yield Sample("causal_masked", (q, k, v, behind), {"is_causal": True, "scale": -1.5})
    heads = 2
    yield Sample(
        "broadcast",
        (
            draw(batch, heads, queries, width),
            draw(heads, keys, width),
            draw(1, 1, keys, value_width),
            draw(heads, 1, keys),
        ),
        {},
    )
    yield Sample("sparsemax", (8 * q, k, v, None), {"normalizer": "sparsemax", "is_causal": True})
    yield Sample("entmax", (q, k, v, mask), {"normalizer": "entmax", "alpha": 1.3})
