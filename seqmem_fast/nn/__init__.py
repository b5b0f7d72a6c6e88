"""Modules with the constructors, parameters and call forms of their torch.nn namesakes."""

from .dynamic_memory import DynamicMemory, EpisodicMemory
from .lstm import LSTM, LSTMCell, LSTMGates

__all__ = ["LSTM", "DynamicMemory", "EpisodicMemory", "LSTMCell", "LSTMGates"]
