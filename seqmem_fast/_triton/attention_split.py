"""Attention's forward in float32 on GPU, by products of bfloat16: attention_split_kernels.py."""

from __future__ import annotations

import torch
from torch import Tensor

from . import attention_split_kernels as kernels
from .attention_call import Call, Tiles
from .common import cdiv, product_precision, strides


def serves(call: Call) -> bool:
    """Heads of up to 64 features in float32, where TF32 alone is too coarse.

    An offset within a matrix of parts has 32 bits.
    """
    narrow = max(call.width, call.value_width) <= 64 and call.keys < 1 << 23
    return narrow and product_precision(call.like.dtype, call.like.device) == "tf32x3"


def tiles(device: torch.device, programs: int) -> Tiles:
    """The blocks of attention_split, for so many blocks of 64 queries: what spills nothing there.

    Hopper's products take the rows of four warps; with eight, two halves fill each other's waits,
    which pays once every multiprocessor has such a program.
    """
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] != 9:
            return Tiles(64, 32, 4)
        if programs >= 2 * torch.cuda.get_device_properties(device).multi_processor_count:
            return Tiles(128, 64, 8)
    return Tiles(64, 64, 4)


def by_parts(call: Call, is_causal: bool, output: Tensor, weights: Tensor) -> None:
    """The forward in float32, by products of bfloat16."""
    tile = tiles(call.like.device, call.batch * cdiv(call.queries, 64))
    columns = {"BD": call.columns(call.width), "BV": call.columns(call.value_width)}
    blocks = cdiv(call.queries, tile.queries), cdiv(call.keys, tile.keys)
    sizes = (
        blocks[0] * tile.queries * columns["BD"],
        blocks[1] * tile.keys * columns["BD"],
        blocks[1] * tile.keys * columns["BV"],
    )
    parts = call.like.new_empty(3 * call.batch * sum(sizes), dtype=torch.bfloat16)
    q, k, v = parts.split([3 * call.batch * size for size in sizes])
    common = {
        "queries": call.queries,
        "keys": call.keys,
        "value_width": call.value_width,
        "heads": call.heads,
        "BM": tile.queries,
        "BN": tile.keys,
        **columns,
        "num_warps": tile.warps,
        "num_stages": 1,
    }
    kernels.attention_parts[(call.batch * max(blocks), 3)](
        q_ptr=call.query,
        k_ptr=call.key,
        v_ptr=call.value,
        q_parts_ptr=q,
        k_parts_ptr=k,
        v_parts_ptr=v,
        width=call.width,
        blocks=max(blocks),
        **strides("q", call.query, "0", "1", "t"),
        **strides("k", call.key, "0", "1", "t"),
        **strides("v", call.value, "0", "1", "t"),
        **common,
    )
    kernels.attention_split[(call.batch * blocks[0],)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        mask_ptr=call.mask,
        output_ptr=output,
        weights_ptr=weights,
        scale=call.scale,
        blocks=blocks[0],
        CAUSAL=is_causal,
        ONE_BLOCK=blocks[1] == 1,
        STAGES=2,
        **strides("m", call.mask, "0", "1", "i", "j"),
        **common,
    )
