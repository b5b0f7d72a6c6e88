r"""Attention over listed blocks of keys for each block of queries, with its weights.

.. math::
    S_{ij} = \text{scale} \cdot q_i \cdot k_j, \qquad W = \text{softmax}_j(S), \qquad
    O_i = \sum_j W_{ij} v_j

over the keys j of the blocks that are listed for query i's block: one softmax over all of them, or
sparsemax or entmax in its place. Time and memory grow with the listed blocks, never with Tq times
Tk.

Letters: B rows, Hq heads of queries, Hk of keys and values, a divisor of Hq (query head h reads key
head h // (Hq / Hk)), Tq queries, Tk keys, D features of a query and a key, Dv of a value, Bq
queries and Bk keys of a block, nQ and nK blocks of queries and keys, N places of a list.

Papers: Child, Gray, Radford & Sutskever, Generating long sequences with sparse transformers, arXiv
1904.10509, 2019; Zaheer et al., Big Bird, arXiv 2007.14062, 2020.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import block_sparse_attention as reference
from .common import (
    Rule,
    attend_to_some,
    by_fields,
    differentiate_through,
    fall_back,
    plain_rule,
    require_tensors,
)
from .flops import Shape, count_products

__all__ = ["block_list", "block_sparse_attention", "dense_weights"]

_NAME = "seqmem::block_sparse_attention"


class Operands(NamedTuple):
    """Heads, and the blocks that are seen."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Tensor
    block_queries: int
    block_keys: int


class Options(NamedTuple):
    """Which keys of the blocks are seen."""

    is_causal: bool
    key_end: Tensor | None
    scale: float | None


@by_fields
def _plain(operands: Operands, options: Options, rule: Rule) -> tuple[Tensor, Tensor]:
    q, k, v, blocks, *block = operands
    more: Any = {**options._asdict(), **plain_rule(rule)}
    return reference.block_sparse_attention(q, k, v, blocks, (block[0], block[1]), **more)


