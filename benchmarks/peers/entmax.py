"""Package entmax, which sorts."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial

from torch import Tensor

PACKAGE = "entmax"
PARTLY = "entmax, k=100"  # sorts the largest hundred of a row first


def functions(name: str) -> dict[str, Callable[..., Tensor]]:
    """Its sparsemax or entmax15, both ways; none where it is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        return {}
    whole = getattr(importlib.import_module(PACKAGE), name)
    return {PACKAGE: whole, PARTLY: partial(whole, k=100)}
