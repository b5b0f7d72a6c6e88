"""A Triton driver whose device is the interpreter: Triton compiles to PTX, launches come here."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from .kept import KEPT, kept
from .launch import Kernel, Module


@dataclass
class Session:
    """What launches share while the driver is active."""

    arch: int
    seed: int
    launches: Counter[str] = field(default_factory=Counter)
    instructions: int = 0


class _Utils:
    """What Triton asks of a device; figures of an H100."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared = 166912 if self.session.arch < 90 else 232448
        return {"max_shared_mem": shared, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(
        self, name: str, ptx: bytes, shared: int, device: int
    ) -> tuple[object, Kernel, int, int, int]:
        module = Module(ptx.decode())
        return module, module[name], 0, 0, 1024  # registers, spills, most threads


def _launcher(session: Session) -> type:
    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.signature, self.metadata = source.signature, metadata

        def __call__(self, x: int, y: int, z: int, stream: int, kernel: Kernel, *rest: Any) -> None:
            given = rest[4:]  # after metadata twice and two hooks
            constant = [kind == "constexpr" for kind in self.signature.values()]
            arguments = [a for a, skip in zip(given, constant, strict=True) if not skip]
            # Triton's own scratch memory, which none of our kernels uses.
            arguments += [None] * (len(kernel.parsed.parameters) - len(arguments))
            arguments = [_argument(a) for a in arguments]
            session.launches[kernel.name] += 1
            session.instructions += kernel.launch(
                (x, y, z),
                (self.metadata.num_warps * 32,),
                arguments,
                cluster=getattr(self.metadata, "num_ctas", 1),
                shared_bytes=self.metadata.shared,
                replicas=True,
                seed=session.seed + sum(session.launches.values()),
            )

    return Launcher


def _argument(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


class _Driver:
    def __init__(self, session: Session) -> None:
        self.session = session
        self.utils = _Utils(session)
        self.launcher_cls = _launcher(session)

    def get_current_device(self) -> int:
        return self.session.arch  # Triton keeps compiled kernels by device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.session.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu


# What sm_80 and sm_90 have different instructions for.
_DIFFERS = re.compile(r"tt\.dot|tt\.atomic|descriptor|bf16")


def differs(ir: str) -> bool:
    """Whether a kernel, in Triton's IR, may become different PTX for sm_80 and sm_90."""
    return _DIFFERS.search(ir) is not None


# What sm_80 does without, in kernels whose IR tells no difference: layouts change by stmatrix.
_OWN = re.compile(r"stmatrix|mbarrier|cp\.async\.bulk|fence\.proxy|elect\.sync")


def is_newest_s_own(ptx: str) -> bool:
    """Whether PTX for sm_90 cannot stand for what sm_80 runs."""
    return _OWN.search(ptx) is not None


def _ptx_backend(cuda_backend: type) -> type:
    """Triton's backend for NVIDIA, which ends with PTX; that which architectures share is kept."""
    from triton import __version__

    class PtxBackend(cuda_backend):
        def __init__(self, target: Any) -> None:
            super().__init__(target)
            self.binary_ext = "ptx"

        def add_stages(self, stages: dict[str, Any], options: Any, *rest: Any) -> None:
            super().add_stages(stages, options, *rest)
            own = {**stages}
            launch = [getattr(options, name) for name in ("num_warps", "num_ctas", "num_stages")]

            def ptx(module: Any, metadata: dict[str, Any]) -> str:
                if differs(ir := str(module)):
                    return _run(own, module, metadata)

                def make(target: Path) -> None:
                    found: dict[str, Any] = {}
                    target.write_text(json.dumps([_run(own, module, found), found]))

                key = sha256(f"{ir} {launch} {__version__}".encode()).hexdigest()
                name = f"triton_{key[:32]}.json"
                if self.target.arch == 90:
                    text, found = json.loads(kept(name, make).read_text())
                elif (KEPT / name).exists():  # where sm_90 came first
                    text, found = json.loads((KEPT / name).read_text())
                    if is_newest_s_own(text):
                        return _run(own, module, metadata)
                else:
                    return _run(own, module, metadata)
                metadata |= found
                return str(text)

            stages.clear()
            stages |= {"ttir": own["ttir"], "ptx": ptx}

        def hash(self) -> str:
            return f"ptx-{self.target.arch}"

    return PtxBackend


def _run(stages: dict[str, Any], module: Any, metadata: dict[str, Any]) -> str:
    """From Triton's IR to PTX."""
    for name in ("ttgir", "llir", "ptx"):
        module = stages[name](module, metadata)
    return str(module)


@contextmanager
def emulated(arch: int = 90, seed: int = 0) -> Iterator[Session]:
    """Triton kernels on CPU tensors run in the interpreter, compiled for sm_<arch>."""
    from triton.backends import Backend, backends
    from triton.runtime import driver

    session = Session(arch, seed)
    nvidia, active = backends["nvidia"], driver._active
    backends["nvidia"] = Backend(_ptx_backend(nvidia.compiler), nvidia.driver)
    driver.set_active(_Driver(session))
    try:
        yield session
    finally:
        backends["nvidia"] = nvidia
        driver._active = active
