"""Fast fused LSTM, memory and attention ops for PyTorch, exact and drop-in."""

from typing import TYPE_CHECKING, Any

from seqmem_fast._load import _C

from . import _triton, nn, ops, reference, tasks
from .accelerate import accelerate, restore
from .nn import *  # noqa: F403
from .ops import DNCState, DNCTrace, LRUAState, LRUATrace, NTMState

if TYPE_CHECKING:
    from . import plot as plot

__all__ = [
    "DNCState",
    "DNCTrace",
    "LRUAState",
    "LRUATrace",
    "NTMState",
    "__version__",
    "accelerate",
    "nn",
    "ops",
    "reference",
    "restore",
    "tasks",
]
__all__ += nn.__all__

__version__: str = _C.build_info()["version"]

_triton.register()


def __getattr__(name: str) -> Any:
    if name == "plot":  # on demand: it needs matplotlib
        import importlib

        return importlib.import_module(".plot", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
