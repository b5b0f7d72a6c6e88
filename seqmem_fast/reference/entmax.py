r"""Sparse alternatives to softmax in plain PyTorch, to be read beside the papers.

.. math::
    p_i = [(\alpha - 1) z_i - \tau]_+^{1 / (\alpha - 1)}, \qquad \tau \text{ such that }
    \sum_i p_i = 1, \qquad 1 < \alpha \le 2

alpha = 2 is sparsemax (Martins & Astudillo, arXiv 1602.02068, 2016), alpha = 1.5 is entmax15
(Peters, Niculae & Martins, arXiv 1905.05702, 2019); alpha towards 1 gives softmax. alpha can be
learned (Correia, Niculae & Martins, arXiv 1909.00015, 2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .common import Draw, Sample, samples
from .common import entmax as entmax


def sparsemax(input: Tensor, dim: int = -1) -> Tensor:
    """:func:`entmax` with alpha = 2."""
    return entmax(input, 2.0, dim)


def entmax15(input: Tensor, dim: int = -1) -> Tensor:
    """:func:`entmax` with alpha = 1.5."""
    return entmax(input, 1.5, dim)


@samples(4, 3, 7)
def sample_inputs(draw: Draw, sizes: Sequence[int]) -> Iterator[Sample]:
    """Calls of all three functions; sizes = (B, H, K)."""
    batch, heads, count = sizes
    learned = 1.1 + 0.8 * draw(heads, 1).sigmoid()
    yield Sample("entmax15", (draw(batch, heads, count),), function="entmax15")
    yield Sample("sparsemax", (draw(batch, heads, count),), function="sparsemax")
    yield Sample("dim", (draw(batch, count, heads),), {"dim": 1}, "sparsemax")
    yield Sample("number", (draw(batch, heads, count), 1.3))
    yield Sample("learned", (draw(batch, heads, count), learned))
    hidden = draw(batch, heads, count)
    hidden[:, :, count // 2] = -torch.inf
    yield Sample("masked", (hidden, learned))
