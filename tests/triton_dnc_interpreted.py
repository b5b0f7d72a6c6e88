"""The Triton DNC sequence on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead_of_time import Kernel
from machine_interpreted import MachineInterpreted
from machines import DNC
from torch import Tensor

from seqmem_fast._triton import dnc as launchers


class TestLaunchers(MachineInterpreted):
    machine, launchers, limits = DNC, launchers, launchers
    options = tuple(DNC.names)
    tolerances = {**MachineInterpreted.tolerances, torch.float16: 2e-3}  # noqa: RUF012
    dtypes = dict.fromkeys(tolerances, "reset")
    long_dtype = torch.float64

    def leaves(self, sample: Any) -> list[Tensor]:
        input, state, controller, *interface = sample.args
        norm, initial = (sample.kwargs.get(name, ()) for name in ("norm", "initial"))
        return [input, *state, *controller, *interface, *norm, *initial]

    def test_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """More rows of links than a program holds at once; equal usages."""
        monkeypatch.setattr(launchers, "_TILE", 256)
        sample = self.sample(sizes=(2, 1, 2, 3, 19, 3))
        x, first, *rest = sample.args
        for usage in (first.usage, torch.ones_like(first.usage), torch.zeros_like(first.usage)):
            start = first._replace(usage=usage, read_weights=torch.zeros_like(first.read_weights))
            self.check(sample._replace(args=(x, start, *rest)), torch.float32, backward=False)


# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(5, 3, 4, 6, 8, 5)]


def kernels() -> list[Kernel]:
    """An LSTM, float32, plain and with every option; the backward spills a little beyond."""
    flags = ("SQUASH", "MASKS", "DEALLOCATE", "SHARPEN", "SOFTMAX")
    options = {
        "LAYERS": 1, "LSTM": True, "LINKS": True, "STRENGTH": 1.0, "NORM_FLOOR": 1e-6, "EPS": 1e-6,
        "MASK_MIN": 0.0, "BD": 4, "BC": 32,
    }  # fmt: skip
    pointers = {"lengths_ptr": "*i64", "reset_ptr": "*u8"}

    def kernel(name: str, label: str, on: bool, **shape: int) -> Kernel:
        constants = {**options, **shape, **dict.fromkeys(flags, on)}
        if name == "dnc_backward":
            constants["USAGE_GRADIENT"] = on
        file = f"{name.removesuffix('_forward')}_kernels"
        aligned = ("slots", "width")
        return Kernel(file, name, "fp32", 8, constants, pointers, aligned, label=label)

    return [
        kernel("dnc_forward", "64, all", True, BN=64, BI=32, BW=32, BK=32),
        kernel("dnc_forward", "64", False, BN=64, BI=32, BW=32, BK=32),
        kernel("dnc_forward", "128", False, BN=128, BI=16, BW=64, BK=32),
        kernel("dnc_backward", "32", False, BN=32, BI=32, BW=32, BK=16),
    ]
