"""Builds ``seqmem_fast._C``: sources are found by glob, CPU kernels are compiled once per ISA."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MIN_TORCH = (2, 11)
INSTALL = "pip install --no-build-isolation ."

COMMON_FLAGS = [
    "-std=c++20",  # torch 2.11 would ask for C++17
    "-O3",
    "-g0",  # objects stay small; --sanitize turns line numbers on
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-missing-braces",  # in Clang's -Wall: arguments fill a struct and its bases
]
SANITIZE_FLAGS = [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",  # would need the type information of torch's own classes
    "-fno-sanitize-recover=undefined",
]

# One row per ISA: name, the compiler's flags, the names by which ATen's vector headers know it. The
# last two are for bf16 alone: vectors of dot products (AMD's Zen 4), and tiles (Intel's Sapphire
# Rapids), which are inline assembly, so that the compiler need not know them.
ISA_FLAGS = {
    "baseline": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    "avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
        *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ],
}
ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16", "-DSEQMEM_DOT_PRODUCTS"]
ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
BF16_DEFINES = {"avx512_bf16": "-DSEQMEM_DOT_PRODUCTS", "amx": "-DSEQMEM_EMULATE_TILES"}


def fail(sentence: str) -> NoReturn:
    """End the build with one sentence and no traceback."""
    raise SystemExit(f"seqmem_fast: {sentence}")


def isas() -> list[str]:
    """The ISAs to compile for on this processor family."""
    return list(ISA_FLAGS) if platform.machine() == "x86_64" else ["baseline"]


def isas_of_this_machine() -> list[str]:
    """Those of them that can run here: a sanitized build goes nowhere else."""
    import torch

    known = isas()
    best = torch.backends.cpu.get_cpu_capability().lower()
    return known[: known.index(best) + 1] if best in known else known[:1]


def sources(*patterns: str) -> list[str]:
    """All files below csrc/ that match, sorted, relative to this folder."""
    root = Path(__file__).parent
    found = [path for pattern in patterns for path in root.glob(f"csrc/{pattern}")]
    return sorted(str(path.relative_to(root)) for path in found)


def joined(files: list[str], folder: Path) -> list[str]:
    """The same sources with the C++ of each room of csrc/ in one file, included one by one.

    Most of their time goes into torch's headers, which are then read once a room.
    """
    rooms: dict[Path, list[Path]] = {}
    for file in map(Path, files):
        if file.suffix == ".cpp":
            rooms.setdefault(file.parent, []).append(file)
    folder.mkdir(parents=True, exist_ok=True)
    found = [file for file in files if Path(file).suffix != ".cpp"]
    for room, members in rooms.items():
        text = "".join(f'#include "{member.resolve()}"\n' for member in members)
        file = folder / f"{room.name}.cpp"
        if not file.exists() or file.read_text() != text:  # a new one is compiled anew
            file.write_text(text)
        found.append(str(file))
    return found


class NoTorch(build_ext):
    """Stands in for the build where torch is absent, so that sdist and metadata still work."""

    def run(self) -> None:
        fail(
            "building needs PyTorch 2.11 or newer in this very environment: "
            f"install torch first, then run `{INSTALL}`"
        )


def find_nvcc() -> Path | None:
    """The CUDA compiler, and with it the toolkit that torch will build against."""
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None:
        return None
    home = Path(cpp_extension.CUDA_HOME)
    nvcc = home / "bin" / "nvcc"
    if not nvcc.exists():
        return None
    # The nvcc on PATH may be a script somewhere else that calls the toolkit's own.
    top = re.search(r"TOP=(.+)", output_of(nvcc, "--dryrun", "-x", "cu", os.devnull))
    if top is not None and not (home / "include" / "cuda_runtime_api.h").exists():
        cpp_extension.CUDA_HOME = os.path.realpath(top[1])
        nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    return nvcc


def output_of(*command: str | Path) -> str:
    """What a command prints, on either stream; nothing if it cannot be run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout + result.stderr


