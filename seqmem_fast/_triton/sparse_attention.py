"""What the launchers of attention to some of the keys share.

q is [B, Hq, Tq, D], k [B, Hk, Tk, D] and v [B, Hk, Tk, DV].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .common import accumulator, next_power_of_2, strides


def fits_heads(q: Tensor, v: Tensor) -> bool:
    """Whether a program holds the features of a head."""
    most = 32 if q.dtype == torch.float64 else 128
    return bool(max(q.shape[-1], v.shape[-1]) <= most)


def dense_rows(*operands: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in operands)


def placed(**operands: Tensor) -> dict[str, Any]:
    """Where q, k or v are and how far apart their rows, heads and steps are, as kernels take it."""
    found: dict[str, Any] = {}
    for name, t in operands.items():
        found |= {f"{name}_ptr": t, **strides(name, t, "0", "1", "t")}
    return found


def of_lists(lists: Sequence[int]) -> dict[str, int]:
    """Which of the lists, [1 or B, 1 or Hq], each row and head has."""
    return {
        "list_0": 0 if lists[0] == 1 else lists[1],
        "list_1": 0 if lists[1] == 1 else 1,
    }


def begins_of(numbers: Tensor, count: int) -> Tensor:
    """[lists, places] in order, `count` where there is none -> where each begins, of count + 1."""
    wanted = torch.arange(count + 1, device=numbers.device).expand(numbers.size(0), -1)
    return torch.searchsorted(numbers.contiguous(), wanted.contiguous())


def int_bound(prefix: str, t: Tensor | None) -> dict[str, Any]:
    """A bound of the keys that queries see, [B] or [B, Tq], as `key_bound` takes it."""
    if t is not None:
        t = t.to(torch.int64).contiguous()
    return {f"{prefix}_ptr": t, f"EACH_{prefix.upper()}": t is not None and t.dim() == 2}


def of_heads(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float
) -> dict[str, Any]:
    """What every kernel of attention over heads takes: q [B, Hq, Tq, D], k and v [B, Hk, Tk, *]."""
    queries, width = q.shape[2:]
    keys, values = v.shape[2:]
    return {
        "SCALE": width**-0.5 if scale is None else float(scale),
        "queries": queries,
        "keys": keys,
        "width": width,
        "value_width": values,
        "heads": q.shape[1],
        "group": q.shape[1] // k.shape[1],
        "ACC": accumulator(q.dtype),
        "FACTOR": 1 / (1 - dropout) if dropout < 1 else 0.0,  # of weights that are not dropped
        "BD": max(16, next_power_of_2(width)),
        "BV": max(16, next_power_of_2(values)),
        "num_warps": 4 if q.element_size() == 2 else 8,
        "num_stages": 1,
    }
