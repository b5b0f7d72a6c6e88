"""CUDA C++ to PTX."""

from __future__ import annotations

import re
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

from .kept import ROOT, call, hashed, kept
from .launch import Module


def found() -> bool:
    return shutil.which("nvcc") is not None


@cache
def compiled(source: str) -> Module:
    return Module(ptx(source))


def plant(patch: pytest.MonkeyPatch, pattern: str, replacement: str) -> None:
    """A fault in all kernels of every file, for whoever asks for what is compiled."""

    def faulty(source: str) -> Module:
        text, count = re.subn(pattern, replacement, ptx(source))
        assert count > 0
        return Module(text)

    patch.setattr(sys.modules[__name__], "compiled", faulty)


@cache
def ptx(source: str) -> str:
    """Of a file of csrc/cuda, for sm_90a; kept in build/tests under the hash of that folder."""
    folder = ROOT / "csrc" / "cuda"
    command = ["nvcc", "-ptx", "-O3", "-std=c++20", "-lineinfo", "-arch=sm_90a"]
    key = hashed((*command, source), (folder, ROOT / "csrc" / "common"))

    def make(target: Path) -> None:
        call([*command, str(folder / source), "-o", str(target)])

    return kept(f"{Path(source).stem}_{key}.ptx", make).read_text()
