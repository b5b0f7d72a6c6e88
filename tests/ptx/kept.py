"""Files that compilers make, kept in build/tests from one run of the tests to the next."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "tests"


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """The file of this name, which must tell all that it depends on; one process makes it."""
    target = KEPT / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.parent / f"{name}.partial"
            make(partial)
            partial.rename(target)
    return target


def hashed(words: Iterable[str], folders: Iterable[Path]) -> str:
    """Of the words, and of all files in the folders, which may be files themselves."""
    key = hashlib.sha256("\0".join(words).encode())
    for folder in folders:
        for file in sorted(file for file in (folder, *folder.rglob("*")) if file.is_file()):
            key.update(file.read_bytes())
    return key.hexdigest()[:16]


def call(command: Sequence[str]) -> str:
    """What it says on its standard error."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stderr
