"""Fast fused LSTM, memory and attention ops for PyTorch, exact and drop-in."""

from typing import TYPE_CHECKING, Any

from seqmem_fast._load import _C

from . import _triton, nn, ops, reference, tasks
from .accelerate import accelerate, restore
from .nn import (
    LSTM,
    NTM,
    AdditiveAttention,
    Attention,
    DynamicMemory,
    EpisodicMemory,
    HardAttention,
    LSTMCell,
    LSTMGates,
    MovingAverageBaseline,
    NTMMemory,
    discounted_returns,
    reinforce_train_step,
)
from .ops import NTMState

if TYPE_CHECKING:
    from . import plot as plot

__all__ = [
    "LSTM",
    "NTM",
    "AdditiveAttention",
    "Attention",
    "DynamicMemory",
    "EpisodicMemory",
    "HardAttention",
    "LSTMCell",
    "LSTMGates",
    "MovingAverageBaseline",
    "NTMMemory",
    "NTMState",
    "__version__",
    "accelerate",
    "discounted_returns",
    "nn",
    "ops",
    "reference",
    "reinforce_train_step",
    "restore",
    "tasks",
]

__version__: str = _C.build_info()["version"]

_triton.register()


def __getattr__(name: str) -> Any:
    if name == "plot":  # on demand: it needs matplotlib
        import importlib

        return importlib.import_module(".plot", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
