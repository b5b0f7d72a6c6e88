r"""Additive attention in plain PyTorch: what ``seqmem::additive_attention`` computes.

.. math::
    e_{ij} = \sum_a v_a \tanh(q_{ia} + k_{ja}), \qquad
    e_{ij} = -10^9 \text{ where masked}, \qquad
    W = \operatorname{softmax}_j(e), \qquad O = W V

Letters: Tq queries, Tk keys, A features that both were projected to, Dv features of a value.
Bahdanau, Cho & Bengio 2014 (arXiv 1409.0473, appendix A.1.2), where q_i = W s_{i-1}, k_j = U h_j.

Everything here works under ``torch.func`` and any order of derivative; nothing here is fast, and
the [..., Tq, Tk, A] intermediates are all in memory. Arguments are not checked: the op does that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .common import Draw, Sample, attend, masked, samples


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """query [..., Tq, A], key [..., Tk, A], value [..., Tk, Dv], score_weight [A] and a mask that
    broadcasts to [..., Tq, Tk] -> output [..., Tq, Dv], weights [..., Tq, Tk]; leading dimensions
    broadcast."""
    hidden = torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3))  # [..., Tq, Tk, A]
    return attend(torch.softmax(masked(hidden @ score_weight, mask), -1), value)


@samples(3, 5, 7, 6, 4)
def sample_inputs(draw: Draw, sizes: Sequence[int]) -> Iterator[Sample]:
    """Calls that reach every option of the op once; sizes = (B, Tq, Tk, A, Dv)."""
    batch, queries, keys, width, value_width = sizes
    q, k, v = draw(batch, queries, width), draw(batch, keys, width), draw(batch, keys, value_width)
    score_weight = draw(width)
    mask = draw.mask(batch, queries, keys)
    mask[:, queries - 1 :] = False  # a row without any allowed key
    yield Sample("plain", (q, k, v, score_weight, None))
    yield Sample("masked", (q, k, v, score_weight, mask))
    yield Sample("integer_mask", (q, k, v, score_weight, draw.mask(batch, 1, keys).int()))
    yield Sample("added_mask", (q, k, v, score_weight, draw(batch, queries, keys)))
    yield Sample(
        "broadcast",
        (
            draw(batch, 2, queries, width),
            draw(2, keys, width),
            draw(batch, 1, keys, value_width),
            score_weight,
            draw(2, 1, keys),
        ),
    )
