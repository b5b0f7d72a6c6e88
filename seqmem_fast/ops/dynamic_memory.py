from __future__ import annotations

from ..reference.dynamic_memory import dynamic_memory

__all__ = ["dynamic_memory"]
