"""The attentions of heads to some of the keys, described as far as their tests differ."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from op_suite import Case, sample_of
from torch import Tensor

from seqmem_fast import ops
from seqmem_fast.reference.common import ALPHAS, Sample

RULE: dict[str, Any] = {
    "scale": None,
    "normalizer": "softmax",
    "alpha": 1.5,
    "dropout": 0.0,
    "seed": None,
}


@dataclass(frozen=True)
class SparseAttention:
    """One op; its samples' arguments are q, k, v and which keys each query sees."""

    name: str
    seen: dict[str, Any] = field(default_factory=dict)  # options before the rule, with defaults

    @property
    def reference(self) -> ModuleType:
        return importlib.import_module(f"seqmem_fast.reference.{self.name}")

    @property
    def names(self) -> list[str]:
        return [sample.name for sample in self.reference.sample_inputs()]

    def sample(self, name: str, **options: Any) -> Sample:
        sample: Sample = sample_of(self.reference, name, **options)
        return sample

    def threaded(self, case_of: Callable[[Sample], Case], name: str, *more: Case) -> list[Case]:
        """Calls below and above the size at which one takes several threads."""
        sizes = (1, 1, 3, 9, 8, 8), (2, 2, 400, 200, 32, 32)
        return [*(case_of(self.sample(name, sizes=one)) for one in sizes), *more]

    def run(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = getattr(ops, self.name)(*args, **kwargs)
        return found

    def exact(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = getattr(self.reference, self.name)(*args, **kwargs)
        return found

    def options(self, sample: Sample) -> dict[str, Any]:
        """All of them."""
        return {**self.seen, **RULE, **sample.kwargs}

    def dispatched(self, sample: Sample) -> tuple[Any, ...]:
        """What the op in the dispatcher takes, but for need_weights."""
        *options, normalizer, alpha, dropout, seed = self.options(sample).values()
        flat = (b for a in sample.args for b in (a if isinstance(a, tuple) else (a,)))
        return (*flat, *options, ALPHAS.get(normalizer, alpha), dropout, seed)


WINDOW = SparseAttention(
    "window_attention",
    {"dilation": 1, "offset": 0, "key_start": None, "key_end": None, "global_keys": 0},
)
BLOCK_SPARSE = SparseAttention("block_sparse_attention", {"is_causal": False, "key_end": None})
INDEXED = SparseAttention("indexed_attention")


def operands(sizes: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v; sizes = (B, Hq, Hk, Tq, Tk, D, Dv)."""
    batch, heads, key_heads, queries, keys, width, values = sizes
    generator = torch.Generator().manual_seed(3)
    shapes = (heads, queries, width), (key_heads, keys, width), (key_heads, keys, values)
    return tuple(torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes)
