"""Building, packing, loading, and what ``python -m seqmem_fast info`` tells."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forks import ROOT, run

from seqmem_fast import _C
from seqmem_fast.info import available_isas

NEVER_COPIED = (".git", ".venv", "build", "dist", ".*_cache", "__pycache__", "*.so", "*.egg-info")


def python(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def test_build_info() -> None:
    info = _C.build_info()
    assert info["version"].count(".") == 2
    assert torch.__version__.startswith(info["torch"])
    assert info["isas"][0] == "baseline"
    assert _C.cpu_capability() in info["isas"]


@pytest.mark.slow
def test_info_as_text_and_json() -> None:
    text = python("-m", "seqmem_fast", "info")
    assert text.returncode == 0, text.stderr
    facts = json.loads(python("-m", "seqmem_fast", "info", "--json").stdout)
    assert facts["seqmem_fast"] == _C.build_info()["version"]
    assert facts["torch"] == torch.__version__
    assert facts["ISA in use"] == _C.cpu_capability()
    for name, value in facts.items():
        assert any(
            line.startswith(name) and line.endswith(str(value)) for line in text.stdout.splitlines()
        )


@pytest.mark.slow
def test_unknown_command_names_the_known_ones() -> None:
    result = python("-m", "seqmem_fast", "nonsense")
    assert result.returncode == 2
    assert "nonsense" in result.stderr and "info" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "isa"), [("default", "baseline"), ("avx2", "avx2")])
def test_capability_selects_the_isa(capability: str, isa: str) -> None:
    if isa not in available_isas(_C.build_info()["isas"]):
        pytest.skip("this processor has no such instructions")
    program = "from seqmem_fast import _C; print(_C.cpu_capability())"
    result = python("-c", program, ATEN_CPU_CAPABILITY=capability)
    assert result.stdout.strip() == isa, result.stderr


# A torch that looks like a CUDA build, and a toolkit in CUDA_HOME whose nvcc only answers
# questions. `with CUDA` is printed where setup.py decides for the CUDA sources.
CUDA_TORCH = (
    "import os, torch; torch.version.cuda = '13.0'; "
    "torch._C._cuda_getArchFlags = lambda: 'sm_70 sm_90 sm_100'; "
    "from torch.utils import cpp_extension; cpp_extension.CUDA_HOME = os.environ['CUDA_HOME']"
)
NVCC = """#!/bin/sh
case $1 in
--version) test -n "$NVCC_RELEASE" && echo "Cuda compilation tools, release $NVCC_RELEASE" ;;
--list-gpu-arch) printf 'compute_%s\\n' 80 90 100 120 ;;
--dryrun) echo "#$ TOP=$REAL_TOOLKIT" >&2 ;;
esac
"""


def cuda_toolkit(folder: Path) -> dict[str, str]:
    """The environment of a machine that has it and no GPU."""
    for name in ("bin", "include"):
        (folder / name).mkdir(parents=True)
    (folder / "bin" / "nvcc").write_text(NVCC)
    (folder / "bin" / "nvcc").chmod(0o755)
    (folder / "include" / "cuda_runtime_api.h").touch()
    return {
        "CUDA_HOME": str(folder),
        "CUDA_VISIBLE_DEVICES": "",
        "FORCE_CUDA": "",
        "NVCC_RELEASE": "13.0",
        "REAL_TOOLKIT": str(folder),
        "TORCH_CUDA_ARCH_LIST": "",
    }


# What is asked of setup.py where torch is a CUDA build: whether the CUDA sources are built, for
# which architectures, and a line that is printed.
DECISIONS = {
    "default archs": ({}, True, "9.0;10.0+PTX", ""),
    "archs named": ({"TORCH_CUDA_ARCH_LIST": "8.0;12.0"}, True, "8.0;12.0", ""),
    "without cuda": ({"FORCE_CUDA": "0"}, False, "", ""),
    "with cuda": ({"FORCE_CUDA": "1"}, True, "9.0;10.0+PTX", ""),
    "newer minor": ({"NVCC_RELEASE": "13.2"}, True, "9.0;10.0+PTX", ""),
    "another major": (
        {"NVCC_RELEASE": "12.8"},
        False,
        "",
        "seqmem_fast: built without CUDA C++, which needs nvcc of CUDA 13.0, as torch has, and ",
    ),
    "no nvcc where CUDA_HOME points": (
        {"CUDA_HOME": "/nonexistent"},
        False,
        "",
        "seqmem_fast: built without CUDA C++, which needs nvcc: install the CUDA toolkit 13.0 and ",
    ),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_cuda_sources_are_built_where_they_can_be(case: str, tmp_path: Path) -> None:
    asked, with_cuda, archs, line = DECISIONS[case]
    program = (
        f"import runpy, sys; {CUDA_TORCH}\n"
        "make = cpp_extension.CUDAExtension\n"
        "cpp_extension.CUDAExtension = lambda *a, **k: print('with CUDA') or make(*a, **k)\n"
        "sys.argv = ['setup.py', '--version']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
        "print('archs', os.environ['TORCH_CUDA_ARCH_LIST'])"
    )
    result = run(program, tmp_path, **{**cuda_toolkit(tmp_path / "toolkit"), **asked})
    assert result.returncode == 0, result.stderr
    assert ("with CUDA" in result.stdout) == with_cuda
    assert result.stdout.splitlines()[-1] == f"archs {archs}".strip() or archs == ""
    warnings = [text for text in result.stderr.splitlines() if text.startswith("seqmem_fast:")]
    assert [text[: len(line)] for text in warnings] == [line] * bool(line)


def test_cuda_toolkit_behind_a_script_named_nvcc(tmp_path: Path) -> None:
    env = cuda_toolkit(tmp_path / "toolkit")
    elsewhere = cuda_toolkit(tmp_path / "local")["CUDA_HOME"]
    (tmp_path / "local" / "include" / "cuda_runtime_api.h").unlink()
    program = (
        f"import runpy, sys; {CUDA_TORCH}\n"
        "sys.argv = ['setup.py', '--version']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
        "print(cpp_extension.CUDA_HOME)"
    )
    result = run(program, tmp_path, **{**env, "CUDA_HOME": elsewhere})
    assert result.stdout.splitlines()[-1] == env["REAL_TOOLKIT"], result.stderr


# What stands before setup.py runs, what is asked of it, and the sentence that must come of it.
REFUSALS = {
    "no torch": ("sys.modules['torch'] = None", {}, "building needs PyTorch 2.11 or newer"),
    "old torch": (
        "import torch; torch.__version__ = '2.4.1+cpu'",
        {},
        "torch 2.4.1+cpu is too old: install PyTorch 2.11 or newer",
    ),
    "old setuptools": (
        "import setuptools; setuptools.__version__ = '65.5.0'",
        {},
        "setuptools 65.5.0 is too old",
    ),
    "no compiler": ("", {"CXX": "no-such-compiler"}, "no C++ compiler found"),
    "no OpenMP": (
        "import subprocess; run = subprocess.run; "
        "subprocess.run = lambda command, **rest: run(['false'], **rest)",
        {"FORCE_CUDA": "0"},
        "cannot build a program that uses OpenMP",
    ),
    "no Python.h": (
        "import sysconfig; sysconfig.get_path = lambda name: '/nonexistent'",
        {},
        "the headers of this Python are missing",
    ),
    "no ninja": (
        "import shutil; which = shutil.which; "
        "shutil.which = lambda name: None if name == 'ninja' else which(name)",
        {},
        "ninja is missing",
    ),
    "cuda without torch's": (
        "import torch; torch.version.cuda = None",
        {"FORCE_CUDA": "1"},
        "FORCE_CUDA=1 needs a CUDA build of torch",
    ),
    "cuda without nvcc": (
        f"{CUDA_TORCH}; cpp_extension.CUDA_HOME = None",
        {"FORCE_CUDA": "1"},
        "FORCE_CUDA=1 needs nvcc: install the CUDA toolkit 13.0",
    ),
    "nvcc of another cuda": (
        CUDA_TORCH,
        {"FORCE_CUDA": "1", "NVCC_RELEASE": "12.8"},
        "FORCE_CUDA=1 needs nvcc of CUDA 13.0, as torch has",
    ),
    "nvcc that does not run": (
        CUDA_TORCH,
        {"FORCE_CUDA": "1", "NVCC_RELEASE": ""},
        "FORCE_CUDA=1 needs an nvcc that works",
    ),
    "arch that is none": (
        CUDA_TORCH,
        {"TORCH_CUDA_ARCH_LIST": "1.0"},
        "TORCH_CUDA_ARCH_LIST: Unknown CUDA arch (1.0)",
    ),
    "arch unknown to nvcc": (
        CUDA_TORCH,
        {"TORCH_CUDA_ARCH_LIST": "7.0;9.0"},
        "cannot compile for compute_70: set TORCH_CUDA_ARCH_LIST",
    ),
    "no arch in common": (
        f"{CUDA_TORCH}; torch._C._cuda_getArchFlags = lambda: 'sm_50'",
        {},
        "compiles for none of the GPUs that torch was built for",
    ),
    "odd FORCE_CUDA": ("", {"FORCE_CUDA": "yes"}, "FORCE_CUDA must be 0 or 1, got 'yes'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_build_that_cannot_work_says_what_to_do(case: str, tmp_path: Path) -> None:
    before, env, sentence = REFUSALS[case]
    program = (
        f"import runpy, sys; {before or 'pass'}\n"
        f"sys.argv = ['setup.py', '--quiet', 'build_ext', '--build-lib', {str(tmp_path)!r}, "
        f"'--build-temp', {str(tmp_path / 'temp')!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    result = run(program, tmp_path, **{**cuda_toolkit(tmp_path / "toolkit"), **env})
    assert result.returncode != 0
    assert "seqmem_fast: " in result.stderr and sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "temp").exists(), "something was compiled before"


def unbuilt_package(folder: Path) -> str:
    """A package folder without its compiled module, and the start of a program that uses it."""
    (folder / "seqmem_fast").mkdir()
    shutil.copy(ROOT / "seqmem_fast" / "_load.py", folder / "seqmem_fast")
    (folder / "seqmem_fast" / "__init__.py").write_text("from . import _load\n")
    # Taking the finder of an editable install away leaves only what lies in the folder.
    return (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        f"sys.path.insert(0, {str(folder)!r}); "
    )


def test_import_before_building(tmp_path: Path) -> None:
    result = run(unbuilt_package(tmp_path) + "import seqmem_fast", tmp_path, cwd=tmp_path)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: seqmem_fast: the compiled module is not built")
    assert "pip install --no-build-isolation" in last


@pytest.mark.parametrize(
    ("compiled", "sentence"),
    [
        ("def build_info(): return {'torch': '2.4.1'}", "was built for torch 2.4.1, and torch"),
        ("raise ImportError('undefined symbol: _ZN3c10')", "was built for another torch than"),
        ("raise ImportError('libgomp.so.1 not found')", "cannot be loaded (libgomp.so.1 not found"),
    ],
)
def test_import_with_another_torch(compiled: str, sentence: str, tmp_path: Path) -> None:
    program = unbuilt_package(tmp_path) + "import seqmem_fast"
    (tmp_path / "seqmem_fast" / "_C.py").write_text(compiled)
    last = run(program, tmp_path, cwd=tmp_path).stderr.splitlines()[-1]
    assert last.startswith("ImportError: seqmem_fast: the compiled module")
    assert sentence in last and "pip install --no-build-isolation" in last


def object_files(isa: str) -> list[Path]:
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch.__version__}"
    return sorted((ROOT / "build" / f"temp.{tag}" / isa).rglob("*.o"))


@pytest.mark.slow
def test_no_function_is_shared_between_isas() -> None:
    """The linker keeps one copy of each external name: that must never be an AVX-512 one."""
    if shutil.which("nm") is None or not object_files("baseline"):
        pytest.skip("needs nm and the objects of a build in place")
    owner: dict[str, str] = {}
    for isa in (*_C.build_info()["isas"], "avx512_bf16", "amx"):
        for file in object_files(isa):
            names = subprocess.check_output(
                ["nm", "--defined-only", "--extern-only", "--format=just-symbols", file], text=True
            ).split()
            assert names, f"{file} defines nothing"
            for name in names:
                assert owner.setdefault(name, isa) == isa, f"{name} in {owner[name]} and {isa}"


# And what they link to.
KERNELS = sorted([*ROOT.glob("csrc/cpu/*_kernel.cpp"), *ROOT.glob("csrc/common/*.cpp")])
IN_BF16 = sorted((ROOT / "csrc" / "cpu").glob("*_bf16.cpp"))
COMMON = ("-std=c++20", "-fopenmp", "-Wno-unknown-pragmas", "-Icsrc")
BASELINE, ON_TILES = (*COMMON, "-DSEQMEM_ISA=baseline"), (*COMMON, "-DSEQMEM_ISA=amx")
ON_DOTS = (*COMMON, "-DSEQMEM_ISA=avx512_bf16", "-DSEQMEM_DOT_PRODUCTS")
AVX512 = [f"-mavx512{part}" for part in ("f", "dq", "vl", "bw", "bf16")]


def compile_kernels(
    *command: str, kernels: Sequence[Path] = KERNELS, flags: Sequence[str] = BASELINE
) -> None:
    """Run the command on each kernel source, by default for the baseline, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(
                subprocess.run,
                [word.format(stem=kernel.stem) for word in (*command, *flags, str(kernel))],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            for kernel in kernels
        ]
    for done in runs:
        assert done.result().returncode == 0, done.result().stderr


