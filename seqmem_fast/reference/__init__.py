"""Plain PyTorch of every op: the executable specification."""

from . import additive_attention, attention, dynamic_memory, hard_attention, lstm, ntm, ntm_sequence

__all__ = [
    "additive_attention",
    "attention",
    "dynamic_memory",
    "hard_attention",
    "lstm",
    "ntm",
    "ntm_sequence",
]
