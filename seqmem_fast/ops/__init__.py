"""Public differentiable functions over ``torch.ops.seqmem``."""

from .dynamic_memory import dynamic_memory
from .lstm import lstm, lstm_cell, lstm_trace

__all__ = ["dynamic_memory", "lstm", "lstm_cell", "lstm_trace"]
