"""Modules with the constructors, parameters and call forms of their torch.nn namesakes."""

from .lstm import LSTM, LSTMCell, LSTMGates

__all__ = ["LSTM", "LSTMCell", "LSTMGates"]
