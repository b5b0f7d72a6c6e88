"""Plain PyTorch of every op: the executable specification."""

from . import lstm

__all__ = ["lstm"]
