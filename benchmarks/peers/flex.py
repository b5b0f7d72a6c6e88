"""FlexAttention, which torch compiles for a pattern of keys: attention without its weights.

On the CPU it has no backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.harness import rows

FLEX = "FlexAttention, no weights"
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, query, key) -> bool


def peer(sees: Sees, steps: int, block: int = 128) -> dict[str, Callable[[str], rows.Contender]]:
    """For ``Work.others``: every query's keys are those for which ``sees`` is true."""
    return {FLEX: partial(_contender, sees, steps, block)}


def without(make: Callable[..., rows.Work], *sizes: int) -> rows.Work:
    """Work at these sizes, where compiling for each pattern would take too long."""
    return replace(make(*sizes), others={})


def _contender(sees: Sees, steps: int, block: int, mode: str) -> rows.Contender:
    mask = create_block_mask(sees, None, None, steps, steps, device="cpu", BLOCK_SIZE=block)
    # Sizes that vary, which torch would assume from the second row on, it cannot compile here.
    attend = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor]:
        return (attend(q, k, v, block_mask=mask),)

    return replace(rows.contender(FLEX, call, mode), compiles=True)
