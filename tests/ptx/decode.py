"""Statements to what the interpreter executes: numbered operations over numbered registers.

An opcode's modifiers that change nothing here (rounding to nearest, caching, alignment promises)
are dropped, so that `add.rn.ftz.f32` becomes `add.f32`. Denormal floats are kept by all.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .assembly import Kernel, Module, Statement, split_operands

KINDS = ("narrow", "wide", "pred")  # of registers: up to 32 bits, 64 bits, one bit
PLAIN, BRANCH, EXIT, BARRIER, CLUSTER_ARRIVE, CLUSTER_WAIT = range(6)
SPACES = ("global", "shared", "local", "generic")
SIGNED, ATOMIC, ACQUIRE, RELEASE = 1, 2, 4, 8
SHARED_WINDOW, LOCAL_WINDOW = 1 << 56, 1 << 57

# As csrc/grid.h and csrc/conversions.cpp number them.
SPECIAL = (
    "tid.x tid.y tid.z ntid.x ntid.y ntid.z ctaid.x ctaid.y ctaid.z nctaid.x nctaid.y nctaid.z "
    "laneid warpid nwarpid cluster_ctarank cluster_nctarank cluster_ctaid.x cluster_nctaid.x "
    "clusterid.x nclusterid.x envreg1 envreg2 dynamic_smem_size total_smem_size lanemask_lt "
    "lanemask_le lanemask_eq lanemask_ge lanemask_gt"
).split()
TYPES = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64")
ROUNDINGS = ("", "rni", "rzi", "rmi", "rpi")

# Of clusters and grids that are lines.
_CONSTANT_SPECIAL = {
    "%cluster_ctaid.y": 0, "%cluster_ctaid.z": 0, "%cluster_nctaid.y": 1, "%cluster_nctaid.z": 1,
    "%is_explicit_cluster": 1,
}  # fmt: skip

_IGNORED = {"rn", "ftz", "approx", "full", "uni", "sync", "aligned", "noftz"}
_NOTHING = ("griddepcontrol", "prefetch", "discard", "createpolicy", "nanosleep", "applypriority",
            "setmaxnreg")  # fmt: skip


class Unsupported(Exception):
    """An instruction that the interpreter does not know."""


@dataclass
class Instruction:
    """One operation; the fields are those of csrc/warp.h."""

    operation: str | None
    operands: list[int]
    statement: int
    control: int = PLAIN
    convergent: bool = False
    guard: int = -1
    negated: bool = False
    members: int = -1
    wide: int = 0
    immediate: int = 0
    bytes: int = 0
    count: int = 1
    space: int = 0
    flags: int = 0


@dataclass
class Program:
    """A kernel's instructions, its registers and where its memory is."""

    kernel: Kernel
    instructions: list[Instruction] = field(default_factory=list)
    registers: dict[str, dict[str, int]] = field(
        default_factory=lambda: {kind: {} for kind in KINDS}
    )
    constants: dict[tuple[str, int], int] = field(default_factory=dict)  # (kind, value): register
    special: dict[int, int] = field(default_factory=dict)  # register: index in SPECIAL
    symbols: dict[str, int] = field(default_factory=dict)  # addresses
    static_shared_bytes: int = 0
    local_bytes: int = 0


def decode(
    module: Module, kernel: Kernel, addresses: dict[str, int], has: Callable[[str], bool]
) -> Program:
    """`addresses`: where the module's global variables are; `has`: which operations there are."""
    program = Program(kernel)
    _place_variables(program, {**module.variables, **kernel.body.variables}, addresses)
    starts = []
    decoder = _Decoder(program, has)
    for k, statement in enumerate(kernel.body.statements):
        starts.append(len(program.instructions))
        decoder.one(k, statement)
    starts.append(len(program.instructions))
    program.instructions.append(Instruction(None, [], len(kernel.body.statements) - 1, EXIT))
    for instruction, label in decoder.jumps:
        instruction.immediate = starts[kernel.body.labels[label]]
    return program


