"""The Triton kernels of all ops: interpreted, compiled ahead of time, and run where a GPU is.

Each op's tests under the interpreter, which run in a process of their own, its `kernels()` to
compile, and `COMPILED`, sizes to compile all its calls for, are in triton_<op>_interpreted.py.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from ahead_of_time import (
    SHARED_LIMIT,
    TARGETS,
    Kernel,
    compiled,
    lowered,
    operations,
    report,
    resources,
    translating,
)
from forks import run_pytest
from ptx.triton_driver import differs, is_newest_s_own
from torch.utils._pytree import tree_leaves

from seqmem_fast import _triton

HERE = Path(__file__).parent
OPS = sorted({file.stem for file in HERE.parent.glob("csrc/ops/*.cpp")})


@functools.cache
def schemas() -> dict[str, Any]:
    """Of all ops that compute something, by their names.

    Not of a CUDA build's parts of them, which have no Meta kernel.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    every = torch._C._dispatch_get_all_op_names()
    names = [name for name in every if name.startswith("seqmem::") and "::check_" not in name]
    names = [name for name in names if has_kernel(name, "Meta")]
    return {name.removeprefix("seqmem::"): torch._C._get_schema(name, "") for name in names}


# Of relative errors, per storage type.
BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def triton() -> Any:
    return pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_in_the_interpreter(op: str, tmp_path: Path) -> None:
    run_pytest([str(HERE / f"triton_{op}_interpreted.py")], tmp_path, TRITON_INTERPRET="1")


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
        with pytest.raises(RuntimeError, match=rf"check_{name}\(\) is missing value for argument"):
            stubs[f"seqmem::{name}"]()
        (launcher,) = (vars(module)[name] for module in modules if defines(module, name))
        assert [*inspect.signature(launcher).parameters] == parameters


def test_launchers_of_what_small_calls_leave_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the compiled module has a CUDA kernel that calls `seqmem::<op>_triton`, that is it."""
    stubs: dict[str, Callable[..., Any]] = {}
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel", "seqmem::attention_triton".__eq__)
    monkeypatch.setattr(torch.library, "impl", lambda op, key, stub: stubs.update({op: stub}))
    _triton.register()
    assert stubs.keys() == {"seqmem::attention_triton"}
    with pytest.raises(RuntimeError, match=r"check_attention\(\) is missing value"):
        stubs["seqmem::attention_triton"]()


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
    rows = {
        f"{kernel.name} {kernel.label or kernel.storage}": resources(built(kernel, target), target)
        for kernel in chosen
    }
    report(capsys, target, rows)


def built(kernel: Kernel, target: str) -> Any:
    import triton.language as tl

    function = getattr(importlib.import_module(f"seqmem_fast._triton.{kernel.module}"), kernel.name)
    precision = "ieee" if target == "gfx942" or kernel.storage == "bf16" else "tf32x3"
    constants = {"ACC": tl.float32, "PRECISION": precision, **kernel.constants}
    return compiled(function, target, kernel._replace(constants=constants))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_what_runs_once_as_ptx_is_the_same_for_two_architectures(op: str) -> None:
    kernel = (
        importlib.import_module(f"triton_{op}_interpreted").kernels()[0]._replace(storage="fp32")
    )
    older, newer = (built(kernel, target).asm for target in ("sm_80", "sm_90"))
    if differs(older["ttir"]) or is_newest_s_own(newer["ptx"]):
        pytest.skip("has instructions of its own for each")
    # Names of files are those of the clone in which Triton's cache first met a kernel.
    code = (asm["ptx"].partition(".section")[0] for asm in (older, newer))
    one, other = (re.sub(r"\.target.*|//.*|\.loc.*|\.file.*", "", text) for text in code)
    assert one == other and ".entry" in one


@pytest.fixture
def launchers_on_cpu() -> Iterator[None]:
    """CPU tensors reach the Triton launchers, through dispatcher and autograd as on a GPU."""
    library = torch.library.Library("seqmem", "IMPL")
    modules = [importlib.import_module(f"seqmem_fast._triton.{op}") for op in OPS]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name in schemas():
            (launcher,) = (vars(module)[name] for module in modules if defines(module, name))
            library.impl(name, launcher, "CPU")
    yield
    library._destroy()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_option_compiles_in_every_dtype(
    op: str,
    dtype: torch.dtype,
    launchers_on_cpu: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward and backward of all samples: a kernel that only one option reaches is met too.

    All are type-checked and become Triton's IR; of these, as many are compiled to the end as it
    takes to meet each operation on each type and shape.
    """
    from triton.compiler.errors import CompilationError

    # What no kernel fills is a valid action.
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    failures = []
    with translating("sm_90") as kernels:
        for sizes in importlib.import_module(f"triton_{op}_interpreted").COMPILED:
            for call in calls(op, dtype, sizes=sizes):
                try:
                    results(call, "cpu")
                    with torch.no_grad():  # nothing is saved for a backward
                        call.function(*call.args, **call.kwargs)
                except CompilationError as error:
                    failures.append(f"{call.name} {sizes}: {error}")
    assert kernels and not failures, "\n".join(failures)
    met: set[str] = set()
    for kernel in sorted(kernels.values(), key=lambda kernel: -len(operations(kernel))):
        if operations(kernel) <= met:
            continue
        met |= operations(kernel)
        registers, shared, spilled = resources(lowered(kernel, "sm_90", tmp_path), "sm_90")
        assert shared <= SHARED_LIMIT["sm_90"]
        if spilled:
            with capsys.disabled():
                print(f"\n{kernel.name}: {registers} registers, {spilled} bytes spilled", end="")


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


