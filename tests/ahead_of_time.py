"""Compiling Triton kernels for GPUs that are not here, and what the result asks of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# What a block may have.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


class Kernel(NamedTuple):
    """How a kernel is launched on a usual shape, for compiling it ahead of time."""

    module: str  # of seqmem_fast._triton
    name: str
    storage: str
    warps: int
    constants: dict[str, Any]
    pointers: dict[str, str] = {}  # noqa: RUF012  (those of another type than the storage)
    aligned: Sequence[str] = ()  # integers that 16 divides where tensors are well shaped
    targets: Sequence[str] = ("sm_90", "gfx942")
    label: str = ""  # in the report, where the storage does not tell launches apart


def compiled(function: Any, target: str, kernel: Kernel) -> Any:
    """For one target: pointers to the storage unless named, 32-bit integers elsewhere."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature, values, attributes = {}, {}, {}
    for k, parameter in enumerate(function.params):
        name = parameter.name
        if name in kernel.constants:
            signature[name], values[(k,)] = "constexpr", kernel.constants[name]
        elif name.endswith("_ptr"):
            signature[name] = kernel.pointers.get(name, f"*{kernel.storage}")
            attributes[(k,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
            if name in kernel.aligned:
                attributes[(k,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, values, attributes)
    options = {"num_warps": kernel.warps, "num_stages": 1}
    return compile(source, target=GPUTarget(*TARGETS[target]), options=options)


class _Target:
    """A Triton driver with one device, which cannot run anything."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_device(self) -> str:  # a key of the kernels compiled so far
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self.name])


def _frontend(backend: type) -> type:
    """Triton's backend for NVIDIA, which stops at Triton's own IR."""

    class Frontend(backend):
        def __init__(self, target: Any) -> None:
            super().__init__(target)
            self.binary_ext = "ttir"

        def add_stages(self, stages: dict[str, Any], *rest: Any) -> None:
            super().add_stages(stages, *rest)
            translate = stages["ttir"]
            stages.clear()

            def ttir(module: Any, metadata: dict[str, Any]) -> Any:
                metadata |= {"name": module.get_entry_func_name(), "shared": 0}
                return translate(module, metadata)

            stages["ttir"] = ttir

        def hash(self) -> str:
            return f"ttir-{self.target.arch}"

    return Frontend


@contextmanager
def translating(target: str) -> Iterator[dict[str, Any]]:
    """What is launched within becomes Triton's IR for the target and does not run; by hashes."""
    from triton.backends import Backend, backends
    from triton.runtime import JITFunction, driver

    found: dict[str, Any] = {}
    run = JITFunction.run

    def translate_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found[kernel.hash] = kernel

    nvidia = backends["nvidia"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", translate_only)
        patch.setattr(driver, "_active", _Target(target))
        patch.setitem(backends, "nvidia", Backend(_frontend(nvidia.compiler), nvidia.driver))
        yield found


def operations(kernel: Any) -> frozenset[str]:
    """A translated kernel's operations, each on its types and shapes; without control flow, which
    takes any."""
    found = set()
    for line in kernel.asm["ttir"].decode().splitlines():
        without_names = re.sub(r"(%[\w#:.]+(, )?)+", "%", line.partition(" loc(")[0].strip())
        operation = re.sub(r"(?<=constant )[^:]*", "", without_names)
        if operation and not operation.startswith(("#", "}", "module", "scf.", "% = scf.")):
            found.add(operation)
    return frozenset(found)


def lowered(kernel: Any, target: str, folder: Path) -> Any:
    """A translated kernel, compiled to the end."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile

    file = folder / f"{kernel.hash}.ttir"
    file.write_bytes(kernel.asm["ttir"])
    # JSON has made lists of tuples, which no launcher changes.
    options = {k: v for k, v in kernel.metadata._asdict().items() if not isinstance(v, list)}
    return compile(str(file), target=GPUTarget(*TARGETS[target]), options=options)


def resources(kernel: Any, target: str) -> tuple[int, int, int]:
    """Registers a thread, shared memory a block, bytes (AMD: registers) a thread that spill."""
    if target == "gfx942":
        text = kernel.asm["amdgcn"]
        counts = (
            re.search(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count")
        )
        registers, spilled = (int(found[1]) for found in counts if found)
        return registers, kernel.metadata.shared, spilled
    import triton.backends.nvidia as backend

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(backend.__file__).parent / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), kernel.metadata.shared, int(found[2]) + int(found[3])


def report(
    capsys: pytest.CaptureFixture[str], target: str, rows: dict[str, tuple[int, int, int]]
) -> None:
    with capsys.disabled():
        print(f"\n{target}: registers, shared bytes, spilled")
        for label, row in rows.items():
            print(f"  {label:36} {row[0]:>4} {row[1]:>7} {row[2]:>3}")
    # The Triton of torch 2.11 allots registers a little worse than the pinned one.
    some = 0 if tuple(map(int, metadata.version("triton").split(".")[:2])) >= (3, 7) else 32
    assert all(spilled <= some for *_, spilled in rows.values())
    assert all(shared <= SHARED_LIMIT[target] for _, shared, _ in rows.values())
