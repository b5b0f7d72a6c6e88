"""Every op has all its rooms, found by its stem, and nobody imports across the house's rules."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exports import ROOMS as EXPORTING
from exports import exports

from seqmem_fast.ops import common as op_common

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "seqmem_fast"

STEMS = sorted(path.stem for path in (CSRC / "ops").glob("*.cpp"))
ROOMS = [
    "csrc/ops/{}.cpp",
    "csrc/autograd/{}.cpp",
    "csrc/cpu/{}_kernel.h",
    "seqmem_fast/ops/{}.py",
    "seqmem_fast/_triton/{}.py",
    "seqmem_fast/reference/{}.py",
    "seqmem_fast/nn/{}.py",
    "tests/test_{}.py",
    "tests/triton_{}_interpreted.py",
]
SHARED = {
    "__init__",
    "common",
    "isa_bf16",
    "controller",
    "controller_kernels",
    "flops",
    "launcher",
    "machine",
    "machine_kernels",
    "normalizers",
    "sparse_attention",
    "sparse_attention_gradients",
    "sparse_attention_kernels",
}  # the files of a room that belong to no single op

MOST_LINES = 400  # of a file of kernels
SOURCE = {".py", ".h", ".cuh", ".cpp", ".cu"}

# Who may import which room of the package ("" is its top); a room's own op is meant unless the
# target stands in ANY_OP. _triton falls back on the reference where no kernel fits. The top
# (__init__, cli, accelerate, ...) may import what it likes.
MAY_IMPORT = {
    "nn": {"nn", "ops"},
    "ops": {"ops", "reference"},
    "_triton": {"_triton", "ops", "reference"},
    "reference": {"reference"},
    "tasks": {"tasks", "nn", "ops", "reference"},
}
ANY_OP = {("nn", "nn"), ("nn", "ops"), ("tasks", "nn"), ("tasks", "ops"), ("tasks", "tasks")}


def stems_of(name: str) -> list[str]:
    """The stems that a name starts with, the shortest one first."""
    return [s for s in sorted(STEMS, key=len) if name == s or name.startswith(f"{s}_")]


def stem_of(name: str) -> str | None:
    """The op that a file belongs to: the longest stem that its name starts with."""
    return next(reversed(stems_of(name)), None)


def family_of(name: str) -> str | None:
    """The op that may use the file besides: ntm of ntm_addressing, which it builds on."""
    return next(iter(stems_of(name)), None)


def test_there_is_an_op() -> None:
    assert "lstm" in STEMS


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("stem", STEMS)
def test_every_op_has_every_room(stem: str, room: str) -> None:
    """Its modules may be those of its family: options of `LSTM` run lstm_regularized."""
    stems = [stem, family_of(stem)] if "/nn/" in room else [stem]
    assert any((ROOT / room.format(each)).is_file() for each in stems)


@pytest.mark.parametrize("stem", STEMS)
def test_every_family_has_a_benchmark(stem: str) -> None:
    assert (ROOT / f"benchmarks/bench_{family_of(stem)}.py").is_file()


@pytest.mark.parametrize("stem", STEMS)
def test_every_op_has_a_cpu_kernel(stem: str) -> None:
    kernels = (CSRC / "cpu").glob("*_kernel.cpp")
    assert any(stem_of(path.stem) == stem for path in kernels)


def test_every_op_has_a_stem_with_its_launchers() -> None:
    """A GPU launcher is the function named as its op in the module of the op's stem."""
    found = torch._C._dispatch_get_all_op_names()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = [name for name in found if name.startswith("seqmem::") and has_kernel(name, "Meta")]
    ops = [name.removeprefix("seqmem::") for name in ops]  # without a CUDA build's parts of ops
    for op in sorted(op for op in ops if not op.startswith("check_")):
        assert op in op_common.STEMS, f"no ops/<stem>.py declares {op}"
        tree = ast.parse((PACKAGE / "_triton" / f"{op_common.STEMS[op]}.py").read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert op in functions, f"no launcher {op} in _triton/{op_common.STEMS[op]}.py"


@pytest.mark.parametrize("room", EXPORTING)
def test_packages_export_the_public_names_of_their_modules(room: str) -> None:
    package = importlib.import_module(f"seqmem_fast.{room}")
    names = [name for some in exports(room).values() for name in some]
    assert sorted(package.__all__) == sorted(names), "run `make format`"
    assert all(hasattr(package, name) for name in names)


@pytest.mark.parametrize("stem", STEMS)
def test_every_op_has_public_names(stem: str) -> None:
    assert any(stem_of(module) == stem for module in exports("ops")), f"ops/{stem}.py"
    assert any(stem_of(module) in (stem, family_of(stem)) for module in exports("nn"))
    assert stem in exports("reference")[""]


def test_every_file_in_a_room_belongs_to_an_op() -> None:
    rooms = [CSRC / room for room in ("ops", "autograd", "cpu", "cuda", "python")]
    rooms += [PACKAGE / room for room in ("ops", "_triton", "reference", "nn")]
    strangers = [
        path
        for room in rooms
        for path in room.glob("*.*")
        if path.suffix in (".py", ".h", ".cpp", ".cu")
        if path.stem not in SHARED and stem_of(path.stem) is None
    ]
    assert not strangers


@pytest.mark.parametrize("room", ["csrc/cpu", "csrc/cuda", "csrc/common", "seqmem_fast/_triton"])
def test_kernel_files_are_short(room: str) -> None:
    """What is longer is not explained by a head comment."""
    files = [path for path in (ROOT / room).rglob("*") if path.suffix in SOURCE]
    assert files
    lengths = {path.name: len(path.read_text().splitlines()) for path in files}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def test_triton_functions_return_no_argument_that_may_be_none() -> None:
    """Triton 3.6 does not compile it; a local variable of the same value will do."""
    for path in sorted((PACKAGE / "_triton").glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            if not any("jit" in ast.unparse(mark) for mark in function.decorator_list):
                continue
            nodes = list(ast.walk(function))
            optional = {
                node.left.id
                for node in nodes
                if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name)
                if isinstance(node.ops[0], ast.Is | ast.IsNot)
            }
            arguments = {argument.arg for argument in function.args.args} & optional
            returned = {
                name.id
                for node in nodes
                if isinstance(node, ast.Return) and node.value is not None
                for name in getattr(node.value, "elts", [node.value])
                if isinstance(name, ast.Name)
            }
            assert not arguments & returned, f"{path.name}: {function.name}"


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """The full dotted names that a module of the package imports, wherever in the file."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def room_and_family(dotted: list[str]) -> tuple[str, str | None]:
    """Where in the package a dotted name leads: ('ops', 'lstm'); the top is ''."""
    inside = dotted[1:]
    if not inside or not (PACKAGE / inside[0]).is_dir():
        return "", None
    return inside[0], family_of(inside[1]) if len(inside) > 1 else None


def test_relative_imports_are_resolved() -> None:
    assert "seqmem_fast.ops" in set(imports(PACKAGE / "nn" / "lstm.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_python_imports_obey_the_rule(path: Path) -> None:
    room, family = room_and_family(list(path.relative_to(ROOT).with_suffix("").parts))
    for name in imports(path):
        assert name.split(".")[0] not in ("tests", "benchmarks"), f"{path.name} imports {name}"
        if room not in MAY_IMPORT or not name.startswith("seqmem_fast."):
            continue
        target, other = room_and_family(name.split("."))
        if not target:
            continue
        assert target in MAY_IMPORT[room], f"{room}/{path.name} imports {name}"
        one_op = family is not None and other is not None and (room, target) not in ANY_OP
        assert not one_op or family == other, f"{room}/{path.name} imports another op: {name}"


@pytest.mark.parametrize("stem", STEMS)
def test_the_reference_imports_torch_alone(stem: str) -> None:
    allowed = {"torch", "seqmem_fast", *sys.stdlib_module_names}
    tops = {name.split(".")[0] for name in imports(PACKAGE / "reference" / f"{stem}.py")}
    assert tops <= allowed


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_are_imported_late(path: Path) -> None:
    if path.parent.name == "_triton":
        pytest.skip("this folder itself is imported late")
    top = ast.parse(path.read_text()).body
    names = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
    optional = {"triton", "matplotlib", "rich", "numpy", "safetensors", "tensorboard"}
    assert not {name.split(".")[0] for name in names} & optional


INCLUDE = re.compile(r'^\s*#\s*include\s+([<"])([^">]+)[">]', re.MULTILINE)


def includes(path: Path) -> Iterator[str]:
    """Own headers as paths below csrc/, all others as written in angle brackets."""
    for bracket, name in INCLUDE.findall(path.read_text()):
        if bracket == "<":
            yield f"<{name}>"
        else:
            near, far = path.parent / name, CSRC / name
            found = near if near.exists() else far
            yield str(found.resolve().relative_to(CSRC))


def sources(room: str) -> list[Path]:
    found = (CSRC / room).glob("*.*")
    return sorted(path for path in found if path.suffix in (".h", ".cpp", ".cu", ".cuh"))


def is_torch(name: str) -> bool:
    return name.startswith(("<torch/", "<ATen/", "<c10/"))


@pytest.mark.parametrize("path", sources("ops"), ids=lambda path: path.name)
def test_ops_include_common_and_their_own_kernels(path: Path) -> None:
    for name in includes(path):
        if name.startswith("<"):
            continue
        room, _, file = name.partition("/")
        own = room != "autograd" and family_of(Path(file).stem) == family_of(path.stem)
        assert room == "common" or own, f"{path.name} includes {name}"


@pytest.mark.parametrize("path", [*sources("autograd"), *sources("python")], ids=str)
def test_autograd_knows_the_dispatcher_only(path: Path) -> None:
    for name in includes(path):
        room, _, file = name.partition("/")
        signatures = room == "ops" and file.endswith(".h") and stem_of(file) == stem_of(path.stem)
        assert name.startswith("<") or room == "common" or signatures, f"{path} includes {name}"


@pytest.mark.parametrize("path", sources("cpu"), ids=lambda path: path.name)
def test_cpu_kernels_hold_no_tensors(path: Path) -> None:
    for name in includes(path):
        if is_torch(name):  # a class of torch compiled for AVX-512 could end up in the baseline
            assert name.startswith("<ATen/cpu/vec/"), f"{path.name} includes {name}"
        elif not name.startswith("<"):
            room, _, file = name.partition("/")
            own = room == "cpu" and family_of(Path(file).stem) == family_of(path.stem)
            assert room == "common" or own, f"{path.name} includes {name}"
    assert not re.search(r"\bTORCH_LIBRARY|\bat::Tensor\b", path.read_text())


@pytest.mark.parametrize("path", [p for p in sources("cuda") if p.suffix in (".cu", ".cuh")])
def test_cuda_kernels_include_no_torch_header(path: Path) -> None:
    assert not [name for name in includes(path) if is_torch(name)]
