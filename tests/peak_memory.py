"""How much memory a piece of code needs at its peak, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

KIB = """
from pathlib import Path
def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
"""


def growth_mib(definitions: str, warm_up: str, measured: str) -> float:
    """How far the peak rises by `measured`, after `warm_up` has loaded what both need."""
    script = f"{KIB}{definitions}\n{warm_up}\nbefore = kib('VmRSS')\n{measured}\n"
    command = [sys.executable, "-c", script + "print(kib('VmHWM') - before)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024
