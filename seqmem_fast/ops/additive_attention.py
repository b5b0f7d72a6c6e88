r"""Functional additive attention, which never holds tanh of all pairs of queries and keys.

.. math::
    e_{ij} = \sum_a v_a \tanh(q_{ia} + k_{ja}), \qquad
    W = \operatorname{softmax}_j(e), \qquad O = W V

Paper: Bahdanau, Cho & Bengio, Neural Machine Translation by Jointly Learning to Align and
Translate, arXiv 1409.0473, 2014 (appendix A.1.2), where q_i = W s_{i-1} and k_j = U h_j.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference import additive_attention as reference
from .common import differentiate_through, fall_back
from .flops import Shape, count_products

__all__ = ["additive_attention"]

_op = fall_back("additive_attention", reference.additive_attention)
differentiate_through("additive_attention", reference.additive_attention, gradients=2)


def _products(query: Shape, key: Shape, value: Shape) -> int:
    rows = math.prod(torch.broadcast_shapes(query[:-2], key[:-2], value[:-2]))
    return rows * query[-2] * key[-2] * (query[-1] + value[-1])


count_products("additive_attention", _products)


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by e_ij = score_weight . tanh(query_i + key_j), with its weights.

    Memory grows with Tq * Tk, forward and backward: the backward recomputes tanh. The equation and
    the paper are in the module's docstring.

    Args:
        query: [..., Tq, A], projected already.
        key: [..., Tk, A], projected already.
        value: [..., Tk, Dv].
        score_weight: [A], v in the equation.
        mask: broadcasts to [..., Tq, Tk]. Bool or an integer: where it is 0 the score becomes -1e9
            (float16: -65504), so that a row without any other is uniform. Floating: added to the
            scores (-inf shuts a key out; a row of -inf alone is NaN).

    The leading dimensions of all arguments broadcast. Every floating tensor is float32, float64,
    bfloat16 or float16, all of one dtype and one device (under ``torch.autocast`` they are cast),
    and is differentiable, any number of times: the first derivative has its own kernel, higher ones
    run in plain PyTorch. Inside a ``torch.func`` transform (grad, vmap, jacrev, ...) the whole call
    runs in plain PyTorch, since these cannot see into C++ functions: right, but slow, and with all
    [..., Tq, Tk, A] values in memory.

    Returns:
        output [..., Tq, Dv] and weights [..., Tq, Tk], the latter non-negative with rows that sum
        to 1; both differentiable.

    Raises:
        ValueError: a shape does not fit; the message names the argument, what was expected and what
            came.
        TypeError: a dtype, device or layout does not fit.
    """
    output, weights = _op(query, key, value, score_weight, mask)
    return output, weights
