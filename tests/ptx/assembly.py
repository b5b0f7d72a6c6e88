"""PTX text to kernels: what is declared, and the statements with their lines. No meaning yet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[busf](\d+)\s+(?:\.ptr\s+.*\s)?([\w$]+)(?:\[(\d+)\])?"
)
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
class Body:
    """What is between a kernel's braces."""

    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # to the statement that comes next
    registers: dict[str, str] = field(default_factory=dict)  # name, or stem of many, to type
    variables: dict[str, Variable] = field(default_factory=dict)

    def type_of(self, register: str) -> str | None:
        found = self.registers.get(register)
        return found or self.registers.get(register.rstrip("0123456789") + "#")


@dataclass
class Kernel:
    """One entry point; its body is parsed when it is first asked for."""

    name: str
    parameters: list[Parameter]
    text: str  # of the body, which begins in this line of the file
    line: int

    @cached_property
    def body(self) -> Body:
        return _parse_body(self.text, self.line)


@dataclass
class Module:
    """A PTX file."""

    kernels: dict[str, Kernel]
    variables: dict[str, Variable]
    files: dict[int, str]


def parse(text: str) -> Module:
    """The kernels of a PTX file. Functions that are not entry points are not supported."""
    files = {int(m[1]): "/".join(filter(None, m.groups()[1:])) for m in _FILE.finditer(text)}
    module = Module({}, {}, files)
    code = _without_comments(text)
    outside, rest = "", 0
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\(", code):
        close = code.index(")", entry.end())
        opening = code.index("{", close)
        outside += code[rest : entry.start()]
        rest = _closing_brace(code, opening) + 1
        module.kernels[entry[1]] = Kernel(
            entry[1],
            _parameters(code[entry.end() : close]),
            code[opening + 1 : rest - 1],
            code.count("\n", 0, opening) + 1,
        )
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
    for brace in re.compile("[{}]").finditer(code, opening):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise ValueError("PTX ends inside a kernel")


def _parameters(text: str) -> list[Parameter]:
    """`.param [.align n] .type [.ptr ...] name[bytes], ...`, laid out as in C."""
    found, offset = [], 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        match = _PARAMETER.fullmatch(declaration)
        if match is None:
            raise ValueError(f"PTX parameter {declaration}")
        alignment, bits, name, count = match.groups()
        element = int(bits) // 8
        at = int(alignment or element)
        offset = -(-offset // at) * at
        found.append(Parameter(name, offset, element * int(count or 1)))
        offset += found[-1].size
    return found


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


def _parse_body(text_of_body: str, line: int) -> Body:
    body = Body()
    source: tuple[tuple[int, int], ...] = ()
    for text, row in _pieces(text_of_body, line):
        if text.endswith(":"):
            body.labels[text[:-1]] = len(body.statements)
        elif text.startswith(".loc"):
            found = [*_LOCATION.findall(text), *_INLINED.findall(text)]
            source = tuple((int(file), int(at)) for file, at in found)
        elif text.startswith(".reg"):
            _declare_registers(text, body.registers)
        elif text.startswith("."):
            _declare(text, body.variables)
        else:
            match = _STATEMENT.fullmatch(text)
            if match is None:
                raise ValueError(f"PTX line {row}: {text}")
            negated, guard, opcode, operands = match.groups()
            body.statements.append(
                Statement(
                    guard,
                    negated == "!",
                    opcode,
                    split_operands(operands),
                    Place(row, source),
                    " ".join(text.split()),
                )
            )
    return body


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
