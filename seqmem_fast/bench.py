"""The command `bench`; the benchmarks themselves live in the repository, not in the package."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def clone_root() -> Path | None:
    """The clone this package runs from, or the one it is run in; None if there is none."""
    for folder in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (folder / "benchmarks" / "__main__.py").is_file():
            return folder
    return None


def run_in_clone(module: str, arguments: Sequence[str]) -> int:
    """Runs one of the repository's own programs; its exit status, or 2 outside a clone."""
    root = clone_root()
    if root is None:
        print(
            f"seqmem_fast: {module} is in the repository and not in the installed package: clone "
            "the repository and run `make bench` there, or run this command inside the clone",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(root))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Trains a character model with both LSTMs, then measures every row."""
    return run_in_clone("benchmarks", arguments)
