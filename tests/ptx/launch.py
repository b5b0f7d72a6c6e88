"""Launching a kernel of a PTX file on the CPU, and what was wrong with it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from . import assembly, machine
from .assembly import Parameter
from .decode import Program, decode

# Faults, as csrc/shadow.h numbers them: {what} is the memory.
_SENTENCES = (
    "race: reads {what} that another warp or lane has written, with nothing between to order them",
    "race: writes {what} that another warp or lane has written, with nothing between to order them",
    "race: writes {what} that another warp or lane has read, with nothing between to order them",
    "race: lanes write different values to {what}",
    "is out of bounds: {what}",
    "is misaligned: {what}",
    "reads {what}, which nobody has written",
    "{what} is never written",
    "uses shared memory of a block of its cluster that may not have started ({what})",
    "uses shared memory of a block of its cluster that may have exited by then",
    "shuffles a value from a lane that does not take part",
    "reads {what}, where a copy that nothing has waited for may still write",
)
_WRITE_AFTER_READ, _LANES_DISAGREE, _MISALIGNED, _SHUFFLED = 2, 3, 5, 10
_SHARED, _GRID_WORKSPACE = -1, -2


@dataclass(frozen=True)
class Output:
    """A tensor argument whose memory counts as unwritten when the kernel starts.

    Reading it before it is written, and never writing an element, are faults.
    """

    tensor: Tensor


class Struct:
    """An argument passed by value: `Struct("2P3i", z, None, T, B, H)`, formats as in `struct`.

    P: a tensor, an Output or None. Padding is that of C.
    """

    def __init__(self, layout: str, *values: Any) -> None:
        self.layout, self.values = layout, values


class Faults(AssertionError):
    """All that a launch did wrong, a line each."""

    def __init__(self, kernel: str, lines: Sequence[str]) -> None:
        self.kernel, self.lines = kernel, lines
        super().__init__(f"{kernel}:\n  " + "\n  ".join(lines))


class Kernel:
    """An entry point of a PTX file, decoded."""

    def __init__(self, module: assembly.Module, kernel: assembly.Kernel) -> None:
        self.name = machine.demangled(kernel.name)
        self.parsed = kernel
        self.module = module

    @cached_property
    def _globals(self) -> dict[str, ctypes.Array[ctypes.c_char]]:
        variables = {**self.module.variables, **self.parsed.body.variables}
        return {
            name: ctypes.create_string_buffer(variable.initial, variable.size)
            for name, variable in variables.items()
            if variable.space in ("global", "const")
        }

    @cached_property
    def program(self) -> Program:
        addresses = {name: ctypes.addressof(data) for name, data in self._globals.items()}
        return decode(self.module, self.parsed, addresses, machine.has)

    @cached_property
    def loaded(self) -> machine.MachineProgram:
        return machine.MachineProgram(self.program)

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        *,
        cluster: int = 1,
        shared_bytes: int = 0,
        cooperative: bool = False,
        replicas: bool = False,
        seed: int = 0,
        most_instructions: int = 1 << 28,
    ) -> int:
        """Run it; raises Faults. Returns the number of instructions that warps executed.

        arguments: a tensor, an Output or None for a pointer, a number, a Struct, or bytes.
        cluster: blocks in one, along x. shared_bytes: dynamic shared memory. cooperative: all
        blocks run together and may wait for each other. replicas: several lanes of a warp may hold
        one value, as Triton has it: any of them may write it, though the last bits differ, after
        all have read what was there. seed: of the order of blocks and warps.
        """
        packed = _Arguments(self.parsed.parameters, arguments)
        static = self.program.static_shared_bytes
        options = machine.Options(
            (ctypes.c_int * 3)(*(*grid, 1, 1)[:3]),
            (ctypes.c_int * 3)(*(*block, 1, 1)[:3]),
            cluster,
            static + shared_bytes,
            shared_bytes,
            self.program.local_bytes,
            cooperative,
            seed,
            most_instructions,
        )
        regions = packed.regions()
        names = [*packed.names]
        for name, data in self._globals.items():
            regions.append((ctypes.addressof(data), len(data), len(names), True))
            names.append(name)
        found, why, count = machine.run(self.loaded, options, packed.bytes, regions)
        kept = [report for report in found if not (replicas and _of_replicas(report))]
        lines = [self._line(report, names) for report in kept]
        if why is not None:
            lines.append(self._with_places(why))
        if lines:
            raise Faults(self.name, lines)
        return count

    # ---- reports --------------------------------------------------------------------------------

    def _line(self, report: machine.Report, names: Sequence[str]) -> str:
        what = {_SHARED: "shared memory", _GRID_WORKSPACE: "the grid's barrier"}.get(report.label)
        what = f"{what or names[report.label]} at byte {report.offset}"
        if report.fault == _SHUFFLED:
            what = ""
        if report.fault == _MISALIGNED:
            what = f"address {report.offset:#x}"
        sentence = _SENTENCES[report.fault].format(what=what)
        if report.instruction < 0:
            return sentence
        text = f"{self._place(report.instruction)}: warp {report.warp} {sentence}"
        if report.other >= 0:
            text += f"; the other: warp {report.other_warp}, {self._place(report.other)}"
        return text + (f" ({report.count} times)" if report.count > 1 else "")

    def _place(self, instruction: int) -> str:
        """`inner.py:3, outer.py:7, PTX line 20 `the statement``."""
        statement = self.parsed.body.statements[self.program.instructions[instruction].statement]
        files = self.module.files
        source = "".join(
            f"{files.get(file, '?').rsplit('/', 1)[-1]}:{line}, "
            for file, line in statement.place.source
        )
        return f"{source}PTX line {statement.place.line} `{statement.text}`"

    def _with_places(self, why: str) -> str:
        """The interpreter's words, with its instructions' numbers replaced by their places."""
        head, *rest = why.split("at instruction ")
        for piece in rest:
            number = piece.split(";")[0].split()[0]
            head += f"at {self._place(max(0, int(number)))}{piece[len(number) :]}"
        return head


def _of_replicas(report: machine.Report) -> bool:
    within_warp = report.warp == report.other_warp
    return report.fault == _LANES_DISAGREE or (report.fault == _WRITE_AFTER_READ and within_warp)


class Module:
    """A PTX file."""

    def __init__(self, text: str) -> None:
        self.parsed = assembly.parse(text)
        self._kernels: dict[str, Kernel] = {}

    def __getitem__(self, name: str) -> Kernel:
        """The kernel of this name, or the only one whose C++ name contains it."""
        for mangled, parsed in self.parsed.kernels.items():
            if mangled not in self._kernels:
                self._kernels[mangled] = Kernel(self.parsed, parsed)
        if name in self._kernels:
            return self._kernels[name]
        found = [kernel for kernel in self._kernels.values() if name in kernel.name]
        if len(found) != 1:
            names = [kernel.name for kernel in self._kernels.values()]
            raise KeyError(f"expected one kernel with {name!r}, got {len(found)} of {names}")
        return found[0]


class _Arguments:
    """Arguments as the bytes that a kernel reads, and the memory that they give it."""

    def __init__(self, parameters: Sequence[Parameter], arguments: Sequence[Any]) -> None:
        if len(parameters) != len(arguments):
            raise ValueError(f"expected {len(parameters)} arguments, got {len(arguments)}")
        self._memory: list[tuple[str, Tensor, bool]] = []
        self.bytes = b""
        for k, (parameter, argument) in enumerate(zip(parameters, arguments, strict=True)):
            packed = self._packed(parameter, argument, f"argument {k}")
            if len(packed) != parameter.size:
                raise ValueError(
                    f"expected {parameter.size} bytes for argument {k}, got {len(packed)}"
                )
            self.bytes = self.bytes.ljust(parameter.offset, b"\0") + packed

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self._memory]

    def regions(self) -> list[tuple[int, int, int, bool]]:
        """Tensors that overlap are one region, named by the first."""
        spans = []
        for k, (_, tensor, written) in enumerate(self._memory):
            if tensor.numel() > 0:
                extent = sum(
                    (n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
                )
                begin = tensor.data_ptr()
                spans.append((begin, begin + (extent + 1) * tensor.element_size(), k, written))
        merged: list[tuple[int, int, int, bool]] = []
        for begin, end, k, written in sorted(spans):
            if merged and begin < merged[-1][1]:
                first, last, label, was_written = merged.pop()
                merged.append((first, max(last, end), label, written or was_written))
            else:
                merged.append((begin, end, k, written))
        return [(begin, end - begin, k, written) for begin, end, k, written in merged]

    def _pointer(self, argument: Any, name: str) -> int:
        if argument is None:
            return 0
        tensor = argument.tensor if isinstance(argument, Output) else argument
        self._memory.append((name, tensor, not isinstance(argument, Output)))
        return int(tensor.data_ptr())

    def _packed(self, parameter: Parameter, argument: Any, name: str) -> bytes:
        if isinstance(argument, (bytes, bytearray)):
            return bytes(argument)
        if isinstance(argument, Struct):
            values = [
                self._pointer(value, f"{name}, field {k}")
                if value is None or isinstance(value, (Tensor, Output))
                else value
                for k, value in enumerate(argument.values)
            ]
            return struct.pack(argument.layout, *values).ljust(parameter.size, b"\0")
        if argument is None or isinstance(argument, (Tensor, Output)):
            return struct.pack("<Q", self._pointer(argument, name))
        if isinstance(argument, float):
            return struct.pack("<f" if parameter.size == 4 else "<d", argument)
        bits = 8 * parameter.size
        return (int(argument) % (1 << bits)).to_bytes(parameter.size, "little")
