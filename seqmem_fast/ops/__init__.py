"""Public differentiable functions over ``torch.ops.seqmem``."""

# Written by `make format`:
from .additive_attention import additive_attention
from .attention import attention
from .block_sparse_attention import block_list, block_sparse_attention, dense_weights
from .delta_memory import delta_memory
from .dnc import DNCOptions, DNCState, DNCTrace, dnc, dnc_trace
from .dynamic_memory import dynamic_memory
from .entmax import entmax, entmax15, sparsemax
from .hard_attention import categorical_sample, reinforce_loss
from .indexed_attention import indexed_attention, top_k_attention
from .lrua import LRUAState, LRUATrace, lrua, lrua_trace
from .lstm import lstm, lstm_cell, lstm_trace
from .lstm_regularized import LSTMNorms, lstm_regularized
from .ntm import ntm, ntm_trace
from .ntm_addressing import NTMState, ntm_addressing, ntm_content_addressing, ntm_read, ntm_write
from .window_attention import window_attention

__all__ = [
    "DNCOptions",
    "DNCState",
    "DNCTrace",
    "LRUAState",
    "LRUATrace",
    "LSTMNorms",
    "NTMState",
    "additive_attention",
    "attention",
    "block_list",
    "block_sparse_attention",
    "categorical_sample",
    "delta_memory",
    "dense_weights",
    "dnc",
    "dnc_trace",
    "dynamic_memory",
    "entmax",
    "entmax15",
    "indexed_attention",
    "lrua",
    "lrua_trace",
    "lstm",
    "lstm_cell",
    "lstm_regularized",
    "lstm_trace",
    "ntm",
    "ntm_addressing",
    "ntm_content_addressing",
    "ntm_read",
    "ntm_trace",
    "ntm_write",
    "reinforce_loss",
    "sparsemax",
    "top_k_attention",
    "window_attention",
]
# End of what `make format` writes.
