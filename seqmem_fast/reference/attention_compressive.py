"""A compressive memory in plain Python, row by row and vector by vector.

Paper: Rae, Potapenko, Jayakumar & Lillicrap, Compressive Transformers for Long-Range Sequence
Modelling, arXiv 1911.05507, 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Row:
    """What one row of a batch remembers, the oldest first."""

    memory: list[Tensor] = field(default_factory=list)  # at most memory_size vectors
    pending: list[Tensor] = field(default_factory=list)  # fewer than ratio
    compressed: list[Tensor] = field(default_factory=list)  # at most compressed_size

    def step(
        self,
        vector: Tensor,
        compress: Callable[[Tensor], Tensor],
        memory_size: int,
        compressed_size: int,
        ratio: int,
    ) -> None:
        """One vector [E] of the stream arrives; `compress` takes a group [ratio, E]."""
        self.memory.append(vector)
        if len(self.memory) <= memory_size:
            return
        self.pending.append(self.memory.pop(0))
        if len(self.pending) < ratio:
            return
        self.compressed.append(compress(torch.stack(self.pending)))
        self.pending.clear()
        del self.compressed[:-compressed_size]

    def slots(self) -> list[Tensor]:
        """All that attention may read."""
        return [*self.compressed, *self.pending, *self.memory]

    def clear(self) -> None:
        """Forgets everything."""
        self.memory.clear()
        self.pending.clear()
        self.compressed.clear()