CLANG = next(filter(shutil.which, ("clang++", *(f"clang++-{n}" for n in range(23, 13, -1)))), "")


@pytest.mark.slow
@pytest.mark.skipif(not CLANG, reason="needs Clang")
def test_kernels_are_understood_by_clang() -> None:
    command = (CLANG, "-fsyntax-only", "-Wall", "-Wextra", "-Werror")
    compile_kernels(*command)
    compile_kernels(*command, kernels=IN_BF16, flags=(*ON_TILES, "-DSEQMEM_EMULATE_TILES"))
    compile_kernels(*command, kernels=IN_BF16, flags=ON_DOTS)
    if platform.machine() == "x86_64":
        for flags in (ON_TILES, ON_DOTS):
            compile_kernels(*command, kernels=IN_BF16, flags=(*flags, *AVX512))


EVERY_TILE_INSTRUCTION = """
#include "common/tiles.h"
void use(void* p, int64_t stride) {
  seqmem::tiles_configure(5);
  seqmem::tile_zero<3>();
  seqmem::tile_load<6>(p, stride);
  seqmem::tile_product<0, 4, 7>();
  seqmem::tile_store<1>(p, stride);
  seqmem::tiles_release();
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_tile_instructions_are_those_meant(tmp_path: Path) -> None:
    """All that a machine without tiles can tell of the hardware's side of common/tiles.h."""
    source = tmp_path / "every_tile.cpp"
    source.write_text(EVERY_TILE_INSTRUCTION)
    target = str(tmp_path / "every.o")
    compile_kernels("c++", "-O2", "-c", "-o", target, kernels=[source], flags=ON_TILES)
    text = subprocess.check_output(["objdump", "-d", "--no-show-raw-insn", target], text=True)
    found = re.findall(r"\t(ldtilecfg|tile\w+|tdp\w+) *(\S*)", text)
    assert found[0][0] == "ldtilecfg"
    assert found[1:] == [
        ("tilezero", "%tmm3"),
        ("tileloadd", "(%rdi,%rsi,1),%tmm6"),
        ("tdpbf16ps", "%tmm7,%tmm4,%tmm0"),
        ("tilestored", "%tmm1,(%rdi,%rsi,1)"),
        ("tilerelease", ""),
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="needs a cross compiler")
def test_kernels_compile_and_link_for_aarch64(tmp_path: Path) -> None:
    """Neither x86 instructions nor intrinsics in the baseline's path; -O0 for the sake of time."""
    compiler = "aarch64-linux-gnu-g++"
    compile_kernels(compiler, "-O0", "-fPIC", "-c", "-o", f"{tmp_path}/{{stem}}.o")
    objects = sorted(map(str, tmp_path.glob("*.o")))
    assert len(objects) == len(KERNELS)
    library = str(tmp_path / "kernels.so")
    subprocess.run(
        [compiler, "-shared", "-Wl,--no-undefined", "-fopenmp", *objects, "-o", library], check=True
    )


