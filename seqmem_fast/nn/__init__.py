"""Modules with the constructors, parameters and call forms of their torch.nn namesakes."""

# Written by `make format`:
from .additive_attention import AdditiveAttention
from .attention import Attention
from .attention_compressive import (
    Compression,
    CompressiveAttention,
    CompressiveMemory,
    CompressiveState,
)
from .block_sparse_attention import BlockSparseAttention
from .delta_memory import DeltaMemory, DeltaMemoryState
from .dnc import DNC
from .dynamic_memory import DynamicMemory, EpisodicMemory
from .entmax import Entmax15, Sparsemax
from .hard_attention import (
    HardAttention,
    MovingAverageBaseline,
    discounted_returns,
    reinforce_train_step,
)
from .indexed_attention import TopKAttention
from .lrua import MANN
from .lstm import LSTM, LSTMCell, LSTMGates
from .ntm import NTM
from .ntm_addressing import NTMMemory
from .window_attention import WindowAttention, WindowState, WindowWeights

__all__ = [
    "DNC",
    "LSTM",
    "MANN",
    "NTM",
    "AdditiveAttention",
    "Attention",
    "BlockSparseAttention",
    "Compression",
    "CompressiveAttention",
    "CompressiveMemory",
    "CompressiveState",
    "DeltaMemory",
    "DeltaMemoryState",
    "DynamicMemory",
    "Entmax15",
    "EpisodicMemory",
    "HardAttention",
    "LSTMCell",
    "LSTMGates",
    "MovingAverageBaseline",
    "NTMMemory",
    "Sparsemax",
    "TopKAttention",
    "WindowAttention",
    "WindowState",
    "WindowWeights",
    "discounted_returns",
    "reinforce_train_step",
]
# End of what `make format` writes.
