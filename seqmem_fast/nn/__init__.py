"""Modules with the constructors, parameters and call forms of their torch.nn namesakes."""

from .additive_attention import AdditiveAttention
from .attention import Attention
from .dynamic_memory import DynamicMemory, EpisodicMemory
from .lstm import LSTM, LSTMCell, LSTMGates
from .ntm import NTM
from .ntm_memory import NTMMemory

__all__ = [
    "LSTM",
    "NTM",
    "AdditiveAttention",
    "Attention",
    "DynamicMemory",
    "EpisodicMemory",
    "LSTMCell",
    "LSTMGates",
    "NTMMemory",
]