def sdist(folder: Path) -> Path:
    """Pack a copy of the source tree, so that packing leaves nothing behind in this one."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NEVER_COPIED))
    result = python("setup.py", "--quiet", "sdist", "--dist-dir", str(folder), cwd=source)
    assert result.returncode == 0, result.stderr
    (archive,) = folder.glob("seqmem_fast-*.tar.gz")
    return archive


@pytest.mark.slow
def test_sdist_holds_what_a_build_needs(tmp_path: Path) -> None:
    with tarfile.open(sdist(tmp_path)) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needed = [ROOT / name for name in ("setup.py", "pyproject.toml", "LICENSE", "Makefile")]
    needed += [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    needed += [*(ROOT / "seqmem_fast").rglob("*.py"), ROOT / "seqmem_fast" / "py.typed"]
    needed += [*(ROOT / "tests").rglob("*.py"), *(ROOT / "requirements").glob("*.txt")]
    assert {str(path.relative_to(ROOT)) for path in needed} <= packed
    assert not [name for name in packed if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.slow
def test_wheel_works_in_a_fresh_environment(tmp_path: Path) -> None:
    """Tried with the tests marked ``isa``, and the lowest ATEN_CPU_CAPABILITY."""
    built = python(
        *("setup.py", "--quiet", "build", "--build-lib", str(tmp_path / "lib")),
        *("egg_info", "--egg-base", str(tmp_path)),
        *("bdist_wheel", "--bdist-dir", str(tmp_path / "bdist"), "--dist-dir", str(tmp_path)),
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    environment = tmp_path / "env"
    assert python("-m", "venv", "--without-pip", str(environment)).returncode == 0
    fresh = environment / "bin" / "python"
    site = subprocess.check_output(
        [fresh, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    # torch and pytest come from this environment; its .pth files, our editable install's too,
    # are not read by the new one.
    Path(site.strip(), "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    into_it = ("--python", str(fresh), "install", "--no-deps", "--no-index", str(wheel))
    installed = python("-m", "pip", *into_it)
    assert installed.returncode == 0, installed.stderr
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pyc*"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    where = "import seqmem_fast; print(seqmem_fast.__file__)"
    found = subprocess.check_output([fresh, "-c", where], text=True, cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(environment)
    assert (Path(found.strip()).parent / "py.typed").exists()
    tests = [fresh, "-m", "pytest", "-q", "-m", "isa", "-p", "no:cacheprovider"]
    lowest = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    result = subprocess.run(tests, cwd=tmp_path, env=lowest, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("file", sorted(ROOT.glob("csrc/cuda/*.cu")), ids=lambda f: f.stem)
def test_compiles_for_the_oldest_gpus(file: Path, tmp_path: Path) -> None:
    """Those of torch's own builds: what they lack must be left out, not only never launched."""
    target = "arch=compute_75,code=sm_75"
    unoptimized = ("-O0", "-Xcicc", "-O0", "-Xptxas", "-O0")
    command = ["nvcc", "-c", *unoptimized, "-std=c++17", "-gencode", target, str(file)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "kernel.o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
