"""The Triton kernels of all ops but the LSTM: interpreted, and compiled ahead of time.

Each op's tests under the interpreter are in triton_<op>_interpreted.py and run in a process of
their own.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ahead_of_time import compiled, report, resources
from torch.utils._pytree import tree_leaves

import seqmem_fast

assert seqmem_fast.__version__  # its import registers the ops
HERE = Path(__file__).parent
NTM = ("ntm_addressing", "ntm_content_addressing", "ntm_read", "ntm_write")
OPS = {
    "additive_attention": ("additive_attention",),
    "attention": ("attention",),
    "dynamic_memory": ("dynamic_memory",),
    "hard_attention": ("categorical_sample", "reinforce_loss"),
    "ntm": ("ntm",),
    "ntm_addressing": NTM,
}


@pytest.fixture(autouse=True)
def triton() -> Any:
    return pytest.importorskip("triton")


@pytest.mark.parametrize("op", OPS)
def test_in_the_interpreter(op: str) -> None:
    file = HERE / f"triton_{op}_interpreted.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("name", [name for names in OPS.values() for name in names])
def test_every_op_has_a_cuda_kernel(name: str) -> None:
    for op in (f"seqmem::{name}", f"seqmem::{name}_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")


# ---- ahead of time ------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """How a kernel is launched on a usual shape."""

    module: str
    name: str
    storage: str
    warps: int
    constants: dict[str, Any]
    pointers: dict[str, str] = {}  # noqa: RUF012
    aligned: tuple[str, ...] = ()


MASK = {"mask_ptr": "*u8"}


def additive_kernels() -> list[Kernel]:
    file = "additive_attention"
    rows = ("q_t", "k_t", "own_t", "other_t", "width", "keys")
    wide = {"scores_ptr": "*fp32", "grad_scores_ptr": "*fp32", "grad_v_ptr": "*fp32"}
    scores = {"m_j": 1, "BM": 16, "BN": 64}
    return [
        Kernel(file, "additive_scores", "bf16", 4, scores, {**MASK, **wide}, rows),
        Kernel(file, "additive_backward", "bf16", 4, {"BM": 16, "BA": 32}, wide, rows),
    ]


def attention_kernels() -> list[Kernel]:
    file = "attention_kernels"
    rows = ("q_t", "k_t", "v_t", "m_i", "g_i", "keys", "width", "value_width")
    kernels = []
    for storage, (block_m, block_n, warps) in {"bf16": (64, 64, 4), "fp32": (32, 32, 8)}.items():
        tile = {"BM": block_m, "BN": block_n, "BD": 64, "BV": 64, "m_j": 1, "g_j": 1}
        names: dict[str, dict[str, Any]] = {
            "attention_forward": {"CAUSAL": False, "ONE_BLOCK": False},
            "attention_backward_rows": {"grad_scores_ptr": None},
            "attention_backward_columns": {"CAUSAL": False},
        }
        for name, options in names.items():
            pointers = {**MASK, "delta_ptr": "*fp32"}
            constants = {**tile, **options}
            kernels.append(Kernel(file, name, storage, warps, constants, pointers, rows))
    return kernels


def ntm_addressing_kernels() -> list[Kernel]:
    """N = 128, M = 64: the most that stays on chip."""
    shape = {"BN": 128, "BW": 64, "BS": 4}
    names = ("ntm_address", "ntm_address_backward", "ntm_write_heads", "ntm_write_heads_backward")
    return [
        Kernel("ntm_addressing_kernels", name, "bf16", 8, shape, {}, ("slots", "width"))
        for name in names
    ]


def dynamic_memory_kernels() -> list[Kernel]:
    file, shape = "dynamic_memory_kernels", {"BN": 64, "BD": 64}
    fp32 = "z scores saved maps dz du de ds grad".split()
    wide = {f"{name}_ptr": "*fp32" for name in fp32}
    names = ("forward", "final", "backward", "shared_grad")
    kernels = [f"dynamic_memory_{name}" for name in names]
    return [Kernel(file, k, "bf16", 8, shape, {**MASK, **wide}, ("width",)) for k in kernels]


def hard_attention_kernels() -> list[Kernel]:
    file, shape = "hard_attention", {"BLOCK": 256}
    wide = {"uniform_ptr": "*fp32", "by_log_prob_ptr": "*fp32", "by_entropy_ptr": "*fp32"}
    names = ("hard_attention_forward", "hard_attention_backward")
    return [Kernel(file, k, "bf16", 1, shape, {"action_ptr": "*i64", **wide}) for k in names]


def ntm_kernels() -> list[Kernel]:
    """The copy task's: N = 128, M = 20, C = 100, an LSTM; float32."""
    shape = {"BN": 128, "BW": 32, "BS": 4, "BC": 128, "BK": 32}
    options = {"LAYERS": 1, "LSTM": True, "SQUASH": True}
    pointers = {"lengths_ptr": "*i64", "reset_ptr": "*u8"}
    file, constants = "ntm_kernels", {**shape, **options}
    names = ("ntm_forward", "ntm_backward")
    return [Kernel(file, name, "fp32", 8, constants, pointers, ("slots",)) for name in names]


KERNELS = {
    "additive_attention": additive_kernels,
    "attention": attention_kernels,
    "dynamic_memory": dynamic_memory_kernels,
    "hard_attention": hard_attention_kernels,
    "ntm": ntm_kernels,
    "ntm_addressing": ntm_addressing_kernels,
}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("op", KERNELS)
def test_kernels_compile(op: str, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, target, dict(built(spec, target) for spec in KERNELS[op]()))


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_a_kernel_of_every_op_compiles(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, target, dict(built(specs()[0], target) for specs in KERNELS.values()))


def built(spec: Kernel, target: str) -> tuple[str, tuple[int, int, int]]:
    """The kernel's label, and what it asks of the target."""
    import triton.language as tl

    kernel = getattr(importlib.import_module(f"seqmem_fast._triton.{spec.module}"), spec.name)
    precision = "ieee" if target == "gfx942" or spec.storage == "bf16" else "tf32x3"
    constants = {"ACC": tl.float32, "PRECISION": precision, **spec.constants}
    found = compiled(
        kernel, target, spec.storage, spec.warps, constants, spec.pointers, spec.aligned
    )
    return f"{spec.name} {spec.storage}", resources(found, target)


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
