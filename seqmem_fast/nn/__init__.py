"""Modules with the constructors, parameters and call forms of their torch.nn namesakes."""

from .additive_attention import AdditiveAttention
from .attention import Attention
from .dynamic_memory import DynamicMemory, EpisodicMemory
from .lstm import LSTM, LSTMCell, LSTMGates

__all__ = [
    "LSTM",
    "AdditiveAttention",
    "Attention",
    "DynamicMemory",
    "EpisodicMemory",
    "LSTMCell",
    "LSTMGates",
]
