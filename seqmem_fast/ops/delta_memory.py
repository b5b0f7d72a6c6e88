r"""The gated delta rule: a memory of fixed size that overwrites what it held under a key.

.. math::
    P_t &= \operatorname{diag}(e^{g_t}) S_{t-1}, \qquad u_t = \beta_t (v_t - P_t^T k_t) \\
    S_t &= P_t + k_t u_t^T, \qquad o_t = \text{scale} \cdot S_t^T q_t

for each head of each batch row; S is K x V. With one g a head this is Gated DeltaNet, with one a
feature of the keys Kimi Delta Attention, without DeltaNet. The memory's own transition has the
eigenvalues exp(g) and exp(g) (1 - beta k.k): it is stable for keys of norm 1 and 0 <= beta <= 2,
and grows without bound for longer keys.

Letters: B batch, T steps, Hk heads of queries and keys, H heads of values, a multiple of Hk (value
head h reads key head h // (H / Hk)), K features of a key, V of a value.

Papers: Schlag, Irie & Schmidhuber, Linear transformers are secretly fast weight programmers, arXiv
2102.11174, 2021; Yang, Kautz & Hatamizadeh, Gated delta networks, arXiv 2412.06464, 2024; Kimi
Team, Kimi Linear, arXiv 2510.26692, 2025; the products of a chunk: Yang et al., Parallelizing
linear transformers with the delta rule, arXiv 2406.06484, 2024.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from ..reference import delta_memory as reference
from .common import by_fields, differentiate_through, fall_back
from .flops import Shape, count_products

__all__ = ["delta_memory"]


class Operands(NamedTuple):
    """What is written where, and what is read."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    state: Tensor | None


class Options(NamedTuple):
    """The others of the op and of its backward."""

    scale: float | None
    qk_l2norm: bool
    lengths: Tensor | None
    reset: Tensor | None


@by_fields
def _plain(operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
    return reference.delta_memory(*operands, **options._asdict())


def _with_saved(*arguments: Any) -> tuple[Tensor, Tensor, None]:
    return *_plain(*arguments[:-1]), None


_delta_memory: Any = fall_back("delta_memory", _with_saved)
differentiate_through("delta_memory", _plain, gradients=2)


def _products(k: Shape, v: Shape) -> int:
    """What is held under the key, what is written there, what the query reads."""
    return 3 * math.prod(v) * k[-1]


count_products("delta_memory", _products)


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
    """All steps of all heads as a single op; the equation is in the module's docstring.

    q, k and v are float32, float64, bfloat16 or float16, of one dtype; the other floating tensors
    are of that dtype or, beside 16 bits, float32, which is what the memory is kept and computed in
    then (under ``torch.autocast`` q, k and v are cast, the others become float32). All are on one
    device and differentiable, any number of times: the first derivative has its own kernel, higher
    ones run in plain PyTorch. Strides are free. Inside a ``torch.func`` transform the whole call
    runs in plain PyTorch: right, but slow. Results on the CPU are the same bits for any number of
    threads.

    Args:
        q, k: [B, T, Hk, K], Hk and K at least 1.
        v: [B, T, H, V], H a multiple of Hk.
        beta: [B, T, H], how much of what the key held is replaced: 0 nothing, 1 all of it.
        log_decay: g <= 0, [B, T, H] for each head or [B, T, H, K] for each feature of its keys;
            -inf forgets all; None for no decay.
        state: [B, H, K, V], the memory before the first step: what the call before returned, or
            None for an empty one.
        scale: factor of the outputs, 1 / sqrt(K) by default.
        qk_l2norm: q and k are divided by sqrt(sum of squares + 1e-6) first.
        lengths: [B] int64 or int32, row b ends after ``lengths[b]`` steps, 0 <= lengths <= T; later
            outputs are zero, the final state is that at the length, and what stands there is not
            read. On a GPU they are clamped, not checked, which would wait for it.
        reset: bool [B, T], true where the memory is emptied before step t.

    Returns:
        output [B, T, H, V] of v's dtype; final state [B, H, K, V], float64 where v is, else
        float32. A sequence cut anywhere gives the same when the state is handed on.

    Raises:
        ValueError: a shape or value does not fit; the message names the argument, what was
            expected and what came.
        TypeError: a dtype, device or layout does not fit.
    """
    output, final_state, _ = _delta_memory(
        q, k, v, beta, log_decay, state, scale, qk_l2norm, lengths, reset, False
    )
    return output, final_state
