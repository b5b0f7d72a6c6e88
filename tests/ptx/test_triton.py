"""Every Triton kernel's PTX in the interpreter, through the real launchers, beside the references.

The tests are those of triton_<op>_interpreted.py, which work on CPU tensors. A few run here, in
this process; all of them, for two architectures and in other orders of warps, are slow and have
processes of their own.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import run_pytest

from .triton_driver import emulated

pytest.importorskip("triton")
TESTS = Path(__file__).parents[1]
OPS = [file.stem for file in sorted((TESTS.parent / "csrc" / "ops").glob("*.cpp"))]
# Measures Triton's own exp, which is coarser on a GPU (ex2.approx) than in the interpreter.
NOT_HERE = ["--deselect", "tests/triton_lstm_interpreted.py::test_gate_maths"]


def checks(op: str) -> Any:
    return importlib.import_module(f"triton_{op}_interpreted")


def lstm(patch: pytest.MonkeyPatch) -> None:
    module = checks("lstm")
    for route, dtype in (("multiply-add", torch.float32), ("dot", torch.float16)):
        patch.setattr(module.lstm_routes, "on_chip_plan", lambda *_, r=route: module.ROUTES[r])
        for sample in module.samples(dtype, projected=False):
            if sample.name == "plain":
                module.check(sample, dtype)
    patch.setattr(module.lstm_routes, "on_chip_plan", lambda *_: None)
    for sample in module.samples(torch.float32, projected=True):
        if sample.name == "all_padded":
            module.check(sample, torch.float32)


def lstm_regularized(patch: pytest.MonkeyPatch) -> None:
    module = checks("lstm_regularized")
    for name, dtype in (("plain norm zoneout", torch.float32), ("reset zoneout", torch.bfloat16)):
        module.check(name, dtype)


def machine(op: str) -> None:
    """All of its kernels, with lengths and reset."""
    suite = checks(op).TestLaunchers()
    suite.check(suite.sample(suite.machine.padded), torch.float32)


def ntm(patch: pytest.MonkeyPatch) -> None:
    machine("ntm")


def lrua(patch: pytest.MonkeyPatch) -> None:
    machine("lrua")


def ntm_addressing(patch: pytest.MonkeyPatch) -> None:
    module = checks("ntm_addressing")
    for name in ("addressing_heads", "write_heads"):
        module.check(module.SAMPLES[name], torch.float32)


def dnc(patch: pytest.MonkeyPatch) -> None:
    machine("dnc")


def attention(patch: pytest.MonkeyPatch) -> None:
    module = checks("attention")
    module.check(module.SAMPLES["causal_masked"], torch.float32)
    module.check(module.SAMPLES["causal_masked"], torch.bfloat16)  # wgmma
    for many in ("_MANY", "_MANY_OF_16_BITS"):
        patch.setattr(module.launchers, many, 0)  # scores: torch's products
    module.check(module.SAMPLES["masked"], torch.float32)
    module.check(module.SAMPLES["masked"], torch.bfloat16)


def sparse_attention(
    patch: pytest.MonkeyPatch, op: str, in_float32: Sequence[str], in_bfloat16: Sequence[str]
) -> None:
    module = checks(op)
    if "_BLOCK" in vars(module.launchers):
        patch.setattr(module.launchers, "_BLOCK", 16)
    for name in in_float32:
        module.check(module.SAMPLES[name], torch.float32)
    for name in in_bfloat16:
        module.check(module.SAMPLES[name], torch.bfloat16)


def window_attention(patch: pytest.MonkeyPatch) -> None:
    names = ("ranges", "entmax"), ("global", "sparsemax")
    sparse_attention(patch, "window_attention", *names)


def block_sparse_attention(patch: pytest.MonkeyPatch) -> None:
    names = ("causal", "sparsemax"), ("shared", "entmax")
    sparse_attention(patch, "block_sparse_attention", *names)


def indexed_attention(patch: pytest.MonkeyPatch) -> None:
    sparse_attention(patch, "indexed_attention", ("each", "entmax"), ("sparsemax",))


def additive_attention(patch: pytest.MonkeyPatch) -> None:
    module = checks("additive_attention")
    module.check(module.SAMPLES["masked"], torch.float32)


def hard_attention(patch: pytest.MonkeyPatch) -> None:
    checks("hard_attention").test_sample_and_gradient(torch.float32, None)


def dynamic_memory(patch: pytest.MonkeyPatch) -> None:
    module = checks("dynamic_memory")
    patch.setattr(module.launchers, "_ELEMENTS", 64)  # two blocks of slots
    module.check(module.SAMPLES["per_sample_masked"])
    module.check(module.SAMPLES["shared"])


def delta_memory(patch: pytest.MonkeyPatch) -> None:
    module = checks("delta_memory")
    module.check(module.SAMPLES["ended"], torch.float32)
    module.check(module.SAMPLES["by_feature"], torch.float32)


def entmax(patch: pytest.MonkeyPatch) -> None:
    module = checks("entmax")
    module.check("entmax15", torch.float32)
    patch.setattr(module.launchers, "_BLOCK", 16)
    module.check("own", torch.float32)


QUICK: list[Callable[[pytest.MonkeyPatch], None]] = [globals()[op] for op in OPS]


def test_every_cuda_file_is_checked() -> None:
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    for file in (TESTS.parent / "csrc" / "cuda").glob("*_kernel.cu"):
        named = re.sub("forward|backward", "{name}", file.name)  # one test for both directions
        names = file.name, file.stem.removesuffix("_kernel"), named
        assert any(f'"{name}"' in tests for name in names), file.name


@pytest.mark.parametrize("check", QUICK, ids=lambda check: check.__name__)
def test_one_call_each_way(
    check: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with emulated(arch=90) as session:
        check(monkeypatch)
    assert session.launches.keys() == {kernel.name for kernel in checks(check.__name__).kernels()}


@pytest.mark.slow
@pytest.mark.parametrize("arch, seed", [(90, 0), (80, 1)])
@pytest.mark.parametrize("op", OPS)
def test_all(op: str, arch: int, seed: int, tmp_path: Path) -> None:
    file = str(TESTS / f"triton_{op}_interpreted.py")
    options = ["-p", "ptx.plugin", "--ptx-arch", str(arch), "--ptx-seed", str(seed), *NOT_HERE]
    run_pytest(["-s", *options, file], tmp_path)
