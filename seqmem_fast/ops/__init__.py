"""Public differentiable functions over ``torch.ops.seqmem``."""

from .lstm import lstm, lstm_cell, lstm_trace

__all__ = ["lstm", "lstm_cell", "lstm_trace"]
