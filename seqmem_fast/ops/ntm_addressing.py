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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import ntm_addressing as reference
from .common import Gradients, differentiate, reference_vjp, try_while_tracing

_content_addressing = torch.ops.seqmem.ntm_content_addressing.default
_addressing = torch.ops.seqmem.ntm_addressing.default
_read = torch.ops.seqmem.ntm_read.default
_write = torch.ops.seqmem.ntm_write.default
_try_content_addressing = try_while_tracing(_content_addressing)
_try_addressing = try_while_tracing(_addressing)
_try_read = try_while_tracing(_read)
_try_write = try_while_tracing(_write)
_dynamo_traces = torch.compiler.is_dynamo_compiling
_transform_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def ntm_content_addressing(memory: Tensor, key: Tensor, beta: Tensor) -> Tensor:
    """Weights by similarity to a key, w^c; the equation, dtypes and errors: module's docstring.

    Args:
        memory: [B, N, M].
        key: [B, M].
        beta: [B], the key strength, >= 0 in the paper.

    Returns:
        weights [B, N], each row positive with sum 1.
    """
    if _transform_active():
        return _plain(reference.ntm_content_addressing, memory, key, beta)
    if _dynamo_traces():
        from torch._dynamo.comptime import comptime

        comptime(_try_content_addressing)
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
    if _transform_active():
        return _plain(reference.ntm_addressing, memory, key, beta, gate, shift, gamma, prev_weights)
    if _dynamo_traces():
        from torch._dynamo.comptime import comptime

        comptime(_try_addressing)
    return _addressing(memory, key, beta, gate, shift, gamma, prev_weights)


def ntm_read(memory: Tensor, weights: Tensor) -> Tensor:
    r"""What a head reads, :math:`r = \sum_i w_i M_i`; dtypes and errors: module's docstring.

    Args:
        memory: [B, N, M].
        weights: [B, N].

    Returns:
        [B, M].
    """
    if _transform_active():
        return _plain(reference.ntm_read, memory, weights)
    if _dynamo_traces():
        from torch._dynamo.comptime import comptime

        comptime(_try_read)
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
    if _transform_active():
        return _plain(reference.ntm_write, memory, weights, erase, add)
    if _dynamo_traces():
        from torch._dynamo.comptime import comptime

        comptime(_try_write)
    return _write(memory, weights, erase, add)


def _plain(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The reference in the arithmetic of the kernels."""
    dtype = tensors[0].dtype
    if dtype.itemsize > 2:
        return function(*tensors)
    return function(*(t.float() for t in tensors)).to(dtype)


def _vjp(function: Callable[..., Tensor]) -> Callable[..., Gradients]:
    """Of a backward op called with (gradient, tensors..., which gradients are asked for)."""

    def vjp(grad: Tensor, *arguments: Any) -> Gradients:
        tensors: Sequence[Tensor] = arguments[:-1]
        return reference_vjp(lambda *t: (_plain(function, *t),), tensors, (grad,), arguments[-1])

    return vjp


for _function in (
    reference.ntm_content_addressing,
    reference.ntm_addressing,
    reference.ntm_read,
    reference.ntm_write,
):
    differentiate(f"seqmem::{_function.__name__}_backward", _vjp(_function))
