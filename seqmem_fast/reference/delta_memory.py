r"""The gated delta rule in plain PyTorch, one step after the other, to be read beside the papers.

.. math::
    P_t &= \operatorname{diag}(e^{g_t}) S_{t-1}, \qquad u_t = \beta_t (v_t - P_t^T k_t) \\
    S_t &= P_t + k_t u_t^T, \qquad o_t = \text{scale} \cdot S_t^T q_t

A memory S of K x V numbers replaces what it held under the key k_t by v_t (Schlag et al., arXiv
2102.11174, 2021), after it has decayed, as a whole (Yang et al., arXiv 2412.06464, 2024) or each
feature of the keys on its own (Kimi Team, arXiv 2510.26692, 2025).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Draw, Sample, samples

NORM_FLOOR = 1e-6  # added to the sum of squares that a query or key is divided by the root of


def normalized(x: Tensor) -> Tensor:
    """Over the last dimension."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_FLOOR)


def delta_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, Hk, K], v [B, T, H, V], beta [B, T, H], log_decay [B, T, H] or [B, T, H, K],
    state [B, H, K, V], lengths [B], reset [B, T] -> output [B, T, H, V], final state."""
    storage, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    (batch, steps, key_heads, width), (heads, columns) = q.shape, v.shape[2:]
    scale = width**-0.5 if scale is None else scale
    if log_decay is None:
        log_decay = beta.new_zeros(beta.shape)
    if log_decay.dim() == 3:
        log_decay = log_decay.unsqueeze(-1)
    now = torch.ones(batch, steps, dtype=torch.bool, device=q.device)
    if lengths is not None:
        now = torch.arange(steps, device=q.device) < lengths.to(q.device).unsqueeze(1)
        # What stands beyond the end may be anything.
        q, k, v = (x.masked_fill(~now[..., None, None], 0) for x in (q, k, v))
        beta, log_decay = (
            beta.masked_fill(~now[..., None], 0),
            log_decay.masked_fill(~now[..., None, None], 0),
        )
    q, k, v, beta, log_decay = (x.to(wide) for x in (q, k, v, beta, log_decay))
    if qk_l2norm:
        q, k = normalized(q), normalized(k)
    q, k = (x.repeat_interleave(heads // key_heads, 2) for x in (q, k))
    if state is None:
        state = v.new_zeros(batch, heads, width, columns)
    memory, outputs = state.to(wide), []
    for t in range(steps):
        before = memory
        if reset is not None:
            memory = torch.where(reset[:, t, None, None, None], 0, memory)
        memory = memory * log_decay[:, t].exp().unsqueeze(-1)
        held = (memory * k[:, t].unsqueeze(-1)).sum(-2)
        write = beta[:, t].unsqueeze(-1) * (v[:, t] - held)
        memory = memory + k[:, t].unsqueeze(-1) * write.unsqueeze(-2)
        output = scale * (memory * q[:, t].unsqueeze(-1)).sum(-2)
        if lengths is not None:
            memory = torch.where(now[:, t, None, None, None], memory, before)
            output = output.masked_fill(~now[:, t, None, None], 0)
        outputs.append(output)
    output = torch.stack(outputs, 1) if outputs else v.new_zeros(v.shape)
    return output.to(storage), memory


@samples(3, 5, 2, 4, 3)
def sample_inputs(draw: Draw, sizes: Sequence[int]) -> Iterator[Sample]:
    """Calls that cover every option; sizes = (B, T, Hk, K, V)."""
    batch, steps, heads, width, columns = sizes

    def operands(group: int = 1) -> tuple[Tensor, ...]:
        """Keys of norm 1: with longer ones the memory grows without bound."""
        key = F.normalize(draw(batch, steps, heads, width), dim=-1)
        value = draw(batch, steps, group * heads, columns)
        query = draw(batch, steps, heads, width)
        return query, key, value, draw(batch, steps, group * heads).sigmoid()

    def state(group: int = 1) -> Tensor:
        return draw(batch, group * heads, width, columns)

    def decay(*more: int) -> Tensor:
        return F.logsigmoid(2 + draw(batch, steps, *more))

    yield Sample("plain", operands())
    yield Sample("gated", (*operands(), decay(heads), state()), {"qk_l2norm": True})
    by_feature = (*operands(2), decay(2 * heads, width), state(2))
    yield Sample("by_feature", by_feature, {"scale": 0.7})
    lengths = draw.whole(0, steps + 1, batch)
    lengths[: min(2, batch)] = torch.tensor([steps // 2, steps][: min(2, batch)])
    options = {"lengths": lengths, "reset": draw.mask(batch, steps, share=0.2)}
    yield Sample("ended", (*operands(2), decay(2 * heads), state(2)), options)
