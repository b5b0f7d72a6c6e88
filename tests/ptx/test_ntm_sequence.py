"""The NTM over time in blocks, as nvcc compiles it, in its op's place behind the launcher.

Beside the reference; the backward is Triton's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch

from . import nvcc
from .launch import Faults, Module, Output, Struct
from .lstm_cases import TYPES
from .test_triton import checks
from .triton_driver import emulated

pytestmark = [pytest.mark.skipif(not nvcc.found(), reason="needs nvcc"), pytest.mark.slow]
FILE = "ntm_sequence_kernel.cu"


def shared_bytes(shape: dict[str, int], own: int) -> int:
    """As `Shared::bytes`."""
    reads, control = -(-shape["read_width"] // 4), -(-shape["control"] // 4)
    rows = max(0, (reads + control - own + 1) // 2 * 2)
    floats = rows * 16 * shape["control"] + 2 * (4 * reads + 132) + 128
    floats += 8 + shape["slots"] * (2 + shape["heads"]) + 16 * shape["width"]
    return 4 * floats


class ForwardSequence:
    """seqmem::ntm_forward_sequence_ on CPU tensors: what csrc/cuda/ntm_sequence.cpp does."""

    def __init__(self, seed: int) -> None:
        self.seed, self.launches = seed, 0

    def __call__(self, *given: Any) -> bool:
        *state, initial, lengths, reset, features, hidden_out, memory_out = given[:15]
        trace, record, checkpoints, segment, writes, taps, squash = given[15:]
        *_, head_bias, hidden, memory, _, weightings, _ = state
        steps, batch, width = features.shape
        shape = {
            "record": 0 if record is None else record.shape[-1],
            "checkpoint": 0 if checkpoints is None else checkpoints.stride(1),
            "segment": segment,
            "control": hidden.shape[-1],
            "slots": memory.shape[1],
            "width": memory.shape[2],
            "values": head_bias.numel(),
            "heads": weightings.shape[1],
            "writes": writes,
            "taps": taps,
            "read_width": width - hidden.shape[-1],
            "padded_width": initial[2].shape[-1] if initial else 0,
        }
        if memory.dtype == torch.float64 or max(shape["control"], shape["values"]) > 128:
            return False
        slots = 1 if shape["slots"] <= 128 else 2
        own = 6 if slots == 1 else 0
        # Padding was filled before.
        written = [features, hidden_out, memory_out, trace, record]
        if lengths is None:
            written = [None if t is None else Output(t) for t in written]
        start = initial or [None] * 5
        arguments = (*state, *start, lengths, reset, *written, checkpoints)
        numbers = Struct("5q5iI3i?", steps, batch, *shape.values(), squash)
        kernel = f"forward_kernel<{TYPES[memory.dtype]}, {own}, {slots}>"
        nvcc.compiled(FILE)[kernel].launch(
            (batch,),
            (512,),
            [numbers, Struct("22P", *arguments)],
            shared_bytes=shared_bytes(shape, own),
            seed=self.seed,
        )
        self.launches += 1
        return True


@pytest.fixture(params=[1, 2])
def suite(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = checks("ntm")
    run = ForwardSequence(request.param)
    monkeypatch.setattr(module.launchers, "_forward_sequence", run)
    with emulated(arch=90):
        yield module.TestLaunchers()
    assert run.launches > 0


@pytest.mark.parametrize(
    "name", ["plain", "read_first", "many_heads", "writes_only", "lengths", "reset"]
)
def test_samples(name: str, suite: Any) -> None:
    suite.check(suite.sample(name), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_of_16_bits(dtype: torch.dtype, suite: Any) -> None:
    suite.check(suite.sample("reset"), dtype, backward=False)


# T, B, I, C, N, M: the copy task's; wide values; more slots than groups of threads.
@pytest.mark.parametrize(
    "sizes", [(3, 2, 9, 100, 128, 20), (2, 2, 3, 9, 150, 7), (2, 2, 3, 5, 200, 28)]
)
def test_sizes(sizes: Any, suite: Any) -> None:
    suite.check(suite.sample("reset", sizes), torch.float32, backward=False)


def test_segments_and_what_is_kept(suite: Any) -> None:
    suite.test_segments()
    suite.test_kept_or_not_rows_and_checks()


def without_barrier(text: str, number: int) -> str:
    """The PTX with one barrier less, in the kernel that small sizes take."""
    begin = text.index("forward_kernelIfLi6ELi1EEEv")
    barriers = re.compile(r"bar\.sync\s[^;]*;").finditer(text, begin)
    first, end = next(islice(barriers, number, None)).span()
    return text[:first] + text[end:]


@pytest.mark.parametrize("number", range(14))
def test_every_barrier_is_needed(number: int, suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.check(suite.sample(), torch.float32, backward=False)
    text = without_barrier(nvcc.ptx(FILE), number)
    monkeypatch.setattr(nvcc, "compiled", lambda _: Module(text))
    with pytest.raises(Faults):
        for name in ("plain", "reset"):
            suite.check(suite.sample(name, (5, 2, 3, 9, 120, 20)), torch.float32, backward=False)
