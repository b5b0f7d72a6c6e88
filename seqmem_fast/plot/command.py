"""The command `plot`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..bench import run_in_clone
from ..tasks import TASKS

IN_CLONE = ("gates",)  # pictures drawn by a program of the repository


def main(arguments: Sequence[str]) -> int:
    """`plot gates` draws a character model reading; `plot copy` a trained NTM copying."""
    parser = argparse.ArgumentParser(prog="python -m seqmem_fast plot")
    parser.add_argument("picture", choices=(*IN_CLONE, *TASKS))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see: plot <picture> --help")
    parsed = parser.parse_args(arguments)
    if parsed.picture in IN_CLONE:
        return run_in_clone(f"benchmarks.{parsed.picture}", parsed.options)
    from .trained import main as draw  # on demand: few pictures need a network

    return draw(parsed.picture, parsed.options)
