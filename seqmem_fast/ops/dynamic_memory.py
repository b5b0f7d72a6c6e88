r"""Dynamic memory: several hops of attention over a memory that each hop rewrites.

.. math::
    \alpha_k &= \operatorname{softmax}(M_k s), \qquad r_k = \alpha_k^T M_k \\
    g_k &= \sigma(W_g [r_k; q] + b_g), \qquad w_k = \tanh(W_w [r_k; q] + b_w) \\
    M_{k+1} &= (1 - g_k) \odot M_k + g_k \odot w_k \quad\text{(the same for every slot)}

for hops k = 0..K-1 and each batch row; s is the score query, q itself where none is given. Since
every slot goes through the same map, M_k = A_k ⊙ M_0 + B_k with A and B of one slot's width: no hop
forms the memory, and the final one is written once, if wanted.

Letters: B batch, N slots, m slot width, h query width, K hops.

Papers: Kumar et al., Ask Me Anything: Dynamic Memory Networks, arXiv 1506.07285, 2015; Sukhbaatar
et al., End-To-End Memory Networks, arXiv 1503.08895, 2015.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor

from ..reference import dynamic_memory as reference
from .common import by_fields, differentiate_through, fall_back
from .flops import Shape, count_products, of_weights

__all__ = ["dynamic_memory"]

_OPTIONS = ("score_query", "mask", "num_hops", "return_memory")


def _plain(*arguments: Any) -> tuple[Tensor | None, Tensor, None]:
    operands, options = arguments[:6], dict(zip(_OPTIONS, arguments[6:10], strict=True))
    final, attention = reference.dynamic_memory(*operands, **options)
    return final, attention, None


class Operands(NamedTuple):
    """Of the op, and of its backward after the incoming gradients."""

    query: Tensor
    memory: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    write_weight: Tensor
    write_bias: Tensor
    score_query: Tensor | None
    mask: Tensor | None


@by_fields
def _of_saved(operands: Operands, attention: Tensor) -> tuple[Tensor, Tensor]:
    """With as many hops as the attention that the backward op is given."""
    final, recomputed, _ = _plain(*operands, attention.size(0), True)
    return cast(Tensor, final), recomputed


_dynamic_memory = fall_back("dynamic_memory", _plain)
_WANTED = (0, 1, 2, 2, 2, 2, 3)  # all weights and biases share one entry of output_mask
differentiate_through("dynamic_memory", _of_saved, gradients=2, wanted=_WANTED)


def _products(
    query: Shape,
    memory: Shape,
    gate_weight: Shape,
    write_weight: Shape,
    num_hops: int = 0,
    attention: Shape = (0,),
) -> int:
    """Of each hop: the scores, what is read, both nets."""
    row = 2 * memory[-2] * memory[-1] + of_weights(gate_weight, write_weight)
    return (num_hops or attention[0]) * query[0] * row


count_products("dynamic_memory", _products)


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
    """All hops of every row as a single op; the equation is in the module's docstring.

    Every floating tensor is float32, float64, bfloat16 or float16, all of one dtype and one device
    (under ``torch.autocast`` they are cast), and is differentiable, any number of times: the first
    derivative has its own kernel, higher ones run in plain PyTorch. Strides are free. Inside a
    ``torch.func`` transform the whole call runs in plain PyTorch: right, but slow.

    Args:
        query: [B, h], seen by both networks.
        memory: [N, m], shared by all rows, or [B, N, m], one for each; N and m at least 1.
        gate_weight, write_weight: [m, m + h], columns first for the read, then for the query.
        gate_bias, write_bias: [m].
        num_hops: K >= 0.
        score_query: [B, m], compared with the slots; may be left out where h = m, for query then.
        mask: bool [B, N], true where there is a slot; not differentiable. The others get no
            attention and are not read, whatever they hold; the final memory carries them along. A
            row without slots attends to nothing and reads zeros.
        return_memory: whether the final memory is wanted.

    Returns:
        final memory [B, N, m], or None; attention [K, B, N].

    Raises:
        ValueError: a shape or value does not fit; the message names the argument, what was
            expected and what came.
        TypeError: a dtype, device or layout does not fit.
    """
    final, attention, _ = _dynamic_memory(
        query,
        memory,
        gate_weight,
        gate_bias,
        write_weight,
        write_bias,
        score_query,
        mask,
        num_hops,
        return_memory,
        False,
    )
    return (final if return_memory else None), attention
