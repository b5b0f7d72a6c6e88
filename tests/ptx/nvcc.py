"""CUDA C++ to PTX."""

from __future__ import annotations

import hashlib
import shutil
from functools import cache
from pathlib import Path

from .kept import ROOT, call, kept
from .launch import Module


def found() -> bool:
    return shutil.which("nvcc") is not None


@cache
def compiled(source: str) -> Module:
    return Module(ptx(source))


@cache
def ptx(source: str) -> str:
    """Of a file of csrc/cuda, for sm_90a; kept in build/ptx under the hash of that folder."""
    folder = ROOT / "csrc" / "cuda"
    command = ["nvcc", "-ptx", "-O3", "-std=c++20", "-lineinfo", "-arch=sm_90a"]
    key = hashlib.sha256(" ".join((*command, source)).encode())
    for file in sorted([*folder.iterdir(), *(ROOT / "csrc" / "common").iterdir()]):
        key.update(file.read_bytes())

    def make(target: Path) -> None:
        call([*command, str(folder / source), "-o", str(target)])

    return kept(f"{Path(source).stem}_{key.hexdigest()[:16]}.ptx", make).read_text()
