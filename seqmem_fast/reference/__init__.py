"""Plain PyTorch of every op: the executable specification."""

import warnings
from typing import Any

# Written by `make format`:
from . import (
    additive_attention,
    attention,
    attention_compressive,
    block_sparse_attention,
    delta_memory,
    dnc,
    dynamic_memory,
    entmax,
    hard_attention,
    indexed_attention,
    lrua,
    lstm,
    lstm_regularized,
    ntm,
    ntm_addressing,
    window_attention,
)

__all__ = [
    "additive_attention",
    "attention",
    "attention_compressive",
    "block_sparse_attention",
    "delta_memory",
    "dnc",
    "dynamic_memory",
    "entmax",
    "hard_attention",
    "indexed_attention",
    "lrua",
    "lstm",
    "lstm_regularized",
    "ntm",
    "ntm_addressing",
    "window_attention",
]
# End of what `make format` writes.


def __getattr__(name: str) -> Any:
    if name == "ntm_sequence":
        message = "seqmem_fast.reference.ntm_sequence is now seqmem_fast.reference.ntm"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return ntm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
