"""The tests marked ``isa`` once more under each ATEN_CPU_CAPABILITY below the one in use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from seqmem_fast import _C
from seqmem_fast.info import available_isas

ISA_OF = {"default": "baseline", "avx2": "avx2"}


@pytest.mark.isa
def test_the_capability_asked_for_is_in_use() -> None:
    available = available_isas(_C.build_info()["isas"])
    asked = os.environ.get("ATEN_CPU_CAPABILITY")
    assert _C.cpu_capability() == (ISA_OF[asked] if asked in ISA_OF else available[-1])


@pytest.mark.slow
@pytest.mark.parametrize("capability", ISA_OF)
def test_under_capability(capability: str) -> None:
    if ISA_OF[capability] not in available_isas(_C.build_info()["isas"]):
        pytest.skip("this processor has no such instructions")
    if ISA_OF[capability] == _C.cpu_capability():
        pytest.skip("what this run uses anyway")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "isa", "-p", "no:cacheprovider", "-q", "tests"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    print(result.stdout[-3000:], result.stderr[-3000:])
    assert result.returncode == 0
