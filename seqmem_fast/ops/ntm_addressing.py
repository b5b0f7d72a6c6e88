r"""Functional NTM: one step's addressing, reading and writing.

.. math::
    K_i &= \frac{M_i \cdot k}{\|M_i\| \|k\| + 10^{-8}}, \quad w^c = \mathrm{softmax}(\beta K) \\
    w^g &= g w^c + (1 - g) w_{t-1} \\
    \tilde w_i &= \sum_{j=0}^{2r} s_j\, w^g_{(i - (j - r)) \bmod N} \\
    w_i &= \tilde w_i^\gamma / \sum_j \tilde w_j^\gamma

Letters: B batch, H heads, N slots, M slot width, S = 2r + 1 taps of the shift.

Paper: Graves, Wayne & Danihelka, Neural Turing Machines, arXiv 1410.5401, 2014, section 3.

Common to all four functions. Memory is [B, N, M]. What belongs to a head is written below for a
single head, [B, ...]; [B, H, ...] stands for H heads over the same memory, which then share one
call. Without a batch, memory is [N, M] and all else loses its B as well. Tensors are float32,
float64, bfloat16 or float16, all of one dtype and one device (under ``torch.autocast`` they are
cast); 16-bit values are computed with in float32. Every argument is differentiable, any number of
times: the first derivative has its own kernel, higher ones run in plain PyTorch. Strides are free,
B = 0 is allowed. Inside a ``torch.func`` transform (grad, vmap, jacrev, ...) the call runs in plain
PyTorch, since these transforms cannot see into C++ functions: right, but slow.

Values are not checked. A beta below 0, a gate outside 0..1, a gamma below 1 or weights that do not
sum to 1 are computed with as written and stay finite. A slot at which the shifted weighting is zero
(or below) keeps weight 0 whatever gamma, and a shifted weighting of zeros stays one; the gradient
there is 0. The gradient of a norm at the zero vector is 0.

Raises:
    ValueError: a shape does not fit; the message names the argument, what was expected and what
        came. Also when memory has no slots, when S is even and when r > N / 2.
    TypeError: a dtype, device or layout does not fit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from torch import Tensor

from ..reference import ntm_addressing as reference
from ..reference.ntm_addressing import NTMState
from .common import differentiate_through, fall_back
from .flops import Shape, count_products

__all__ = ["NTMState", "ntm_addressing", "ntm_content_addressing", "ntm_read", "ntm_write"]


def _declared(
    function: Callable[..., Tensor], products: Callable[..., int]
) -> Callable[..., Tensor]:
    """The op named as this reference, which runs in the arithmetic of the kernels."""

    @functools.wraps(function)
    def plain(*tensors: Tensor) -> Tensor:
        dtype = tensors[0].dtype
        if dtype.itemsize > 2:
            return function(*tensors)
        return function(*(t.float() for t in tensors)).to(dtype)

    differentiate_through(function.__name__, plain, gradients=1)
    count_products(function.__name__, products)
    return fall_back(function.__name__, plain)


def _contents(memory: Shape, key: Shape) -> int:
    return math.prod(key) * memory[-2]


def _reads(memory: Shape, weights: Shape) -> int:
    return math.prod(weights) * memory[-1]


_content_addressing = _declared(reference.ntm_content_addressing, _contents)
_addressing = _declared(reference.ntm_addressing, _contents)
_read = _declared(reference.ntm_read, _reads)
_write = _declared(reference.ntm_write, lambda: 0)  # outer products, element by element


def ntm_content_addressing(memory: Tensor, key: Tensor, beta: Tensor) -> Tensor:
    """Weights by similarity to a key, w^c; the equation, dtypes and errors: module's docstring.

    Args:
        memory: [B, N, M].
        key: [B, M].
        beta: [B], the key strength, >= 0 in the paper.

    Returns:
        weights [B, N], each row positive with sum 1.
    """
    return _content_addressing(memory, key, beta)


def ntm_addressing(
    memory: Tensor,
    key: Tensor,
    beta: Tensor,
    gate: Tensor,
    shift: Tensor,
    gamma: Tensor,
    prev_weights: Tensor,
) -> Tensor:
    """All four stages of addressing; the equation, dtypes and errors: module's docstring.

    Args:
        memory: [B, N, M].
        key: [B, M].
        beta: [B], the key strength, >= 0 in the paper.
        gate: [B], in 0..1: 1 takes the content's weights, 0 the previous ones.
        shift: [B, S], S odd, S // 2 <= N // 2; index j moves weights by j - r slots, positive moves
            go to higher slots. Sums to 1 in the paper.
        gamma: [B], the sharpening, >= 1 in the paper; up to 1,000 the weights sum to 1.
        prev_weights: [B, N].

    Returns:
        weights [B, N].
    """
    return _addressing(memory, key, beta, gate, shift, gamma, prev_weights)


def ntm_read(memory: Tensor, weights: Tensor) -> Tensor:
    r"""What a head reads, :math:`r = \sum_i w_i M_i`; dtypes and errors: module's docstring.

    Args:
        memory: [B, N, M].
        weights: [B, N].

    Returns:
        [B, M].
    """
    return _read(memory, weights)


def ntm_write(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    r"""The memory after a write, :math:`M_i \circ (1 - w_i e) + w_i a`.

    Several heads write one after the other. Dtypes and errors: module's docstring.

    Args:
        memory: [B, N, M]; stays as it is.
        weights: [B, N].
        erase: [B, M], in 0..1 in the paper.
        add: [B, M].

    Returns:
        the new memory [B, N, M].
    """
    return _write(memory, weights, erase, add)
