"""CUDA C++ to PTX."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from functools import cache
from pathlib import Path

from .launch import Module

ROOT = Path(__file__).parents[2]


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
    kept = ROOT / "build" / "ptx" / f"{Path(source).stem}_{key.hexdigest()[:16]}.ptx"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        done = subprocess.run(
            [*command, str(folder / source), "-o", str(partial)], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        partial.rename(kept)
    return kept.read_text()
