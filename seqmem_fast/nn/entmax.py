"""Sparse alternatives to nn.Softmax, over :mod:`seqmem_fast.ops.entmax`."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops

__all__ = ["Entmax15", "Sparsemax"]


class _Normalizer(nn.Module):
    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Sparsemax(_Normalizer):
    """:func:`seqmem_fast.ops.sparsemax` in nn.Softmax's place.

    Args:
        dim: the dimension that sums to 1.

    Paper: Martins & Astudillo, From softmax to sparsemax, arXiv 1602.02068, 2016.
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.sparsemax(input, self.dim)


class Entmax15(_Normalizer):
    """:func:`seqmem_fast.ops.entmax15` in nn.Softmax's place.

    Args:
        dim: the dimension that sums to 1.

    Paper: Peters, Niculae & Martins, Sparse sequence-to-sequence models, arXiv 1905.05702, 2019.
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.entmax15(input, self.dim)
