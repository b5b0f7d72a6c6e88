"""``python -m seqmem_fast <command>``: one table of commands, each imported only when called."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

# command: (what it does, the module whose main(arguments) -> exit status does it)
COMMANDS = {
    "info": ("versions, processor and build: what a bug report needs", "seqmem_fast.info"),
    "plot": ("pictures of a trained network: plot copy", "seqmem_fast.plot.command"),
    "train": ("learn a task that needs a memory: train copy", "seqmem_fast.tasks.command"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m seqmem_fast",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:8} {purpose}" for name, (purpose, _) in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see: <command> --help")
    parsed = parser.parse_args(arguments)
    status: int = import_module(COMMANDS[parsed.command][1]).main(parsed.options)
    return status
