"""The programs in examples/, loaded as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name: str, *needs: str) -> ModuleType:
    """examples/<name>.py; skips where it, or a package that it needs, is not there."""
    path = EXAMPLES / f"{name}.py"
    if not path.is_file():
        pytest.skip("the examples are not beside these tests")
    for package in needs:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
