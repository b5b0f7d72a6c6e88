"""The command `plot`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..tasks import TASKS


def main(arguments: Sequence[str]) -> int:
    """`plot copy` draws a trained NTM copying."""
    parser = argparse.ArgumentParser(prog="python -m seqmem_fast plot")
    parser.add_argument("picture", choices=TASKS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see: plot <picture> --help")
    parsed = parser.parse_args(arguments)
    from .trained import main as draw  # on demand: few pictures need a network

    return draw(parsed.picture, parsed.options)
