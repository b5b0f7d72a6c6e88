"""A minute of the campaign of hostile arguments; `make fuzz` runs it longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.slow
def test_no_arguments_harm_any_op() -> None:
    command = [sys.executable, str(FUZZ), "--count", "20000", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
