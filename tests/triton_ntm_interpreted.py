"""The Triton NTM sequence on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from ahead_of_time import Kernel
from machine_interpreted import MachineInterpreted
from machines import NTM

from seqmem_fast._triton import ntm as launchers


class TestLaunchers(MachineInterpreted):
    machine, launchers = NTM, launchers
    options = ("many_heads", "writes_only", "feedforward", "all_padded")


# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(5, 3, 4, 6, 8, 5)]


def kernels() -> list[Kernel]:
    """The copy task's: N = 128, M = 20, C = 100, an LSTM; float32."""
    shape = {"BN": 128, "BW": 32, "BS": 4, "BC": 128, "BK": 32}
    options = {"LAYERS": 1, "LSTM": True, "SQUASH": True}
    pointers = {"lengths_ptr": "*i64", "reset_ptr": "*u8"}
    file, constants = "ntm_kernels", {**shape, **options}
    names = ("ntm_forward", "ntm_backward")
    return [Kernel(file, name, "fp32", 8, constants, pointers, ("slots",)) for name in names]
