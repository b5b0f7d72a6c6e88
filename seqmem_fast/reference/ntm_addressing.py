r"""The NTM's addressing, reading and writing in plain PyTorch, to be read beside the paper.

Graves, Wayne & Danihelka, Neural Turing Machines, arXiv 1410.5401, 2014, section 3.

.. math::
    K_i &= \frac{M_i \cdot k}{\|M_i\| \|k\| + 10^{-8}}, \quad
    w^c = \mathrm{softmax}(\beta K) && \text{(5, 6)} \\
    w^g &= g w^c + (1 - g) w_{t-1} && \text{(7)} \\
    \tilde w_i &= \sum_{j=0}^{2r} s_j\, w^g_{(i - (j - r)) \bmod N} && \text{(8)} \\
    w_i &= \tilde w_i^\gamma / \sum_j \tilde w_j^\gamma && \text{(9)} \\
    r &= \sum_i w_i M_i && \text{(2)} \\
    M_i &\leftarrow M_i \circ (1 - w_i e) + w_i a && \text{(3, 4)}

Letters: B batch, N slots, M slot width, S = 2r + 1 taps of the shift, H heads. Memory is [B, N, M];
what belongs to a head is [B, ...], or [B, H, ...] for several heads over one memory. Without batch
both lose their B. Several heads write one after the other.

Everything here works under ``torch.func`` and any order of derivative. Arguments are not checked:
the ops do that. The whole sequence stands in :mod:`.ntm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .common import Draw, Sample, norm, samples

EPSILON = 1e-8


class NTMState(NamedTuple):
    """What an NTM hands from one step to the next.

    L layers of C units, Hd heads of which R read. A feed-forward controller has L = 0.
    """

    hidden: Tensor  # [L, B, C]
    cell: Tensor  # [L, B, C]
    memory: Tensor  # [B, N, M]
    weightings: Tensor  # [B, Hd, N]: of all heads, in the order in which they act
    reads: Tensor  # [B, R, M]: of the heads that read, likewise

    def detach(self) -> NTMState:
        """The same values without their history: later gradients end here."""
        return NTMState(*(t.detach() for t in self))


def ntm_content_addressing(memory: Tensor, key: Tensor, beta: Tensor) -> Tensor:
    """Equations 5 and 6: memory [B, N, M], key [B, M], beta [B] -> weights [B, N]."""
    if key.dim() < memory.dim():
        return ntm_content_addressing(memory, key.unsqueeze(-2), beta.unsqueeze(-1)).squeeze(-2)
    dots = key @ memory.mT  # [B, H, N]
    norms = norm(key).unsqueeze(-1) * norm(memory).unsqueeze(-2)
    return torch.softmax(beta.unsqueeze(-1) * (dots / (norms + EPSILON)), -1)


def ntm_addressing(
    memory: Tensor,
    key: Tensor,
    beta: Tensor,
    gate: Tensor,
    shift: Tensor,
    gamma: Tensor,
    prev_weights: Tensor,
) -> Tensor:
    """Equations 5 to 9: gate and gamma [B], shift [B, S], prev_weights [B, N] -> weights [B, N]."""
    content = ntm_content_addressing(memory, key, beta)
    gated = torch.lerp(prev_weights, content, gate.unsqueeze(-1))
    return _sharpen(_shift(gated, shift), gamma)


def ntm_read(memory: Tensor, weights: Tensor) -> Tensor:
    """Equation 2: memory [B, N, M], weights [B, N] -> [B, M]."""
    if weights.dim() < memory.dim():
        return ntm_read(memory, weights.unsqueeze(-2)).squeeze(-2)
    return weights @ memory


def ntm_write(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """Equations 3 and 4: weights [B, N], erase and add [B, M] -> the new memory [B, N, M]."""
    if weights.dim() < memory.dim():
        weights, erase, add = weights.unsqueeze(-2), erase.unsqueeze(-2), add.unsqueeze(-2)
    rows = weights.unsqueeze(-1).unbind(-3), erase.unsqueeze(-2).unbind(-3)
    for w, e, a in zip(*rows, add.unsqueeze(-2).unbind(-3), strict=True):
        # w [B, N, 1], e and a [B, 1, M]
        memory = torch.addcmul(torch.addcmul(memory, memory, w * e, value=-1), w, a)
    return memory


def _shift(weights: Tensor, shift: Tensor) -> Tensor:
    """Equation 8; tap j moves by j - r, positive moves go to higher slots."""
    first, *rest = shift.unsqueeze(-1).unbind(-2)
    reach = len(rest) // 2
    shifted = first * torch.roll(weights, -reach, -1)
    for j, tap in enumerate(rest, 1):
        shifted = torch.addcmul(shifted, tap, torch.roll(weights, j - reach, -1))
    return shifted


def _sharpen(weights: Tensor, gamma: Tensor) -> Tensor:
    """Equation 9 as a softmax of gamma log w, which cannot underflow at the largest weight.

    Slots at zero (or below) stay at zero whatever gamma, and so does a weighting of zeros. They get
    no gradient: both masks keep the logarithm away from them.
    """
    empty = weights <= 0
    logits = gamma.unsqueeze(-1) * torch.log(weights.masked_fill(empty, 1))
    lowest = torch.finfo(weights.dtype).min
    return torch.softmax(logits.masked_fill(empty, lowest), -1).masked_fill(empty, 0)


@samples(3, 8, 5, 2, 3)
def sample_inputs(draw: Draw, sizes: Sequence[int]) -> Iterator[Sample]:
    """Calls of all four functions, with one head, several and unbatched; sizes = (B, N, M, H, S).

    Names are ``content``, ``addressing``, ``read`` and ``write``, each bare, with ``_heads`` and
    with ``_unbatched``.
    """
    batch, slots, width, heads, taps = sizes
    device, dtype = draw.device, draw.dtype
    draw = Draw("cpu", torch.float64, draw.first)
    layouts = {"": ((batch,), ()), "_heads": ((batch,), (heads,)), "_unbatched": ((), ())}
    for suffix, (rows, head) in layouts.items():
        lead = (*rows, *head)
        memory, key = draw(*rows, slots, width), draw(*lead, width)
        beta, gate, gamma = (draw(*lead).sigmoid() for _ in range(3))
        beta, gamma = 1 + 5 * beta, 1 + 3 * gamma
        shift, weights = draw(*lead, taps).softmax(-1), draw(*lead, slots).softmax(-1)
        erase, add = draw(*lead, width).sigmoid(), draw(*lead, width)
        calls = {
            "content": ("ntm_content_addressing", (memory, key, beta)),
            "addressing": ("ntm_addressing", (memory, key, beta, gate, shift, gamma, weights)),
            "read": ("ntm_read", (memory, weights)),
            "write": ("ntm_write", (memory, weights, erase, add)),
        }
        for name, (function, args) in calls.items():
            converted = tuple(t.to(device=device, dtype=dtype) for t in args)
            yield Sample(name + suffix, converted, function=function)
