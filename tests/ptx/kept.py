"""Files that compilers make, kept in build/ptx from one run of the tests to the next."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """The file of this name, which must tell all that it depends on; one process makes it."""
    target = ROOT / "build" / "ptx" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.parent / f"{name}.partial"
            make(partial)
            partial.rename(target)
    return target


def call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
