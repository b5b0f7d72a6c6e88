r"""Softmax's sparse relatives, as fast as softmax: no row is sorted.

.. math::
    p_i = [(\alpha - 1) z_i - \tau]_+^{1 / (\alpha - 1)}, \qquad \tau \text{ such that }
    \sum_i p_i = 1, \qquad 1 < \alpha \le 2

With alpha = 2 this is sparsemax, the Euclidean projection onto the simplex; with alpha = 1.5
entmax15; alpha towards 1 gives softmax. Whatever lies 1 / (alpha - 1) or more below a row's largest
entry is exactly 0.

Papers: Martins & Astudillo, From softmax to sparsemax, arXiv 1602.02068, 2016; Peters, Niculae &
Martins, Sparse sequence-to-sequence models, arXiv 1905.05702, 2019; a learned alpha: Correia,
Niculae & Martins, Adaptively sparse transformers, arXiv 1909.00015, 2019.

Common to all functions. ``input`` is float32, float64, bfloat16 or float16 (the 16-bit types are
computed with in float32; under ``torch.autocast`` they become float32), of any strides. An entry of
-inf gets 0, a row of -inf alone is 0 everywhere, without a gradient; a NaN or +inf makes its row
NaN and no other. Everything is differentiable any number of times: the first derivative has its own
kernel, higher ones run in plain PyTorch. Inside a ``torch.func`` transform (grad, vmap, jacrev,
...) the whole call runs in plain PyTorch: right, but slow. Where an entry lies on the edge of the
support the function has a kink, and its gradient there is that of the zero side.

Raises:
    ValueError: no dimension, or ``dim`` or alpha out of range, or an alpha that does not fit; the
        message says what was expected and what came.
    TypeError: a dtype, device or layout does not fit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..reference import entmax as reference
from .common import differentiate_through, fall_back
from .flops import count_products

__all__ = ["entmax", "entmax15", "sparsemax"]


def _plain(input: Tensor, alpha: Tensor | None, power: float, dim: int) -> Tensor:
    return reference.entmax(input, power if alpha is None else alpha, dim)


_op: Any = fall_back("entmax", _plain)
differentiate_through("entmax", _plain, gradients=1)
count_products("entmax", lambda: 0)


def sparsemax(input: Tensor, dim: int = -1) -> Tensor:
    """Probabilities over ``dim``, most of them exactly 0: max(z - tau, 0).

    Args:
        input: [..., K, ...], K entries along ``dim``.
        dim: counts from the end where negative.

    Returns:
        The same shape and dtype; dtypes, edges and errors are in the module's docstring.
    """
    result: Tensor = _op(input, None, 2.0, dim)
    return result


def entmax15(input: Tensor, dim: int = -1) -> Tensor:
    """Probabilities over ``dim``, sparse but smoother than sparsemax: max(z / 2 - tau, 0)^2.

    Args:
        input: [..., K, ...], K entries along ``dim``.
        dim: counts from the end where negative.

    Returns:
        The same shape and dtype; dtypes, edges and errors are in the module's docstring.
    """
    result: Tensor = _op(input, None, 1.5, dim)
    return result


def entmax(input: Tensor, alpha: Tensor | float = 1.5, dim: int = -1) -> Tensor:
    """Probabilities over ``dim``, the sparser the larger alpha, which may be learned.

    Args:
        input: [..., K, ...], K entries along ``dim``.
        alpha: 1 < alpha <= 2: a number, or a tensor of input's dtype that broadcasts to input and
            has one element along ``dim``, such as [H, 1, 1] for one alpha a head; differentiable. A
            NaN in it makes its rows NaN. On a GPU its values are not checked, which would wait for
            it: one out of range gives NaN as well.
        dim: counts from the end where negative.

    Returns:
        The same shape and dtype as input; dtypes, edges and errors are in the module's docstring.
    """
    if isinstance(alpha, Tensor):
        result: Tensor = _op(input, alpha, 1.5, dim)
    else:
        result = _op(input, None, alpha, dim)
    return result
