r"""Dynamic memory in plain PyTorch: what ``seqmem::dynamic_memory`` computes, beside the formulas.

.. math::
    \alpha_k &= \operatorname{softmax}(M_k s), \qquad r_k = \alpha_k^T M_k \\
    g_k &= \sigma(W_g [r_k; q] + b_g), \qquad w_k = \tanh(W_w [r_k; q] + b_w) \\
    M_{k+1} &= (1 - g_k) \odot M_k + g_k \odot w_k \quad\text{(the same for every slot)}

for hops k = 0..K-1 and each batch row; s is the score query, q itself where none is given.

Letters: B batch, N slots, m slot width, h query width, K hops. Memory that is updated while it is
read: Kumar et al. 2015 (arXiv 1506.07285), Sukhbaatar et al. 2015 (arXiv 1503.08895).

Everything here works under ``torch.func`` and any order of derivative; nothing here is fast.
Arguments are not checked: the ops do that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Draw, Sample, samples


def dynamic_memory(
    query: Tensor,
    memory: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    write_weight: Tensor,
    write_bias: Tensor,
    num_hops: int = 3,
    *,
    score_query: Tensor | None = None,
    mask: Tensor | None = None,
    return_memory: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """query [B, h], memory [N, m] or [B, N, m] -> final memory [B, N, m], attention [K, B, N].

    Slots where ``mask`` [B, N] is false get no attention and are not read, whatever they hold; a
    row with no slot left attends to nothing and reads zeros.
    """
    batch = query.size(0)
    slots = memory.expand(batch, -1, -1)  # [B, N, m]
    score = query if score_query is None else score_query  # [B, m]
    attention = []
    for _ in range(num_hops):
        readable = slots if mask is None else slots.masked_fill(~mask[..., None], 0)
        scores = (readable * score[:, None]).sum(-1)  # [B, N]
        weights = _softmax(scores, mask)
        attention.append(weights)
        read = (weights[..., None] * readable).sum(1)  # [B, m]
        update = torch.cat((read, query), -1)  # [B, m + h]
        gate = torch.sigmoid(F.linear(update, gate_weight, gate_bias))[:, None]
        write = torch.tanh(F.linear(update, write_weight, write_bias))[:, None]
        slots = (1 - gate) * slots + gate * write
    history = torch.stack(attention) if attention else query.new_zeros(0, batch, memory.size(-2))
    return (slots if return_memory else None), history


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.softmax(scores, -1)
    lowest = torch.finfo(scores.dtype).min
    weights = torch.softmax(scores.masked_fill(~mask, lowest), -1)
    return weights.masked_fill(~mask, 0)


@samples(4, 9, 6, 5)
def sample_inputs(draw: Draw, sizes: Sequence[int]) -> Iterator[Sample]:
    """Calls of :func:`dynamic_memory` that reach every option once; sizes = (B, N, m, h)."""
    batch, slots, width, hidden = sizes

    def networks(columns: int) -> tuple[Tensor, ...]:
        scale = (width + columns) ** -0.5
        shapes = [(width, width + columns), (width,)] * 2
        return tuple(draw(*shape, scale=scale) for shape in shapes)

    mask = draw.mask(batch, slots, share=0.6)
    mask[0] = True
    shared, own = draw(slots, width), draw(batch, slots, width)
    narrow, wide = draw(batch, width), draw(batch, hidden)
    projected = {"score_query": draw(batch, width)}
    yield Sample("shared", (narrow, shared, *networks(width)))
    yield Sample(
        "projected", (wide, shared, *networks(hidden)), {**projected, "return_memory": False}
    )
    yield Sample("shared_masked", (narrow, shared, *networks(width), 2), {"mask": mask})
    yield Sample("per_sample_masked", (wide, own, *networks(hidden)), {**projected, "mask": mask})
