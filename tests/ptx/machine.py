"""The interpreter in csrc/, compiled at its first use, and its functions."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from .decode import KINDS, SPECIAL, Program
from .kept import call, hashed, kept

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = (
    "-std=c++20",
    "-O2",
    "-march=native",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
)


class _Instruction(ctypes.Structure):
    """PtxInstruction of csrc/interface.cpp."""

    _fields_ = (
        ("operation", ctypes.c_char_p),
        *((name, ctypes.c_int) for name in ("control", "convergent", "guard")),
        *((name, ctypes.c_int) for name in ("negated", "members", "first_operand", "operands")),
        ("wide", ctypes.c_uint32),
        ("immediate", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("bytes", "count", "space", "flags")),
    )


class Options(ctypes.Structure):
    """Options of csrc/grid.h."""

    _fields_ = (
        ("grid", ctypes.c_int * 3),
        ("block", ctypes.c_int * 3),
        *((name, ctypes.c_int) for name in ("cluster", "shared_bytes", "dynamic_shared_bytes")),
        *((name, ctypes.c_int) for name in ("local_bytes", "cooperative")),
        ("seed", ctypes.c_uint64),
        ("most_instructions", ctypes.c_uint64),
    )


class Report(ctypes.Structure):
    """Report of csrc/grid.h."""

    _fields_ = (
        ("fault", ctypes.c_uint8),
        *((name, ctypes.c_int) for name in ("instruction", "other", "warp", "other_warp")),
        *((name, ctypes.c_int) for name in ("lane", "label")),
        *((name, ctypes.c_int64) for name in ("offset", "count")),
    )


@cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(_compiled()))
    for name in ("ptx_program", "ptx_launch", "ptx_demangled", "ptx_reports"):
        getattr(loaded, name).restype = ctypes.c_void_p
    loaded.ptx_run.restype = ctypes.c_char_p
    loaded.ptx_has.restype = ctypes.c_bool
    loaded.ptx_instructions.restype = ctypes.c_uint64
    loaded.ptx_reports.restype = ctypes.POINTER(Report)
    return loaded


@cache
def has(operation: str) -> bool:
    return bool(library().ptx_has(operation.encode()))


def demangled(name: str) -> str:
    """A C++ name as the source has it; another name as it is."""
    text = library().ptx_demangled(name.encode())
    if not text:
        return name
    found = ctypes.string_at(text).decode()
    library().ptx_free_text(ctypes.c_void_p(text))
    return found


class MachineProgram:
    """A decoded kernel in the interpreter's memory."""

    def __init__(self, program: Program) -> None:
        rows = (_Instruction * len(program.instructions))()
        operands: list[int] = []
        for row, i in zip(rows, program.instructions, strict=True):
            row.operation = None if i.operation is None else i.operation.encode()
            row.control, row.convergent, row.guard = i.control, i.convergent, i.guard
            row.negated, row.members = i.negated, i.members
            row.first_operand, row.operands = len(operands), len(i.operands)
            row.wide, row.immediate = i.wide, i.immediate
            row.bytes, row.count, row.space, row.flags = i.bytes, i.count, i.space, i.flags
            operands += i.operands
        counts = [len(program.registers[kind]) for kind in KINDS]
        self.handle = ctypes.c_void_p(
            library().ptx_program(rows, len(rows), _ints(operands), len(operands), _ints(counts))
        )
        for (kind, value), number in program.constants.items():
            library().ptx_constant(self.handle, KINDS.index(kind), number, ctypes.c_uint64(value))
        for number, what in program.special.items():
            assert what < len(SPECIAL)
            library().ptx_special(self.handle, number, what)

    def __del__(self) -> None:
        library().ptx_free_program(self.handle)


def run(
    program: MachineProgram,
    options: Options,
    parameters: bytes,
    regions: Sequence[tuple[int, int, int, bool]],
) -> tuple[list[Report], str | None, int]:
    """What was found, why the launch did not end (if so), and how many instructions warps executed.

    regions: (address, bytes, label, whether the host has written it).
    """
    lib = library()
    launch = ctypes.c_void_p(
        lib.ptx_launch(program.handle, ctypes.byref(options), parameters, len(parameters))
    )
    try:
        for base, size, label, written in regions:
            lib.ptx_region(launch, ctypes.c_uint64(base), ctypes.c_uint64(size), label, written)
        why = lib.ptx_run(launch)
        found = lib.ptx_reports(launch)
        reports = [Report.from_buffer_copy(found[k]) for k in range(lib.ptx_report_count(launch))]
        return reports, why.decode() if why else None, lib.ptx_instructions(launch)
    finally:
        lib.ptx_free_launch(launch)


def _ints(values: Sequence[int]) -> ctypes.Array[ctypes.c_int]:
    return (ctypes.c_int * max(1, len(values)))(*values)


def _compiled() -> Path:
    compiler = os.environ.get("CXX", "c++").split()
    key = hashed((*compiler, *_FLAGS, platform.node()), [_SOURCES])

    def make(library: Path) -> None:
        with TemporaryDirectory() as folder:
            objects = {
                str(file): f"{folder}/{file.stem}.o" for file in sorted(_SOURCES.glob("*.cpp"))
            }
            commands = [[*compiler, *_FLAGS, "-c", *(a, "-o", b)] for a, b in objects.items()]
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(call, commands))
            call([*compiler, "-shared", *objects.values(), "-o", str(library)])

    return kept(f"machine_{key}.so", make)