def _place_variables(program: Program, variables: dict, addresses: dict[str, int]) -> None:
    """Shared variables one after another, the dynamic one last; local ones likewise."""
    ends = {"shared": 0, "local": 0}
    for name, variable in sorted(variables.items(), key=lambda item: item[1].size == 0):
        if variable.space in ends:
            at = -(-ends[variable.space] // variable.alignment) * variable.alignment
            program.symbols[name] = at
            ends[variable.space] = at + variable.size
        else:
            program.symbols[name] = addresses[name]
    program.static_shared_bytes = ends["shared"]
    program.local_bytes = ends["local"]
    for name, variable in variables.items():
        if variable.space == "shared" and variable.size == 0:
            program.static_shared_bytes = program.symbols[name]


def _kind(type_name: str) -> str:
    """Which registers hold a type."""
    return "pred" if type_name == "pred" else "wide" if type_name.endswith("64") else "narrow"


class _Decoder:
    def __init__(self, program: Program, has: Callable[[str], bool]) -> None:
        self.program = program
        self.has = has
        self.jumps: list[tuple[Instruction, str]] = []

    # ---- operands -------------------------------------------------------------------------------

    def register(self, kind: str, name: str) -> int:
        numbers = self.program.registers[kind]
        return numbers.setdefault(name, len(numbers))

    def constant(self, kind: str, value: int) -> int:
        if kind == "pred":
            value = -1 if value else 0  # of all lanes
        value &= (1 << 64) - 1 if kind == "wide" else (1 << 32) - 1
        number = self.register(kind, f"constant {value}")
        self.program.constants[kind, value] = number
        return number

    def operand(self, text: str, kind: str) -> int:
        """The register of an operand of this kind, be it a register's name or a constant."""
        found, number = self.any(text, kind)
        if found != kind:
            raise Unsupported(f"{text}: expected a {kind} register, got a {found} one")
        return number

    def any(self, text: str, kind: str = "wide") -> tuple[str, int]:
        """An operand of whatever kind it is, and its register; a constant gets the given kind."""
        if text == "_":
            return kind, self.register(kind, "nowhere")
        declared = self.program.kernel.body.type_of(text)
        if declared is not None:
            return _kind(declared), self.register(_kind(declared), text)
        if text in _CONSTANT_SPECIAL:
            return "narrow", self.constant("narrow", _CONSTANT_SPECIAL[text])
        if text.startswith("%") and text[1:] in SPECIAL:
            number = self.register("narrow", text)
            self.program.special[number] = SPECIAL.index(text[1:])
            return "narrow", number
        return kind, self.constant(kind, self.value(text, kind))

    def value(self, text: str, kind: str) -> int:
        if text in self.program.symbols:
            return self.program.symbols[text]
        for parameter in self.program.kernel.parameters:
            if parameter.name == text:
                return parameter.offset
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return int(text.rstrip("U"), 0)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            if kind == "narrow":
                return int(text[2:], 16)
            (single,) = struct.unpack(">f", bytes.fromhex(text[2:]))
            return int.from_bytes(struct.pack(">d", single), "big")
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return int(text[2:], 16)
        raise Unsupported(f"operand {text}")

    def address(self, text: str) -> tuple[str, int, int]:
        """`[base + offset]`: kind and register of the base, and the offset."""
        match = re.fullmatch(r"\[\s*([^+\s]+?)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if match is None:
            raise Unsupported(f"address {text}")
        kind, number = self.any(match[1])
        return kind, number, int(match[2] or "0", 0)

    @staticmethod
    def parts(text: str) -> Sequence[str]:
        return split_operands(text.strip("{} ")) if text.startswith("{") else (text,)

    # ---- instructions ---------------------------------------------------------------------------

    def emit(
        self, operation: str | None, operands: Sequence[int] = (), **fields: int
    ) -> Instruction:
        if operation is not None and not self.has(operation):
            raise Unsupported(operation)
        made = Instruction(operation, list(operands), self.number, **fields)  # type: ignore[arg-type]
        made.guard, made.negated = self.guard, self.negated
        self.program.instructions.append(made)
        return made

    def one(self, number: int, statement: Statement) -> None:
        self.number = number
        self.guard = -1 if statement.guard is None else self.operand(statement.guard, "pred")
        self.negated = statement.negated
        base, *modifiers = statement.opcode.replace("::", ":").split(".")
        method = getattr(self, f"do_{base}", self.do_typed)
        try:
            if not statement.opcode.startswith(_NOTHING):
                method(modifiers, statement.operands, base)
        except Unsupported as error:
            line = statement.place.line
            raise Unsupported(f"PTX line {line}: {statement.text}: {error}") from None

    def do_typed(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        """Most instructions: all operands have the type that the opcode ends with."""
        kept = [m for m in modifiers if m not in _IGNORED]
        saturated = "sat" in kept and kept[-1] == "f32"
        if saturated:
            kept.remove("sat")
        kind = _kind(kept[-1])
        kinds = [kind] * len(operands)
        if base in ("shl", "shr"):
            kinds[-1] = "narrow"
        elif base == "selp":
            kinds[-1] = "pred"
        elif base in ("bfe", "bfi"):
            kinds[-2:] = ["narrow"] * 2
        elif base in ("popc", "clz", "vote"):
            kinds[0] = "pred" if kind == "pred" else "narrow"
        elif "wide" in kept:
            wide = "wide" if kept[-1].endswith("32") else "narrow"
            kinds = [wide, kind, kind, wide][: len(operands)]
        if base in ("rcp", "rsqrt") and kept[-1] == "f64" and "approx" in modifiers:
            kept.insert(0, "approx")
        numbers = [self.operand(text, k) for text, k in zip(operands, kinds, strict=True)]
        self.emit(".".join([base, *kept]), numbers)
        if saturated:
            self.emit("saturate.f32", [numbers[0], numbers[0]])

    def do_mov(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        to, source = (self.parts(text) for text in operands)
        if len(to) == len(source) == 1:
            kind = _kind(modifiers[-1])
            found, number = self.any(source[0], kind)
            if found == "narrow" and kind == "wide":  # a special register read as 64 bits
                number = self.widened(number)
            self.emit(f"mov.{modifiers[-1]}", [self.operand(to[0], kind), number])
            return
        total = int(modifiers[-1].lstrip("bufs"))
        size = total // 8 // max(len(to), len(source))
        part = "wide" if size == 8 else "narrow"
        whole = "wide" if total == 64 else "narrow"
        kinds = [whole] + [part] * len(source) if len(to) == 1 else [part] * len(to) + [whole]
        numbers = [self.operand(text, k) for text, k in zip((*to, *source), kinds, strict=True)]
        self.emit("pack" if len(to) == 1 else "unpack", numbers, bytes=size, wide=_wide(kinds))

    def widened(self, number: int) -> int:
        wide = self.register("wide", f"widened {number}")
        self.emit("cvt.u64.u32", [wide, number])
        return wide

    def upper_half(self, number: int) -> int:
        upper = self.register("narrow", f"upper half of {number}")
        self.emit("shr.u32", [upper, number, self.constant("narrow", 16)])
        return upper

    def do_setp(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        """`setp.cmp[.and].type p[|q], a, b[, c]`: p = cmp and c, q = not cmp and c.

        Of a pair of 16-bit floats, p is of the lower halves and q of the upper ones.
        """
        kept = [m for m in modifiers if m not in _IGNORED]
        combine = next((m for m in kept if m in ("and", "or", "xor")), None)
        compare = ".".join(["setp", *(m for m in kept if m != combine)])
        kind = _kind(kept[-1])
        results = [self.operand(text.strip(), "pred") for text in operands[0].split("|")]
        a, b = (self.operand(text, kind) for text in operands[1:3])
        compared = self.register("pred", "compared") if len(operands) > 3 else results[0]
        single = compare.removesuffix("x2")  # reads the lower half
        self.emit(single, [compared, a, b])
        if single != compare:
            self.emit(single, [results[1], self.upper_half(a), self.upper_half(b)])
        elif len(results) > 1:
            self.emit("not.pred", [results[1], compared])
        if combine is not None:
            text = operands[3]
            other = self.operand(text.removeprefix("!"), "pred")
            if text.startswith("!"):
                negated = self.register("pred", "negated")
                self.emit("not.pred", [negated, other])
                other = negated
            self.emit(f"{combine}.pred", [results[0], compared, other])
            if len(results) > 1:
                self.emit(f"{combine}.pred", [results[1], results[1], other])

    def do_cvt(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        *how, to, source = (m for m in modifiers if m not in _IGNORED)
        saturated = "sat" in how and to == "f32"
        rounding = next((m for m in how if m in ROUNDINGS), "")
        known = {*ROUNDINGS, *(["sat"] if saturated else []), *(["rna"] if to == "tf32" else [])}
        if not known.issuperset(how):
            raise Unsupported(f"cvt with {', '.join(how)}")
        if len(operands) == 3 or to == "tf32":
            self.emit(f"cvt.{to}.{source}", [self.operand(text, "narrow") for text in operands])
            return
        (d_kind, d), (a_kind, a) = (
            self.any(text, _kind(kind)) for text, kind in zip(operands, (to, source), strict=True)
        )
        fast = f"cvt.{to}.{source}"
        if not rounding and (d_kind, a_kind) == (_kind(to), _kind(source)) and self.has(fast):
            self.emit(fast, [d, a])
        else:
            code = TYPES.index(to) | TYPES.index(source) << 4 | ROUNDINGS.index(rounding) << 8
            self.emit("cvt", [d, a], wide=_wide([d_kind, a_kind]), immediate=code)
        if saturated:
            self.emit("saturate.f32", [d, d])

    def do_cvta(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        """Between generic addresses and those of a space: shared and local ones have a window."""
        window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
        space = next((m for m in modifiers if m in ("global", "shared", "local", "const")), "")
        sign = "sub" if "to" in modifiers else "add"
        kind = _kind(modifiers[-1])
        numbers = [self.operand(text, kind) for text in operands]
        offset = self.constant(kind, window.get(space, 0) if kind == "wide" else 0)
        self.emit(f"{sign}.{'u64' if kind == 'wide' else 'u32'}", [*numbers, offset])

    # ---- memory ---------------------------------------------------------------------------------

    def memory(self, modifiers: list[str]) -> dict[str, int]:
        """What loads, stores and atomics share: space, type, order."""
        plain = [m.split(":")[0] for m in modifiers]
        space = next((m for m in plain if m in (*SPACES, "const")), "generic")
        type_name = modifiers[-1]
        vector = next((m for m in plain if re.fullmatch(r"v\d", m)), "v1")
        orders = {"relaxed": ATOMIC, "volatile": ATOMIC, "acquire": ATOMIC | ACQUIRE,
                  "release": ATOMIC | RELEASE, "acq_rel": ATOMIC | ACQUIRE | RELEASE,
                  "mmio": ATOMIC}  # fmt: skip
        flags = SIGNED if type_name.startswith("s") else 0
        for order in plain:
            flags |= orders.get(order, 0)
        return {
            "bytes": int(re.sub(r"\D", "", type_name)) // 8,
            "count": int(vector[1:]),
            "space": SPACES.index("global" if space == "const" else space),
            "flags": flags,
        }

    def do_ld(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        type_kind = _kind(modifiers[-1])
        found = [self.any(text, type_kind) for text in self.parts(operands[0])]
        fields = self.memory(modifiers)
        kind, number, fields["immediate"] = self.address(operands[1])
        found.append((kind, number))
        if modifiers[0].startswith("param"):
            fields["space"] = 0
        operation = "ld.param" if modifiers[0].startswith("param") else "ld"
        kinds, numbers = zip(*found, strict=True)
        self.emit(operation, numbers, wide=_wide(kinds), **fields)

    do_ldu = do_ld

    def do_st(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        if modifiers[0] == "async":
            self.store_async(modifiers, operands)
            return
        kind, number, offset = self.address(operands[0])
        found = [(kind, number)]
        found += [self.any(text, _kind(modifiers[-1])) for text in self.parts(operands[1])]
        kinds, numbers = zip(*found, strict=True)
        fields = self.memory(modifiers)
        self.emit("st", numbers, wide=_wide(kinds), immediate=offset, **fields)

    def do_atom(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        what = next(m for m in modifiers if m in _ATOMICS)
        type_name = modifiers[-1]
        value_kind = _kind(type_name)
        if base == "red":
            operands = ("_", *operands)
        if what in ("and", "or", "xor", "exch", "cas"):
            type_name = "b" + type_name[1:]
        kind, number, offset = self.address(operands[1])
        found = [self.any(operands[0], value_kind), (kind, number)]
        found += [self.any(text, value_kind) for text in operands[2:]]
        kinds, numbers = zip(*found, strict=True)
        fields = self.memory(modifiers)
        fields["flags"] |= ATOMIC
        operation = f"atom.{what}.{type_name}"
        self.emit(operation, numbers, wide=_wide(kinds), immediate=offset, **fields)

    do_red = do_atom

    def located(self, text: str) -> int:
        """A register with the address `[base + offset]`, of 32 bits."""
        kind, number, offset = self.address(text)
        if kind != "narrow":
            raise Unsupported("an address of shared memory with 64 bits")
        if offset == 0:
            return number
        moved = self.register("narrow", f"{text} moved")
        self.emit("add.u32", [moved, number, self.constant("narrow", offset)])
        return moved

    def do_mbarrier(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        """init, arrive (perhaps with expected bytes), test_wait and try_wait."""
        what = modifiers[0]
        flags = ATOMIC if "relaxed" in modifiers else ATOMIC | ACQUIRE
        if what == "init":
            count = self.operand(operands[1], "narrow")
            self.emit("mbarrier.init", [self.located(operands[0]), count])
        elif what == "arrive":
            state = "_" if operands[0].startswith("[") else operands[0]
            where, *amount = operands[0 if operands[0].startswith("[") else 1 :]
            given = self.operand(amount[0], "narrow") if amount else self.constant("narrow", 1)
            numbers = [self.operand(state, "wide"), self.located(where)]
            if "expect_tx" in modifiers:
                numbers += [self.constant("narrow", 1), given]
            else:
                numbers += [given, self.constant("narrow", 0)]
            self.emit("mbarrier.arrive", numbers, flags=ATOMIC | RELEASE)
        elif what == "expect_tx":
            zero, given = self.constant("narrow", 0), self.operand(operands[1], "narrow")
            nowhere = self.operand("_", "wide")
            self.emit("mbarrier.arrive", [nowhere, self.located(operands[0]), zero, given])
        elif what in ("test_wait", "try_wait"):
            by_parity = "parity" in modifiers
            phase = self.operand(operands[2], "narrow" if by_parity else "wide")
            numbers = [self.operand(operands[0], "pred"), self.located(operands[1]), phase]
            name = "mbarrier.wait.parity" if by_parity else "mbarrier.wait"
            self.emit(name, numbers, flags=flags, wide=0 if by_parity else 4)
        elif what != "inval":
            raise Unsupported(what)

    def store_async(self, modifiers: list[str], operands: Sequence[str]) -> None:
        """`st.async [to], values, [mbarrier]`."""
        kind = _kind(modifiers[-1])
        values = [self.operand(part, kind) for part in self.parts(operands[1])]
        numbers = [self.located(operands[2]), self.located(operands[0]), *values]
        kinds = ["narrow", "narrow", *[kind] * len(values)]
        fields = {**self.memory(modifiers), "flags": 0}
        self.emit("st.async", numbers, wide=_wide(kinds), **fields)

    def do_cp(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        """`cp.async[.caching] [to], [from], bytes[, bytes read]`, and its groups."""
        what = modifiers[-1] if modifiers[:1] == ["async"] else "another copy"
        if what in ("commit_group", "wait_all"):
            self.emit("cp.async.commit", convergent=1)
        if what in ("wait_group", "wait_all"):
            last = int(operands[0], 0) if operands else 0
            self.emit("cp.async.wait", convergent=1, immediate=last)
        elif what == "commit_group":
            return
        elif "bulk" not in modifiers and "mbarrier" not in modifiers and len(operands) >= 3:
            kind, source, offset = self.address(operands[1])
            size = int(operands[2], 0)
            read = self.operand(operands[3], "narrow") if operands[3:] else None
            read = self.constant("narrow", size) if read is None else read
            numbers = [self.located(operands[0]), source, read]
            wide = int(kind == "wide") << 1
            self.emit("cp.async", numbers, wide=wide, immediate=offset, bytes=size)
        else:
            raise Unsupported(what)

    def do_fence(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        if not modifiers[0].startswith("proxy"):
            self.emit("fence", immediate=int("cta" not in modifiers))

    do_membar = do_fence

    def do_mapa(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        kind = _kind(modifiers[-1])
        kinds = (kind, kind, "narrow")
        numbers = [self.operand(text, k) for text, k in zip(operands, kinds, strict=True)]
        self.emit(f"mapa.{modifiers[-1]}", numbers)

    # ---- control --------------------------------------------------------------------------------

    def do_bra(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        self.jumps.append((self.emit(None, control=BRANCH), operands[0]))

    def do_ret(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        self.emit(None, control=EXIT)

    do_exit = do_ret

    def do_trap(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        self.emit("trap")

    def do_bar(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        """bar, barrier: of a warp, of a block (with a number, for some threads), of a cluster."""
        kept = [m for m in modifiers if m not in ("cta", "aligned")]
        if kept[0] == "warp":
            members = self.operand(operands[0], "narrow")
            self.emit("bar.warp.sync", convergent=1, members=members)
        elif kept[:2] == ["cluster", "arrive"]:
            released = int("relaxed" not in kept)
            self.emit(None, control=CLUSTER_ARRIVE, convergent=1, immediate=released)
        elif kept[:2] == ["cluster", "wait"]:
            self.emit(None, control=CLUSTER_WAIT, convergent=1)
        elif kept in (["sync"], ["arrive"]):
            numbers = [self.operand(text, "narrow") for text in operands]
            waits = int(kept[0] == "sync")
            self.emit(None, numbers, control=BARRIER, convergent=1, immediate=waits)
        else:
            raise Unsupported("a barrier that reduces")

    do_barrier = do_bar

    # ---- between lanes --------------------------------------------------------------------------

    def do_shfl(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        d, *predicate = (text.strip() for text in operands[0].split("|"))
        numbers = [self.operand(text, "narrow") for text in (d, *operands[1:4])]
        numbers += [self.operand(text, "pred") for text in predicate]
        members = self.operand(operands[4], "narrow")
        self.emit(f"shfl.{modifiers[1]}.b32", numbers, convergent=1, members=members)

    def do_vote(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        members = self.operand(operands[2], "narrow")
        kind, source = _kind(modifiers[-1]), operands[1].removeprefix("!")
        given = self.operand(source, "pred")
        if source != operands[1]:
            negated = self.register("pred", "negated")
            self.emit("not.pred", [negated, given])
            given = negated
        operation = f"vote.{modifiers[1]}.{modifiers[-1]}"
        self.emit(
            operation, [self.operand(operands[0], kind), given], convergent=1, members=members
        )

    def do_redux(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        *numbers, members = (self.operand(text, "narrow") for text in operands)
        self.emit(".".join(["redux", *modifiers[1:]]), numbers, convergent=1, members=members)

    def do_elect(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        d, predicate = (text.strip() for text in operands[0].split("|"))
        numbers = [self.operand(d, "narrow"), self.operand(predicate, "pred")]
        self.emit("elect", numbers, convergent=1, members=self.operand(operands[1], "narrow"))

    def do_activemask(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        self.emit("activemask.b32", [self.operand(operands[0], "narrow")])

    def do_mma(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        shape, accumulator, factor = modifiers[2], modifiers[5], modifiers[6]
        if accumulator not in ("f32", "f64"):
            raise Unsupported("sums in 16 bits")
        kind = _kind(accumulator)
        numbers = [self.operand(part, kind) for text in operands for part in self.parts(text)]
        self.emit(f"mma.{shape}.{factor}", numbers, convergent=1)

    def do_wgmma(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        """`mma_async d, a, b, adds, scale of a, of b[, a transposed][, b transposed]`."""
        what = modifiers[0]
        if what == "commit_group":
            self.emit("wgmma.commit", convergent=1)
        elif what == "wait_group":
            self.emit("wgmma.wait", convergent=1, immediate=int(operands[0]))
        elif what == "mma_async":
            d, a = self.parts(operands[0]), self.parts(operands[1])
            if modifiers[-3] != "f32" or operands[4:6] != ("1", "1"):
                raise Unsupported("sums in 16 bits, negated factors")
            *left, right = [int(text) for text in operands[6:]] or [0]
            flags = int(len(a) > 1) | sum(left) << 1 | right << 2
            numbers = [self.operand(text, "narrow") for text in d]
            numbers += [self.operand(text, "narrow" if len(a) > 1 else "wide") for text in a]
            numbers += [self.operand(operands[2], "wide"), self.operand(operands[3], "pred")]
            fields = {"count": len(d), "flags": flags}
            self.emit(f"wgmma.{modifiers[-1]}", numbers, convergent=1, **fields)

    def do_ldmatrix(self, modifiers: list[str], operands: Sequence[str], base: str) -> None:
        """And stmatrix, whose address comes first."""
        where = 1 if base == "ldmatrix" else 0
        kind, number, offset = self.address(operands[where])
        numbers = [self.operand(part, "narrow") for part in self.parts(operands[1 - where])]
        numbers.insert(len(numbers) if where else 0, number)
        count = next(m for m in modifiers if re.fullmatch(r"x\d", m))
        name = ".".join([base, count, *(["trans"] if "trans" in modifiers else [])])
        wide = int(kind == "wide") << (len(numbers) - 1 if where else 0)
        self.emit(name, numbers, convergent=1, immediate=offset, wide=wide)

    do_stmatrix = do_ldmatrix


_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


def _wide(kinds: Sequence[str]) -> int:
    return sum(1 << k for k, kind in enumerate(kinds) if kind == "wide")
