"""Which route a sequence takes (see lstm.py), and with which tiles: fixed rules of the shape."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .common import cdiv, has_matrix_cores, next_power_of_2, tf32_allowed
from .lstm_rows import Rows

# Whether the compiled module brings the loops over time of the step-by-step route.
_CPP_STEPS = hasattr(torch.ops.seqmem, "lstm_forward_steps_")

# Whether it brings the kernels that stay on the GPU over all steps.
_PERSISTENT = hasattr(torch.ops.seqmem, "lstm_forward_persistent_")

# Whether it brings the kernels that run in thread block clusters.
_CLUSTERS = hasattr(torch.ops.seqmem, "lstm_forward_cluster_")


class OnChipPlan(NamedTuple):
    """How the on-chip kernels run: batch rows a program, padded H, tensor cores or not."""

    block_b: int
    block_h: int
    dot: bool
    precision: str
    warps: int


def on_chip_plan(
    hidden: int, batch: int, dtype: torch.dtype, device: torch.device
) -> OnChipPlan | None:
    """The on-chip kernels' shape, or None where the step-by-step route must serve.

    Multiply-adds take a multiprocessor 4 H^2 / 128 cycles a row and step and tensor cores about
    one fixed latency per 16 rows, so the former win while there are few rows for each of the 100
    to 150 multiprocessors. H in 65..128 keeps 128 kB of weights in shared memory; if 16 does not
    divide it, its addresses cost registers and up to 256 bytes a thread spill.
    """
    block_h = max(16, next_power_of_2(hidden))
    if dtype == torch.float64 or block_h > 128:
        return None
    tensor_cores = has_matrix_cores(device)
    precision, warps = "ieee", 8 if block_h == 128 else 4
    if dtype == torch.float32:
        # AMD's TF32 path spills; its float32 keeps to multiply-adds.
        tensor_cores = tensor_cores and torch.version.hip is None and tf32_allowed()
        precision, warps = "tf32", 8
    if block_h <= 64 and not (tensor_cores and batch > 512):
        return OnChipPlan(1, block_h, False, "ieee", 8 if block_h == 64 else 4)
    if not tensor_cores or (block_h == 128 and not (precision == "ieee" and _holds_128(device))):
        return None
    return OnChipPlan(16, block_h, True, precision, warps)


def _holds_128(device: torch.device) -> bool:
    """Whether 152 kB of weights and staging fit in a block's shared memory.

    AMD has less and would keep them in registers, which from Triton 3.8 on spill.
    """
    if device.type != "cuda":
        return True
    limit = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return bool(limit["max_shared_mem"] >= 152 * 1024)


def cluster_tile(weight_hh: Tensor, batch: int, backward: bool) -> int:
    """How many batch rows each cluster takes where the cluster kernels serve, else 0."""
    if not (_CLUSTERS and weight_hh.is_cuda):
        return 0
    return int(torch.ops.seqmem.lstm_cluster_tile(weight_hh, batch, backward))


def stays_resident(rows: Rows, weight_hh: Tensor, weight_hr: Tensor | None) -> bool:
    """Whether the kernels of lstm_persistent_kernel.h serve: no projection, not packed."""
    if not (_PERSISTENT and weight_hh.is_cuda and weight_hr is None and rows.starts is None):
        return False
    return bool(torch.ops.seqmem.lstm_persistent_serves(weight_hh, rows.batch, weight_hh.shape[1]))


def steps_in_cpp(weight_hh: Tensor, weight_hr: Tensor | None) -> bool:
    """Whether the loop over the steps runs in C++."""
    return _CPP_STEPS and weight_hh.is_cuda and weight_hr is None


def route(
    rows: Rows, weight_hh: Tensor, weight_hr: Tensor | None, backward: bool
) -> tuple[OnChipPlan | None, int]:
    """The on-chip kernels' shape or the clusters' rows; neither: resident, or step by step."""
    if weight_hr is not None:
        return None, 0
    plan = on_chip_plan(weight_hh.shape[1], rows.batch, weight_hh.dtype, weight_hh.device)
    if plan is not None and plan.block_h <= 64 and plan.dot:
        return plan, 0
    tile = cluster_tile(weight_hh, rows.batch, backward)
    return (plan, 0) if tile == 0 else (None, tile)


def launch_on_chip(
    kernel: Any, plan: OnChipPlan, rows: Rows, hidden: int, **arguments: Any
) -> None:
    """Run a kernel of lstm_on_chip.py over the whole sequence."""
    if rows.batch == 0:
        return
    kernel[(cdiv(rows.batch, plan.block_b),)](
        batch=rows.batch,
        H=hidden,
        BLOCK_B=plan.block_b,
        BLOCK_H=plan.block_h,
        DOT=plan.dot,
        PRECISION=plan.precision,
        num_warps=plan.warps,
        num_stages=1,
        **rows.arguments(),
        **arguments,
    )