def missing_for_cuda(nvcc: Path | None) -> str | None:
    """What to install before the CUDA sources can be built, or None."""
    import torch

    wanted = torch.version.cuda
    if wanted is None:
        return f"a CUDA build of torch, and torch {torch.__version__} is none: install one"
    toolkit = f"install the CUDA toolkit {wanted} and point CUDA_HOME at it"
    if nvcc is None:
        return f"nvcc: {toolkit}"
    release = re.search(r"release (\d+)[.\d]*", output_of(nvcc, "--version"))
    if release is None:
        return f"an nvcc that works, and {nvcc} does not tell its version: {toolkit}"
    if release[1] != wanted.split(".")[0]:
        return f"nvcc of CUDA {wanted}, as torch has, and {nvcc} is of {release[0]}: {toolkit}"
    return None


def choose_archs(nvcc: Path) -> None:
    """Set TORCH_CUDA_ARCH_LIST where neither the builder nor a GPU says what to compile for.

    Then it is what torch itself was built for, so far as this nvcc can, and PTX of the newest.
    """
    import torch
    from torch.utils import cpp_extension

    arch = r"compute_(\d+)"
    known = set(re.findall(arch, output_of(nvcc, "--list-gpu-arch")))
    unset = os.environ.get("TORCH_CUDA_ARCH_LIST") in (None, "", "native")
    if unset and torch.cuda.device_count() == 0:
        # Not torch.cuda.get_arch_list(), which is empty without a GPU.
        of_torch = re.findall(r"sm_(\d+)(\d)([af]?)", torch._C._cuda_getArchFlags() or "")
        archs = [
            f"{major}.{minor}{kind}" for major, minor, kind in of_torch if major + minor in known
        ]
        if not archs:
            fail(f"{nvcc} compiles for none of the GPUs that torch was built for: set FORCE_CUDA=0")
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(archs) + "+PTX"
    try:
        flags = cpp_extension._get_cuda_arch_flags()
    except ValueError as error:
        fail(f"TORCH_CUDA_ARCH_LIST: {error}")
    if unknown := set(re.findall(arch, " ".join(flags))) - known:
        fail(
            f"{nvcc} cannot compile for compute_{', compute_'.join(sorted(unknown))}: "
            "set TORCH_CUDA_ARCH_LIST to some of what `nvcc --list-gpu-arch` prints"
        )


def use_cuda() -> bool:
    """CUDA sources are built if torch is a CUDA build and its nvcc is here; FORCE_CUDA overrides.

    Never decided by ``torch.cuda.is_available()``: machines that build often have no GPU.
    """
    forced = os.environ.get("FORCE_CUDA", "")
    if forced not in ("", "0", "1"):
        fail(f"FORCE_CUDA must be 0 or 1, got {forced!r}")
    if forced == "0":
        return False
    nvcc = find_nvcc()
    missing = missing_for_cuda(nvcc)
    if missing is not None and forced == "1":
        fail(f"FORCE_CUDA=1 needs {missing}, or unset FORCE_CUDA")
    if nvcc is None or missing is not None:
        import torch

        expected = nvcc is not None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        if expected and torch.version.cuda is not None:
            print(f"seqmem_fast: built without CUDA C++, which needs {missing}", file=sys.stderr)
        return False
    choose_archs(nvcc)
    return True


def check_tools() -> None:
    """Refuse what cannot build: a torch too old, a system or compiler that is not there."""
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MIN_TORCH:
        fail(
            f"torch {torch.__version__} is too old: install PyTorch 2.11 or newer, "
            f"then run `{INSTALL}`"
        )
    if sys.platform != "linux":
        fail(f"only Linux is supported, this is {sys.platform}: on Windows, build it inside WSL")
    # ninja (for the objects) and setuptools (for the link) then use the same compiler.
    compiler = os.environ.setdefault("CXX", "c++")
    command = shlex.split(compiler)
    if shutil.which(command[0]) is None:
        fail(
            f"no C++ compiler found ({compiler!r} is not on PATH): install one "
            "(on Debian or Ubuntu: apt install g++), or point CXX at it"
        )
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "openmp.cpp"
        program.write_text("#include <omp.h>\nint main() { return omp_get_num_procs() < 1; }\n")
        options = ["-fopenmp", str(program), "-o", str(program.with_suffix(""))]
        if subprocess.run([*command, *options], capture_output=True).returncode != 0:
            fail(
                f"{compiler!r} cannot build a program that uses OpenMP: install what it lacks "
                "(for Clang on Debian or Ubuntu: apt install libomp-dev), or set CXX=g++"
            )
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        fail(
            "the headers of this Python are missing (Python.h): install them "
            "(on Debian or Ubuntu: apt install python3-dev)"
        )
    # A virtual environment's ninja counts too if the environment is not activated.
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    if shutil.which("ninja") is None:
        fail(f"ninja is missing: run `pip install ninja`, then `{INSTALL}`")


