"""Plain PyTorch of every op: the executable specification."""

from . import dynamic_memory, lstm, ntm, ntm_sequence

__all__ = ["dynamic_memory", "lstm", "ntm", "ntm_sequence"]
