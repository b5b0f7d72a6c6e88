"""What the tests of csrc/cuda share: the sources on the CPU, and nvcc's own report of them."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ptx.kept import call, hashed, kept
from torch import Tensor
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
STAND_IN = Path(__file__).parent / "cuda_on_cpu"
SOURCES = [ROOT / "csrc" / "cuda", ROOT / "csrc" / "common"]
ARCHITECTURES = ["80", "90", "100"]
# Largest error beside the largest value, of a result computed in float64.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


def assert_near(ours: Tensor, right: Tensor, name: str = "", factor: float = 1) -> None:
    """Ours beside a result in float64."""
    assert ours.shape == right.shape, name
    error = (ours.double() - right).abs().max().item()
    largest = max(right.abs().max().item(), 1e-3)
    assert error <= factor * TOLERANCES[ours.dtype] * largest, (name, error)


def check_each_alone(
    backward: Callable[[list[bool]], Sequence[Tensor]], found: Sequence[Tensor], count: int
) -> None:
    """Of the first gradients, each the only one wanted: it is as it was, the others are empty."""
    for alone in range(count):
        wanted = [k == alone for k in range(len(found))]
        for k, (a, b) in enumerate(zip(backward(wanted), found, strict=True)):
            assert torch.equal(a, b) if k == alone else a.shape == (0,)


def load_on_cpu(stem: str) -> Any:
    """The ops of an op's CUDA sources, compiled by the C++ compiler against a stand-in for CUDA."""
    compiler = os.environ.get("CXX", "c++").split()
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-I{STAND_IN}"]
    headers = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu"]
    command = [*compiler, *flags, *headers, str(STAND_IN / f"{stem}.cpp"), *libraries]
    key = hashed((*command, torch.__version__), [*SOURCES, STAND_IN])
    library = kept(f"{stem}_{key}.so", lambda target: call([*command, "-o", str(target)]))
    torch.ops.load_library(str(library))
    return getattr(torch.ops, f"{stem}_cuda_on_cpu")


def sources_on_cpu(stem: str) -> Any:
    """The fixture `load_on_cpu`, once for a file of tests."""

    @pytest.fixture(scope="module")
    def ops() -> Any:
        return load_on_cpu(stem)

    return ops


class Resources(NamedTuple):
    """What ptxas says of one kernel."""

    symbol: str
    stack: int
    spilled: int
    registers: int


def compile_with_nvcc(stem: str, arch: str) -> list[Resources]:
    """Compile an op's kernels, once for all architectures; warnings fail."""
    source = ROOT / "csrc" / "cuda" / f"{stem}_kernel.cu"
    command = ["nvcc", "-c", "-O3", "-std=c++17", "-Xptxas", "-v", str(source)]
    for each in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{each},code=sm_{each}"]

    def make(report: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            report.write_text(call([*command, "-o", f"{folder}/kernel.o"]))

    text = kept(f"{stem}_{hashed(command, SOURCES)}.txt", make).read_text()
    assert "warning" not in text
    found = re.findall(
        rf"Compiling entry function '(\S*)' for 'sm_{arch}'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        text,
        re.DOTALL,
    )
    return [
        Resources(symbol, int(stack), int(stores) + int(loads), int(registers))
        for symbol, stack, stores, loads, registers in found
    ]


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def spills(stem: str, count: int) -> Callable[..., None]:
    """The test that an op's file has so many kernels, none of which spills."""

    @needs_nvcc
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
        found = compile_with_nvcc(stem, arch)
        assert len(found) == count
        with capsys.disabled():
            print(f"\nsm_{arch}: at most {max(kernel.registers for kernel in found)} registers")
        assert all(kernel.stack == kernel.spilled == 0 for kernel in found)

    return test