def kernel_objects(
    folder: Path, kinds: list[str], emulated: tuple[str, str] | None
) -> dict[Path, tuple[list[str], Path]]:
    """The object files of the CPU kernels: each with its flags and source, large sources first.

    `emulated`: an ISA for bf16 to emulate, alone of its kind, and the one that it shall run on.
    """
    folders = {isa: (isa, ISA_FLAGS[isa]) for isa in kinds}
    if emulated is not None:
        isa, host = emulated
        folders = {name: kind for name, kind in folders.items() if name not in BF16_DEFINES}
        folders[isa] = (f"{isa}-emulated-{host}", [BF16_DEFINES[isa], *ISA_FLAGS[host]])
    found = []
    for isa, (name, flags) in folders.items():
        for file in sources("cpu/*_bf16.cpp" if isa in BF16_DEFINES else "cpu/*_kernel.cpp"):
            target = folder / name / Path(file).with_suffix(".o")
            found.append((target, ([f"-DSEQMEM_ISA={isa}", *flags], Path(file).resolve())))
    return dict(sorted(found, key=lambda item: item[1][1].stat().st_size, reverse=True))


@contextlib.contextmanager
def one_ninja_file(kernels: dict[Path, tuple[list[str], Path]]) -> Iterator[None]:
    """Put the kernels at the head of the ninja file that torch writes for the other sources.

    So all objects share one pool of jobs, and the ones that take longest start first.
    """
    from torch.utils import cpp_extension

    def escape(path: Path) -> str:
        return str(path).replace(" ", "$ ")

    edges = ""
    for target, (flags, source) in kernels.items():
        edges += f"\nbuild {escape(target)}: compile {escape(source)}\n"
        edges += f"  post_cflags = $post_cflags {' '.join(flags)}\n"
    run_ninja = cpp_extension._run_ninja_build

    def add_and_run(build_directory: str, verbose: bool, error_prefix: str) -> None:
        file = Path(build_directory) / "build.ninja"
        head, first, others = file.read_text().partition("\nbuild ")
        file.write_text(head + edges + first + others)
        run_ninja(build_directory, verbose, error_prefix)

    cpp_extension._run_ninja_build = add_and_run
    try:
        yield
    finally:
        cpp_extension._run_ninja_build = run_ninja


