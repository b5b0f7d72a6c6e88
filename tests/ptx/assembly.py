"""PTX text to kernels: what is declared, and the statements with their lines. No meaning yet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak)\s+)*\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?"
    r"(?:\.v\d\s+)?\.[a-z]+(\d+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*(?:=\s*\{?([^}]*)\}?)?$",
    re.DOTALL,
)
_STATEMENT = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_INLINED = re.compile(r"inlined_at\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')


@dataclass(frozen=True)
class Place:
    """Where a statement comes from: its line in the PTX, (file, line) pairs from the inside out."""

    line: int
    source: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Statement:
    """`@guard opcode operands;`; braces and brackets keep an operand together."""

    guard: str | None
    negated: bool
    opcode: str
    operands: tuple[str, ...]
    place: Place
    text: str


@dataclass(frozen=True)
class Parameter:
    """Of a kernel: where its bytes are among those of all."""

    name: str
    type: str
    offset: int
    size: int  # in bytes


@dataclass(frozen=True)
class Variable:
    """Memory that the PTX declares; `extern` shared memory has no size of its own."""

    space: str
    alignment: int
    size: int  # in bytes
    initial: bytes


@dataclass
class Kernel:
    """One entry point."""

    name: str
    parameters: list[Parameter]
    threads: int | None  # that it must be launched with, where it says so
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # to the statement that comes next
    registers: dict[str, str] = field(default_factory=dict)  # name, or stem of many, to type
    variables: dict[str, Variable] = field(default_factory=dict)

    def type_of(self, register: str) -> str | None:
        found = self.registers.get(register)
        return found or self.registers.get(register.rstrip("0123456789") + "#")


@dataclass
class Module:
    """A PTX file."""

    target: str
    kernels: dict[str, Kernel]
    variables: dict[str, Variable]
    files: dict[int, str]


def parse(text: str) -> Module:
    """The kernels of a PTX file. Functions that are not entry points are not supported."""
    files = {int(m[1]): "/".join(filter(None, m.groups()[1:])) for m in _FILE.finditer(text)}
    target = re.search(r"\.target\s+(\w+)", text)
    module = Module(target[1] if target else "", {}, {}, files)
    code = _without_comments(text)
    outside, rest = "", 0
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\(", code):
        kernel, body = _header(code, entry)
        outside += code[rest : entry.start()]
        rest = _closing_brace(code, body) + 1
        _parse_body(kernel, code[body + 1 : rest - 1], code.count("\n", 0, body) + 1)
        module.kernels[kernel.name] = kernel
    for declaration in (outside + code[rest:]).split(";"):
        _declare(declaration.strip(), module.variables)
    return module


def split_operands(text: str) -> tuple[str, ...]:
    """At commas outside braces and brackets."""
    parts, depth, start = [], 0, 0
    for k, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[start:k].strip())
            start = k + 1
    parts.append(text[start:].strip())
    return tuple(part for part in parts if part)


def _without_comments(text: str) -> str:
    """Lines stay where they are."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def _closing_brace(code: str, opening: int) -> int:
    depth = 0
    for brace in re.finditer(r"[{}]", code[opening:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return opening + brace.start()
    raise ValueError("PTX ends inside a kernel")


def _header(code: str, entry: re.Match[str]) -> tuple[Kernel, int]:
    """The kernel without its statements, and where its body opens."""
    close = code.index(")", entry.end())
    parameters, offset = [], 0
    for text in filter(None, (p.strip() for p in code[entry.end() : close].split(","))):
        array = re.search(r"\[(\d+)\]$", text)
        size = _SIZES[re.search(r"\.[busf](8|16|32|64)\b", text)[1]]  # type: ignore[index]
        kind = re.search(r"\.([busf]\d+)\b", text)[1]  # type: ignore[index]
        alignment = re.match(r"\.param\s+\.align\s+(\d+)", text)
        at = int(alignment[1]) if alignment else size
        offset = -(-offset // at) * at
        total = size * int(array[1]) if array else size
        name = re.search(r"([\w$]+)(?:\[\d+\])?$", text)[1]  # type: ignore[index]
        parameters.append(Parameter(name, kind, offset, total))
        offset += total
    body = code.index("{", close)
    threads = re.search(r"\.reqntid\s+([\d, ]+)", code[close:body])
    count = None
    if threads:
        count = 1
        for size_text in threads[1].split(","):
            count *= int(size_text)
    return Kernel(entry[1], parameters, count), body


def _pieces(body: str, line: int) -> Iterator[tuple[str, int]]:
    """Statements, labels (with their colon) and directives, each with its line."""
    piece, first, depth = "", line, 0
    for row, text in enumerate(body.split("\n"), line):
        if not piece.strip() and re.match(r"\s*\.(loc|file|section)\b", text):
            yield text.strip(), row
            continue
        for letter in text + " ":
            if not piece.strip():
                piece, first = "", row
                if letter in "{}" or letter.isspace():  # a scope: its names are taken as unique
                    continue
            depth += (letter == "{") - (letter == "}")
            if letter == ";" and depth == 0:
                yield piece.strip(), first
                piece = ""
            elif letter == ":" and re.fullmatch(r"\s*[\w$]+", piece):
                yield piece.strip() + ":", first
                piece = ""
            else:
                piece += letter


def _parse_body(kernel: Kernel, body: str, line: int) -> None:
    source: tuple[tuple[int, int], ...] = ()
    for text, row in _pieces(body, line):
        if text.endswith(":"):
            kernel.labels[text[:-1]] = len(kernel.statements)
        elif text.startswith(".loc"):
            found = [*_LOCATION.findall(text), *_INLINED.findall(text)]
            source = tuple((int(file), int(at)) for file, at in found)
        elif text.startswith(".reg"):
            _declare_registers(text, kernel.registers)
        elif text.startswith("."):
            _declare(text, kernel.variables)
        else:
            match = _STATEMENT.fullmatch(text)
            if match is None:
                raise ValueError(f"PTX line {row}: {text}")
            negated, guard, opcode, operands = match.groups()
            kernel.statements.append(
                Statement(
                    guard,
                    negated == "!",
                    opcode,
                    split_operands(operands),
                    Place(row, source),
                    " ".join(text.split()),
                )
            )


def _declare_registers(text: str, registers: dict[str, str]) -> None:
    """`.reg .b32 %r<9>, name;`: a family of numbered ones is stored as its stem with a #."""
    match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL)
    assert match, text
    for name in match[2].split(","):
        registers[re.sub(r"<\d+>$", "#", name.strip())] = match[1]


def _declare(text: str, variables: dict[str, Variable]) -> None:
    match = _VARIABLE.search(text)
    if match is None:
        return
    space, alignment, bits, name, count, values = match.groups()
    size = int(bits) // 8
    total = size if count is None else size * int(count or 0)
    initial = b""
    if values:
        numbers = (int(value, 0) for value in values.split(","))
        initial = b"".join((n % (1 << 8 * size)).to_bytes(size, "little") for n in numbers)
    variables[name] = Variable(space, int(alignment or size), total, initial.ljust(total, b"\0"))
