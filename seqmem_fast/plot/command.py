"""The command `plot`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..bench import run_in_clone


def main(arguments: Sequence[str]) -> int:
    """`plot gates` draws a character model reading a sentence."""
    parser = argparse.ArgumentParser(prog="python -m seqmem_fast plot")
    parser.add_argument("picture", choices=("gates",))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see: plot gates --help")
    parsed = parser.parse_args(arguments)
    return run_in_clone(f"benchmarks.{parsed.picture}", parsed.options)
