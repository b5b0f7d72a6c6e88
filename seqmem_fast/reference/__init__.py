"""Plain PyTorch of every op: the executable specification."""

from . import dynamic_memory, lstm

__all__ = ["dynamic_memory", "lstm"]
