r"""Sparse alternatives to softmax in plain PyTorch, to be read beside the papers.

.. math::
    p_i = [(\alpha - 1) z_i - \tau]_+^{1 / (\alpha - 1)}, \qquad \tau \text{ such that }
    \sum_i p_i = 1, \qquad 1 < \alpha \le 2

alpha = 2 is sparsemax (Martins & Astudillo, arXiv 1602.02068, 2016), alpha = 1.5 is entmax15
(Peters, Niculae & Martins, arXiv 1905.05702, 2019); alpha towards 1 gives softmax. alpha can be
learned (Correia, Niculae & Martins, arXiv 1909.00015, 2019).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .common import Draw, Sample

BISECTIONS = {torch.float64: 54}  # of tau, to its last bit
DERIVATIVES = 2  # Newton steps that are differentiated: derivatives up to the third are exact


def entmax(input: Tensor, alpha: Tensor | float = 1.5, dim: int = -1) -> Tensor:
    """input [..., K, ...] -> probabilities over ``dim``; alpha a number, or a tensor that
    broadcasts to input and has one element along ``dim``.

    An entry of -inf is 0; a row of -inf alone is 0 everywhere. A NaN or +inf makes its row NaN.
    """
    out = input.isneginf()
    wrong = (input.isnan() | input.isposinf()).any(dim, keepdim=True)
    z = input.masked_fill(out | wrong, 0)
    top = z.masked_fill(out, torch.finfo(z.dtype).min).amax(dim, keepdim=True).detach()
    x = (alpha - 1) * (z - top)  # at most 0
    power = 1 / (torch.as_tensor(alpha, dtype=z.dtype, device=z.device) - 1)
    tau = _threshold(x.detach(), power.detach(), out, dim)
    for _ in range(DERIVATIVES):
        supported = (x > tau) & ~out
        above = torch.where(supported, x - tau, 1)
        total = torch.where(supported, above**power, 0).sum(dim, keepdim=True)
        slope = power * torch.where(supported, above ** (power - 1), 0).sum(dim, keepdim=True)
        tau = tau + torch.where(slope > 0, (total - 1) / slope.masked_fill(slope == 0, 1), 0)
    supported = (x > tau) & ~out
    p = torch.where(supported, torch.where(supported, x - tau, 1) ** power, 0)
    return p.masked_fill(wrong | power.isnan(), torch.nan)


def sparsemax(input: Tensor, dim: int = -1) -> Tensor:
    """:func:`entmax` with alpha = 2."""
    return entmax(input, 2.0, dim)


def entmax15(input: Tensor, dim: int = -1) -> Tensor:
    """:func:`entmax` with alpha = 1.5."""
    return entmax(input, 1.5, dim)


def _threshold(x: Tensor, power: Tensor, out: Tensor, dim: int) -> Tensor:
    """tau by bisection: x is at most 0 and reaches it, so that tau is in -1..0."""
    tau, width = torch.full_like(x.sum(dim, keepdim=True), -1), 1.0
    for _ in range(BISECTIONS.get(x.dtype, 26)):
        width /= 2
        middle = tau + width
        above = (x - middle).clamp(min=0).masked_fill(out, 0)
        tau = torch.where((above**power).sum(dim, keepdim=True) >= 1, middle, tau)
    return tau


def sample_inputs(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    sizes: tuple[int, int, int] = (4, 3, 7),
    seed: int = 0,
) -> Iterator[Sample]:
    """Calls of all three functions; sizes = (B, H, K)."""
    batch, heads, count = sizes
    draw = Draw(device, dtype, seed)
    learned = 1.1 + 0.8 * draw(heads, 1).sigmoid()
    yield Sample("entmax15", (draw(batch, heads, count),), function="entmax15")
    yield Sample("sparsemax", (draw(batch, heads, count),), function="sparsemax")
    yield Sample("dim", (draw(batch, count, heads),), {"dim": 1}, "sparsemax")
    yield Sample("number", (draw(batch, heads, count), 1.3))
    yield Sample("learned", (draw(batch, heads, count), learned))
    hidden = draw(batch, heads, count)
    hidden[:, :, count // 2] = -torch.inf
    yield Sample("masked", (hidden, learned))