def _with_flag(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _plain(*arguments[:-1])


_block_sparse_attention: Any = fall_back("block_sparse_attention", _with_flag)
differentiate_through("block_sparse_attention", _plain, gradients=2)


def _products(
    q: Shape, k: Shape, v: Shape, blocks: Shape, block_queries: int, block_keys: int
) -> int:
    return math.prod(q[:2]) * blocks[2] * block_queries * block_keys * (q[3] + v[3])


count_products("block_sparse_attention", _products)


def block_list(block_mask: Tensor) -> Tensor:
    """A mask of blocks as the list that :func:`block_sparse_attention` reads.

    Args:
        block_mask: bool [nQ, nK], [Hq, nQ, nK] or [B, Hq, nQ, nK], B and Hq perhaps 1.

    Returns:
        int64 [1 or B, 1 or Hq, N, 2]: query block and key block of each true element, as
        ``block_mask.nonzero()`` has them; where rows or heads have masks of their own, N is the
        widest one's and shorter lists end in -1.
    """
    if block_mask.dtype != torch.bool:
        raise TypeError(f"{_NAME}: expected block_mask of dtype bool, got {block_mask.dtype}")
    if not 2 <= block_mask.dim() <= 4:
        raise ValueError(
            f"{_NAME}: expected block_mask with 2, 3 or 4 dimensions, "
            f"got shape {list(block_mask.shape)}"
        )
    return reference.block_list(block_mask)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block: tuple[int, int] = (64, 64),
    *,
    is_causal: bool = False,
    key_end: Tensor | None = None,
    normalizer: str = "softmax",
    alpha: Tensor | float = 1.5,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    return_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention over blocks as a single op; the equation is in the module's docstring.

    q, k and v are float32, float64, bfloat16 or float16, of one dtype (under ``torch.autocast``
    they are cast), on one device, of any strides, and differentiable, any number of times, through
    both results: the first derivative has its own kernel, higher ones run in plain PyTorch. Inside
    a ``torch.func`` transform (grad, vmap, jacrev, ...) the call runs in plain PyTorch: right, but
    slow. Results on the CPU are the same bits for any number of threads.

    Args:
        q: [B, Hq, Tq, D], D > 0.
        k: [B, Hk, Tk, D], Hk > 0.
        v: [B, Hk, Tk, Dv].
        blocks: which key blocks the queries of a block see, as a mask bool [nQ, nK], [Hq, nQ, nK]
            or [B, Hq, nQ, nK], or as what :func:`block_list` made of one: int64 [1 or B, 1 or Hq,
            N, 2], in order, each block once, -1 where a list has ended. A mask is turned into a
            list at each call; inside ``torch.compile`` give a list.
        block: (Bq, Bk), from 1 on. nQ = ceil(Tq / Bq), nK = ceil(Tk / Bk); the last blocks may be
            short.
        is_causal: query i sees no key after key i.
        key_end: int64 or int32, [B] or [B, Tq]: the query sees keys 0..key_end - 1 alone; Tk by
            default, to which any other value is clamped. Nothing depends on keys that no query
            sees, whatever they hold.
        normalizer: of the scores that a query sees: "softmax", "sparsemax", "entmax15" or "entmax"
            (:func:`entmax`).
        alpha: of "entmax", 1 < alpha <= 2, or a tensor that broadcasts to [B, Hq, Tq, 1] and is
            differentiable ([H, 1, 1] for one a head). With a tensor, plain PyTorch runs around
            :func:`entmax`, and all scores are computed:
            memory Tq times Tk.
        scale: factor of the scores, 1 / sqrt(D) by default.
        dropout: in 0..1, how probably a weight is zero when it meets the values; the others are
            divided by 1 - dropout, as torch.nn.MultiheadAttention has it. Which ones depends on
            seed and on the weight's place alone.
        seed: int64 [1] or a number; drawn from torch's generator by default.
        return_weights: False returns None in place of weights, which are not stored unless a
            gradient is wanted.

    Returns:
        output [B, Hq, Tq, Dv]; weights [B, Hq, N, Bq, Bk], those of each listed block, exactly 0
        where there is no such query or key, or the query does not see it (:func:`dense_weights`
        spreads them out). A query that sees no key gets zeros, and no gradient. On the CPU, NaN or
        infinity in a query, key or value reaches what sees it and nothing else.

    Raises:
        ValueError: a shape or value does not fit; the message names the argument, what was
            expected and what came.
        TypeError: a dtype, device or layout does not fit.
    """
    require_tensors("block_sparse_attention", blocks=blocks, key_end=key_end)
    check_block(block)
    if blocks.dtype == torch.bool:
        if q.dim() == k.dim() == 4 and min(block) > 0:
            _check_mask(blocks, block, q.size(2), k.size(2), [*q.shape[:2]])
        blocks = block_list(blocks)
    output, weights = attend_to_some(
        _block_sparse_attention,
        _plain,
        (q, k, v),
        (blocks, *block, is_causal, key_end, scale),
        normalizer,
        alpha,
        dropout,
        seed,
        return_weights,
    )
    return output, weights if return_weights else None


def check_block(block: tuple[int, int]) -> None:
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise TypeError(f"{_NAME}: expected block of two sizes, (Bq, Bk), got {block!r}")


def _check_mask(
    mask: Tensor, block: tuple[int, int], queries: int, keys: int, lead: list[int]
) -> None:
    """A mask of blocks over so many queries and keys; lead: B and Hq, either of which may be 1."""
    grid = [-(-length // size) for length, size in zip((queries, keys), block, strict=True)]
    before = list(mask.shape[:-2])
    known = zip(before, lead[len(lead) - len(before) :], strict=False)
    if list(mask.shape[-2:]) != grid or not all(size in (1, wanted) for size, wanted in known):
        wanted = f"{grid[0]}, {grid[1]}"
        raise ValueError(
            f"{_NAME}: expected blocks of shape [{wanted}], [{lead[1]}, {wanted}] or "
            f"[{lead[0]}, {lead[1]}, {wanted}], got {list(mask.shape)}"
        )


def dense_weights(
    weights: Tensor, blocks: Tensor, block: tuple[int, int], queries: int, keys: int
) -> Tensor:
    """Weights [B, Hq, N, Bq, Bk] of listed blocks as [B, Hq, Tq, Tk], zero elsewhere.

    Differentiable. blocks: the mask or list that :func:`block_sparse_attention` was given; block:
    (Bq, Bk); queries, keys: Tq and Tk.
    """
    check_block(block)
    if blocks.dtype == torch.bool and weights.dim() == 5 and min(block) > 0:
        _check_mask(blocks, block, queries, keys, [*weights.shape[:2]])
    listed = block_list(blocks) if blocks.dtype == torch.bool else blocks
    wanted = [listed.size(-2), *block]
    if weights.dim() != 5 or list(weights.shape[2:]) != wanted:
        sizes = ", ".join(map(str, wanted))
        raise ValueError(
            f"{_NAME}: expected weights of shape [B, Hq, {sizes}], got {list(weights.shape)}"
        )
    return reference.to_dense(weights, listed, block, queries, keys)
