"""The Triton kernels of all ops: interpreted, compiled ahead of time, and run where a GPU is.

Each op's tests under the interpreter, and its `kernels()` to compile, are in
triton_<op>_interpreted.py; the tests of all ops run in one process of their own.
"""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from ahead_of_time import TARGETS, Kernel, compiled, report, resources
from torch.utils._pytree import tree_leaves

from seqmem_fast import _triton

HERE = Path(__file__).parent
OPS = sorted({file.stem for file in HERE.parent.glob("csrc/ops/*.cpp")})


def schemas() -> dict[str, Any]:
    """Of all ops that compute something, by their names."""
    every = torch._C._dispatch_get_all_op_names()
    names = [name for name in every if name.startswith("seqmem::") and "::check_" not in name]
    return {name.removeprefix("seqmem::"): torch._C._get_schema(name, "") for name in names}


@pytest.fixture(autouse=True)
def triton() -> Any:
    return pytest.importorskip("triton")


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    files = [str(HERE / f"triton_{op}_interpreted.py") for op in OPS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_every_op_has_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub at each op's CUDA key finds a launcher that takes what the op's schema gives."""
    stubs: dict[str, Callable[..., Any]] = {}
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    monkeypatch.setattr(torch.library, "impl", lambda op, key, stub: stubs.update({op: stub}))
    _triton.register()
    modules = [importlib.import_module(f"seqmem_fast._triton.{op}") for op in OPS]
    assert stubs.keys() == {f"seqmem::{name}" for name in schemas()}
    for name, schema in schemas().items():
        parameters = [argument.name for argument in schema.arguments]
        missing = rf"^{name}\(\) missing {len(parameters)} required positional argument"
        with pytest.raises(TypeError, match=missing):
            stubs[f"seqmem::{name}"]()
        (launcher,) = (vars(module)[name] for module in modules if defines(module, name))
        assert [*inspect.signature(launcher).parameters] == parameters


def defines(module: ModuleType, name: str) -> bool:
    return getattr(vars(module).get(name), "__module__", "") == module.__name__


@pytest.mark.parametrize("name", schemas())
def test_every_op_has_a_cuda_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"seqmem::{name}", "CUDA")


# ---- ahead of time ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile(op: str, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All kernels for the targets that they name, and at least one of every op for each target."""
    kernels = importlib.import_module(f"triton_{op}_interpreted").kernels()
    chosen = [kernel for kernel in kernels if target in kernel.targets] or kernels[:1]
    report(capsys, target, dict(built(kernel, target) for kernel in chosen))


def built(kernel: Kernel, target: str) -> tuple[str, tuple[int, int, int]]:
    """The kernel's label, and what it asks of the target."""
    import triton.language as tl

    function = getattr(importlib.import_module(f"seqmem_fast._triton.{kernel.module}"), kernel.name)
    precision = "ieee" if target == "gfx942" or kernel.storage == "bf16" else "tf32x3"
    constants = {"ACC": tl.float32, "PRECISION": precision, **kernel.constants}
    found = compiled(function, target, kernel._replace(constants=constants))
    return f"{kernel.name} {kernel.label or kernel.storage}", resources(found, target)


# ---- on a GPU -----------------------------------------------------------------------------------


def moved(a: Any, device: str) -> Any:
    """Copies of all tensors there, the floating ones with gradients."""
    if isinstance(a, tuple):
        parts = [moved(b, device) for b in a]
        return type(a)(*parts) if hasattr(a, "_fields") else tuple(parts)
    if isinstance(a, torch.Tensor):
        return a.detach().to(device, copy=True).requires_grad_(a.is_floating_point())
    return a


def tensors_of(a: Any) -> list[torch.Tensor]:
    return [b for b in tree_leaves(a) if isinstance(b, torch.Tensor)]


class Call(NamedTuple):
    """One call of a public op."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def calls(op: str) -> Iterator[Call]:
    """The reference's sample inputs, each with the function that they are for."""
    functions = importlib.import_module(f"seqmem_fast.ops.{op}")
    reference = importlib.import_module(f"seqmem_fast.reference.{op}")
    for sample in reference.sample_inputs():
        function = getattr(functions, sample.function or op)
        yield Call(sample.name, function, sample.args, sample.kwargs)


def results(call: Call, device: str) -> list[torch.Tensor | None]:
    """Outputs and gradients of one call there."""
    torch.manual_seed(0)
    args, options = moved(call.args, device), {k: moved(v, device) for k, v in call.kwargs.items()}
    outputs = tensors_of(call.function(*args, **options))
    floating = [a for a in outputs if a.is_floating_point()]
    torch.autograd.backward(floating, [torch.ones_like(a).cumsum(-1) for a in floating])
    return [*outputs, *(a.grad for a in tensors_of((args, options)))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_gpu_agrees_with_the_cpu(op: str) -> None:
    for call in calls(op):
        right, ours = results(call, "cpu"), results(call, "cuda")
        for a, b in zip(ours, right, strict=True):
            assert (a is None) == (b is None), call.name
            if a is None or b is None:  # an argument that takes no gradient
                continue
            error = (a.cpu().double() - b.double()).norm()
            assert error <= 1e-4 * b.double().norm() + 1e-6, call.name
