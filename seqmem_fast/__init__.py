"""Fast fused LSTM, memory and attention ops for PyTorch."""

from seqmem_fast._load import _C

__all__ = ["__version__"]

__version__: str = _C.build_info()["version"]