def make_build_ext() -> type[build_ext]:
    """torch's build command, extended by one compilation of the CPU kernels per ISA."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildPerIsa(BuildExtension):
        user_options = [  # noqa: RUF012
            *build_ext.user_options,
            ("sanitize", None, "build with AddressSanitizer and UndefinedBehaviorSanitizer"),
            ("isas=", None, "compile the CPU kernels for these ISAs alone, as in avx2,avx512"),
            ("emulate-tiles", None, "run the kernels on tiles without these, as --sanitize does"),
            ("emulate-dots", None, "run those on bf16 dot products without these, and no tiles"),
        ]
        boolean_options = [  # noqa: RUF012
            *build_ext.boolean_options,
            "sanitize",
            "emulate-tiles",
            "emulate-dots",
        ]
        sanitize: bool
        emulate_tiles: bool
        emulate_dots: bool
        isas: str | None
        build_temp: str
        extensions: list[Extension]

        def initialize_options(self) -> None:
            super().initialize_options()
            self.sanitize = False
            self.emulate_tiles = False
            self.emulate_dots = False
            self.isas = None

        def finalize_options(self) -> None:
            import torch

            # A fixed folder per torch, so that editable installs too rebuild only what changed.
            if not self.build_temp:
                tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
                self.build_temp = f"build/temp.{tag}-torch{torch.__version__}"
            super().finalize_options()

        def run(self) -> None:
            check_tools()
            # Flags are added on the way, and one packing command may come here twice.
            self.extensions = copy.deepcopy(self.extensions)
            super().run()

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except RuntimeError as error:  # torch's way to report a failed compilation
                fail(f"the build failed: {error}; the compiler's own words stand above")

        def build_extension(self, ext: Extension) -> None:
            flags = ext.extra_compile_args
            flags["cxx"].append(f"-DSEQMEM_VERSION={self.distribution.get_version()}")
            kinds = self.wanted_isas()
            if self.sanitize:
                flags["cxx"] += SANITIZE_FLAGS
                ext.extra_link_args += ["-fsanitize=address,undefined"]
            # Only the kernels for bf16 differ where they are emulated, or none are compiled.
            flags["cxx"] += [
                f"-DSEQMEM_WITH_{isa.upper()}" for isa in kinds if isa not in BF16_DEFINES
            ]
            emulated = None
            # A sanitizer sees nothing of inline assembly.
            if self.sanitize or self.emulate_tiles or self.emulate_dots:
                runs_here = [isa for isa in isas_of_this_machine() if isa in kinds]
                if not runs_here:
                    fail(f"bf16 is emulated for this machine, which runs none of {kinds}")
                emulated = ("avx512_bf16" if self.emulate_dots else "amx", runs_here[-1])
            ext.sources = joined(ext.sources, Path(self.build_temp, "joined"))
            kernels = kernel_objects(Path(self.build_temp).resolve(), kinds, emulated)
            ext.extra_objects = [*ext.extra_objects, *map(str, kernels)]
            with one_ninja_file(kernels):
                super().build_extension(ext)

        def wanted_isas(self) -> list[str]:
            if self.isas is not None:
                named = self.isas.split(",")
                if unknown := set(named) - set(isas()):
                    fail(f"--isas takes some of {', '.join(isas())}, got {', '.join(unknown)}")
                return [isa for isa in isas() if isa in named]
            return isas_of_this_machine() if self.sanitize else isas()

    return BuildPerIsa.with_options(use_ninja=True)


def extension() -> Extension:
    """The one extension module, for CPU or, where torch and nvcc allow, CUDA too."""
    from torch.utils import cpp_extension

    # Seen as system headers, torch's own do not drown our warnings.
    system = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    cxx = [*COMMON_FLAGS, *system]
    cxx.append("-fopenmp")
    files = sources("*.cpp", "common/*.cpp", "ops/*.cpp", "autograd/*.cpp", "python/*.cpp")
    arguments: dict[str, Any] = {
        "include_dirs": [str(Path(__file__).parent.resolve() / "csrc")],
        "extra_link_args": ["-fopenmp"],
    }
    if use_cuda():
        flags = {"cxx": [*cxx, "-DSEQMEM_WITH_CUDA"], "nvcc": ["-O3", "-DSEQMEM_WITH_CUDA"]}
        return cpp_extension.CUDAExtension(
            "seqmem_fast._C",
            sources("cuda/*.cu", "cuda/*.cpp") + files,
            extra_compile_args=flags,
            **arguments,
        )
    return cpp_extension.CppExtension(
        "seqmem_fast._C", files, extra_compile_args={"cxx": cxx}, **arguments
    )


if int(setuptools.__version__.split(".")[0]) < 77:  # older ones misread pyproject.toml
    fail(f"setuptools {setuptools.__version__} is too old: run `pip install -U setuptools`")

try:
    import torch  # noqa: F401
except ImportError:
    setup(ext_modules=[Extension("seqmem_fast._C", sources=[])], cmdclass={"build_ext": NoTorch})
else:
    setup(ext_modules=[extension()], cmdclass={"build_ext": make_build_ext()})
