"""Plain PyTorch of every op: the executable specification."""

from . import additive_attention, attention, dynamic_memory, lstm, ntm, ntm_sequence

__all__ = ["additive_attention", "attention", "dynamic_memory", "lstm", "ntm", "ntm_sequence"]
