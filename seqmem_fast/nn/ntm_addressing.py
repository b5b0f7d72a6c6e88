"""An NTM's memory by itself, over :mod:`seqmem_fast.ops.ntm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops

__all__ = ["NTMMemory"]


class NTMMemory(nn.Module):
    """An NTM's memory by itself: addressed, read and written from outside.

    Args:
        memory_size: N, the slots.
        memory_dim: M, the width of a slot.
        batch_size: B, for B memories at once; None for a single one.
        device, dtype: of the memory.

    ``memory`` is a buffer [N, M] or [B, N, M], zeros at first. Every method is differentiable in
    all its arguments and in what was written before; vectors are [M] or [B, M], weights [N] or
    [B, N], scalars () or [B], as tensors, arrays or numbers. With one dimension more they speak for
    several heads. Equations and errors: :mod:`seqmem_fast.ops.ntm`.
    """

    memory: Tensor

    def __init__(
        self,
        memory_size: int,
        memory_dim: int,
        batch_size: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.memory_size, self.memory_dim = memory_size, memory_dim
        rows = () if batch_size is None else (batch_size,)
        shape = (*rows, memory_size, memory_dim)
        self.register_buffer("memory", torch.zeros(shape, device=device, dtype=dtype))

    def content_addressing(self, key: Any, beta: Any) -> Tensor:
        """Weights by similarity to the key, sharpened by beta."""
        key = self._tensor(key)
        return ops.ntm_content_addressing(self.memory, key, self._scalar(beta, key))

    def addressing(
        self, key: Any, beta: Any, gate: Any, shift: Any, gamma: Any, prev_weights: Any
    ) -> Tensor:
        """All four stages: content, interpolation with prev_weights, shift, sharpening."""
        key = self._tensor(key)
        beta, gate, gamma = (self._scalar(x, key) for x in (beta, gate, gamma))
        shift, prev_weights = self._tensor(shift), self._tensor(prev_weights)
        return ops.ntm_addressing(self.memory, key, beta, gate, shift, gamma, prev_weights)

    def read(self, weights: Any) -> Tensor:
        """The sum of the slots by their weights."""
        return ops.ntm_read(self.memory, self._tensor(weights))

    def write(self, weights: Any, erase_vector: Any, add_vector: Any) -> None:
        """Erase and add by weights; ``memory`` is then another tensor."""
        vectors = self._tensor(weights), self._tensor(erase_vector), self._tensor(add_vector)
        self.memory = ops.ntm_write(self.memory, *vectors)

    def reset(self) -> None:
        """Back to zeros, with no history."""
        self.memory = torch.zeros_like(self.memory.detach())

    def detach(self) -> None:
        """Forget how the memory came about: later gradients end here."""
        self.memory = self.memory.detach()

    def _tensor(self, value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=self.memory.dtype, device=self.memory.device)

    def _scalar(self, value: Any, key: Tensor) -> Tensor:
        """One number for all rows and heads, or one for each."""
        tensor = self._tensor(value)
        return tensor.expand(key.shape[:-1]) if tensor.dim() == 0 else tensor

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.memory.shape))
