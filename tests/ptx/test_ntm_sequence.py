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
FORWARD, BACKWARD = "ntm_sequence_kernel.cu", "ntm_sequence_backward_kernel.cu"


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
            "padded_memory": 0,
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
        numbers = Struct("6q5iI3i?", steps, batch, *shape.values(), squash)
        kernel = f"forward_kernel<{TYPES[memory.dtype]}, {own}, {slots}>"
        nvcc.compiled(FORWARD)[kernel].launch(
            (batch,),
            (512,),
            [numbers, Struct("22P", *arguments)],
            shared_bytes=shared_bytes(shape, own),
            seed=self.seed,
        )
        self.launches += 1
        return True


def backward_bytes(shape: dict[str, int]) -> int:
    """As `BackwardShared::bytes`."""
    inputs = shape["read_width"] + shape["control"]
    floats = 10 * 128 + 36 + 8 * 128 + 3 * 16 * 32 + -(-shape["control"] // 4) * 16 * inputs
    return 4 * (floats + shape["slots"] * shape["heads"] + shape["taps"])


class BackwardSequence:
    """seqmem::ntm_backward_sequence_ likewise."""

    def __init__(self, seed: int) -> None:
        self.seed, self.launches = seed, 0

    def __call__(self, *given: Any) -> bool:
        grad_features, grad_trace, *weights, cell, weightings, initial, lengths, reset = given[:9]
        trace, record, checkpoints, memories, state, of_initial, dz, dp = given[9:17]
        slots, width, segment, writes, taps, squash = given[17:]
        steps, batch = dz.shape[:2]
        shape = {
            "record": record.shape[-1],
            "checkpoint": checkpoints.stride(1),
            "segment": segment,
            "padded_memory": memories.stride(1),
            "control": cell.shape[-1],
            "slots": slots,
            "width": width,
            "values": dp.shape[-1],
            "heads": weightings.shape[1],
            "writes": writes,
            "taps": taps,
            "read_width": state[4][0].numel(),
            "padded_width": memories.shape[-1],
        }
        inputs = shape["control"] + shape["read_width"]
        if trace.dtype == torch.float64 or max(shape["values"], inputs, slots) > 128:
            return False
        strides = (0, 0, 0) if grad_features is None else grad_features.stride()
        arguments = (
            grad_features, *strides, grad_trace, *weights, cell, weightings,
            *(initial or [None] * 3), lengths, reset, trace, record, checkpoints, memories, *state,
            *(of_initial or [None] * 5), dz, dp,
        )  # fmt: skip
        nvcc.compiled(BACKWARD)[f"backward_kernel<{TYPES[trace.dtype]}>"].launch(
            (batch,),
            (512,),
            [
                Struct("6q5iI3i?", steps, batch, *shape.values(), squash),
                Struct("P3q26P", *arguments),
            ],
            shared_bytes=backward_bytes(shape),
            seed=self.seed,
        )
        self.launches += 1
        return True


@pytest.fixture(params=[1, 2])
def suite(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = checks("ntm")
    run, back = ForwardSequence(request.param), BackwardSequence(request.param)
    monkeypatch.setattr(module.launchers, "_forward_sequence", run)
    monkeypatch.setattr(module.launchers, "_backward_sequence", back)
    with emulated(arch=90):
        suite = module.TestLaunchers()
        suite.launches = back
        yield suite
    assert run.launches > 0


@pytest.mark.parametrize(
    "name", ["plain", "read_first", "many_heads", "writes_only", "lengths", "reset"]
)
def test_samples(name: str, suite: Any) -> None:
    suite.check(suite.sample(name), torch.float32)
    assert suite.launches.launches > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_of_16_bits(dtype: torch.dtype, suite: Any) -> None:
    suite.check(suite.sample("reset"), dtype)


# T, B, I, C, N, M: the copy task's; then more slots than a thread of the backward has.
@pytest.mark.parametrize(
    "sizes", [(3, 2, 9, 100, 128, 20), (2, 2, 3, 9, 150, 7), (2, 2, 3, 5, 200, 28)]
)
def test_sizes(sizes: Any, suite: Any) -> None:
    suite.check(suite.sample("reset", sizes), torch.float32, backward=sizes[4] <= 128)


def test_segments_and_what_is_kept(suite: Any) -> None:
    suite.test_segments()
    suite.test_kept_or_not_rows_and_checks()


def without_barrier(file: str, number: int) -> Module:
    """The file's kernels, the one that small sizes take with one barrier less."""
    text = nvcc.ptx(file)
    begin = text.index(SMALL[file])
    barriers = re.compile(r"bar\.sync\s[^;]*;").finditer(text, begin)
    first, end = next(islice(barriers, number, None)).span()
    return Module(text[:first] + text[end:])


SMALL = {FORWARD: "forward_kernelIfLi6ELi1EEEv", BACKWARD: "backward_kernelIfEEv"}
BARRIERS = [*((FORWARD, k) for k in range(14)), *((BACKWARD, k) for k in range(21))]


@pytest.mark.parametrize("file, number", BARRIERS)
def test_every_barrier_is_needed(
    file: str, number: int, suite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite.check(suite.sample(), torch.float32, backward=False)
    faulty, right = without_barrier(file, number), nvcc.compiled
    monkeypatch.setattr(nvcc, "compiled", lambda name: faulty if name == file else right(name))
    with pytest.raises(Faults):
        for name in ("plain", "reset"):
            suite.check(suite.sample(name, (5, 2, 3, 9, 120, 20)), torch.float32)