def calls(
    op: str, dtype: torch.dtype = torch.float32, **options: tuple[int, ...]
) -> Iterator[Call]:
    """The reference's sample inputs, each with the function that they are for."""
    functions = importlib.import_module(f"seqmem_fast.ops.{op}")
    reference = importlib.import_module(f"seqmem_fast.reference.{op}")
    for sample in reference.sample_inputs(dtype=dtype, **options):
        function = getattr(functions, sample.function or op)
        yield Call(sample.name, function, sample.args, sample.kwargs)


def seed_like(a: torch.Tensor) -> torch.Tensor:
    """1, 2, 3 ... along the last dimension; cumsum has no deterministic form on CUDA."""
    if not a.dim():
        return torch.ones_like(a)
    return torch.arange(1, a.shape[-1] + 1, device=a.device).to(a.dtype).expand_as(a)


def arguments(call: Call, device: str) -> tuple[Any, dict[str, Any]]:
    """There, but for the sizes of packed steps, which stay on the CPU."""
    options = {
        key: value if key == "batch_sizes" else moved(value, device)
        for key, value in call.kwargs.items()
    }
    return moved(call.args, device), options


def results(call: Call, device: str) -> list[torch.Tensor | None]:
    """Outputs and gradients of one call there."""
    torch.manual_seed(0)
    args, options = arguments(call, device)
    outputs = tensors_of(call.function(*args, **options))
    learning = [a for a in outputs if a.requires_grad]  # of floating ones, all but usages
    torch.autograd.backward(learning, [seed_like(a) for a in learning])
    return [*outputs, *(a.grad for a in tensors_of((args, options)))]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_gpu_agrees_with_the_cpu(op: str, dtype: torch.dtype) -> None:
    for call in calls(op, dtype):
        assert_agree(results(call, "cuda"), results(call, "cpu"), BOUNDS[dtype], call.name)


def assert_agree(
    ours: list[torch.Tensor | None], right: list[torch.Tensor | None], bound: float, name: str
) -> None:
    for a, b in zip(ours, right, strict=True):
        assert (a is None) == (b is None), name
        if a is None or b is None:  # an argument that takes no gradient
            continue
        error = (a.cpu().double() - b.double()).norm()
        assert error <= bound * b.double().norm() + bound / 100, name


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_gpu_calls_can_be_captured(op: str) -> None:
    """A call waits for no value on the GPU, and its replay gives the same bits."""
    for call in calls(op):
        if "batch_sizes" in call.kwargs:
            continue
        args, options = arguments(call, "cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            expected = tensors_of(call.function(*args, **options))
            with torch.cuda.graph(graph):
                captured = tensors_of(call.function(*args, **options))
        graph.replay()
        assert all(map(torch.equal, captured, expected)), call.name
