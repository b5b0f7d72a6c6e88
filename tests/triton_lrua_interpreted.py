"""The Triton kernels of least recently used access on CPU tensors; run by test_triton_ops.py in a
process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

import torch
from ahead_of_time import Kernel
from machine_interpreted import MachineInterpreted
from machines import LRUA

from seqmem_fast._triton import lrua as launchers


class TestLaunchers(MachineInterpreted):
    machine, launchers = LRUA, launchers
    options = ("one_head", "many_heads", "two_layers", "feedforward", "all_padded")

    def test_least_used_slots(self) -> None:
        """Ties by ascending index, NaN last."""
        sample = LRUA.sample("plain", torch.float32, (1, 2, 2, 2, 9, 2), heads=4)
        x, first, *rest = sample.args
        nan, inf = float("nan"), float("inf")
        usage = [[1.0, 0, 1, 0, 2, 0, 1, 0, 0], [nan, 3, inf, nan, nan, nan, nan, nan, 2]]
        args = (x, first._replace(usage=torch.tensor(usage)), *rest)
        outs = self.forward(*LRUA.raw(sample._replace(args=args)), False, True)
        assert outs[10].tolist() == [[[1, 3, 5, 7], [8, 1, 0, 2]]]


# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(5, 3, 4, 6, 8, 5)]


def kernels() -> list[Kernel]:
    """One-shot classification's: N = 128, M = 40, C = 200, four heads, an LSTM; float32."""
    shape = {"BN": 128, "BW": 64, "BC": 64, "BK": 32}
    options = {"LAYERS": 1, "LSTM": True, "OWN": True, "STRENGTH": False}
    pointers = {"lengths_ptr": "*i64", "reset_ptr": "*u8", "slots_ptr": "*i64"}
    file, constants = "lrua_kernels", {**shape, **options}
    return [
        Kernel(file, "lrua_forward", "fp32", 8, {**constants, "GAMMA": 0.95}, pointers, ("slots",)),
        Kernel(file, "lrua_backward", "fp32", 8, constants, pointers, ("slots",)),
    ]
