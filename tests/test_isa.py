"""The tests marked ``isa`` once more under each ATEN_CPU_CAPABILITY below the one in use, and those
of bf16 LSTMs, attention and NTMs on emulated tiles and dot products. Those of the baseline run in
an installed wheel: test_build.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqmem_fast import _C
from seqmem_fast.info import available_isas

ROOT = Path(__file__).parents[1]
ISA_OF = {"default": "baseline", "avx2": "avx2"}


@pytest.mark.isa
def test_the_capability_asked_for_is_in_use() -> None:
    available = available_isas(_C.build_info()["isas"])
    asked = os.environ.get("ATEN_CPU_CAPABILITY")
    assert _C.cpu_capability() == (ISA_OF[asked] if asked in ISA_OF else available[-1])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [name for name in ISA_OF if name != "default"])
def test_under_capability(capability: str) -> None:
    if ISA_OF[capability] not in available_isas(_C.build_info()["isas"]):
        pytest.skip("this processor has no such instructions")
    if ISA_OF[capability] == _C.cpu_capability():
        pytest.skip("what this run uses anyway")
    run_python(ROOT, "-m", "pytest", "-m", "isa", *QUIET, "tests", ATEN_CPU_CAPABILITY=capability)


@pytest.mark.slow
@pytest.mark.parametrize(("option", "isa"), [("tiles", "amx"), ("dots", "avx512_bf16")])
def test_emulated(option: str, isa: str, tmp_path: Path) -> None:
    """In a copy that shares all objects with this build but those of the kernels in bf16."""
    info = _C.build_info()
    if f"{isa}, emulated" in info["bf16"]:
        pytest.skip("what this run uses anyway")
    if not list(ROOT.glob(f"build/temp.*-torch{torch.__version__}/{info['isas'][0]}")):
        pytest.skip("needs the objects of a build in place")
    build = ("build_ext", f"--emulate-{option}", "--isas", ",".join(info["isas"]))
    target = ("--build-lib", str(tmp_path))
    run_python(ROOT, "setup.py", "--quiet", "build_py", *target, *build, *target)
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    emulates = f"from seqmem_fast import _C; assert _C.bf16_in_use() == '{isa}', _C.__file__"
    run_python(tmp_path, "-c", emulates)
    names = ("lstm", "lstm_module", "lstm_bf16", "attention", "attention_bf16", "ntm_bf16")
    files = [f"tests/test_{name}.py" for name in names]
    run_python(tmp_path, "-m", "pytest", "-k", "bfloat16 or _bf16", *QUIET, *files)


QUIET = ("-p", "no:cacheprovider", "-q")


def run_python(cwd: Path, *arguments: str, **env: str) -> None:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    print(result.stdout[-3000:], result.stderr[-3000:])
    assert result.returncode == 0
