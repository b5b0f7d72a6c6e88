r"""The LSTM on GPU: launchers of `lstm_cell`, `lstm`, `lstm_cell_backward`, `lstm_backward`.

Formulas, shapes and errors: `ops/lstm.py`. Each launcher takes its op's argument list, checks it
with the C++ core and works on any device that Triton can launch on, or interpret.

Routes of the sequence; both start with one GEMM of all inputs with weight_ih and, in backward,
end with one GEMM per weight over all steps. Backward recomputes nothing: it reads gates and cells.

* On chip (lstm_on_chip.py): one kernel loops over time, weight_hh stays on chip. Float32 up to
  H = 64, 16-bit storage up to H = 128 (64 on AMD and where shared memory is below 152 kB); no
  projection.
* In clusters, in a CUDA build: the same in CUDA C++, first of all where its estimate is best
  (`lstm_cluster_tile`). Up to H = 64 one block takes a batch row (csrc/cuda/lstm_block_kernel.cu).
  Above, weight_hh is shared out over the blocks of a thread block cluster, on GPUs of compute
  capability 9.0 and newer: float32 up to H = 384 (lstm_cluster_kernel.cu), 16-bit storage up to
  H = 512 (lstm_cluster_16_kernel.cu).
* Resident, in a CUDA build: weight_hh is shared out over all multiprocessors
  (lstm_persistent_kernel.cu), up to H = 1024 where 8 divides it, for up to two launches' rows.
* Step by step (lstm_step.py): one GEMM with weight_hh and one pointwise kernel per step. All the
  rest: larger H, float64, projections. A CUDA build runs this loop in C++.

Which one, and its tiles, follow from the shape by the fixed rules of `on_chip_plan` and
`cluster_tile`: nothing is tuned at run time, the first call of a kind pays for one compilation
alone, and results do not drift from run to run. Batch, time and strides are no part of a compiled
kernel's signature.

Arithmetic is float32 for 16-bit storage, and c stays float32 between steps; pre-activations are
rounded to storage once, the input's part, and step by step again with the state's part added.
Float32 is full precision unless `torch.backends.cuda.matmul` allows TF32.

State of proof: all kernels, Triton's and CUDA C++'s, agree with the reference on an H200
(docs/gpu.md), in Triton's interpreter and in the interpreter of their PTX (docs/gpu_tests.md), and
compile ahead of time for sm_80, sm_90, sm_100 and gfx942. No AMD GPU has run them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import lstm_on_chip, lstm_step
from .common import (
    accumulator,
    has_matrix_cores,
    refuse_in_capture,
    row_lengths,
    tf32_allowed,
    wide,
)

# One tile of the pointwise kernels: 4 elements for each of the 128 threads of a program.
_TILE = 512

# Whether the compiled module brings the loops over time of the step-by-step route.
_CPP_STEPS = hasattr(torch.ops.seqmem, "lstm_forward_steps_")

# Whether it brings the kernels that stay on the GPU over all steps.
_PERSISTENT = hasattr(torch.ops.seqmem, "lstm_forward_persistent_")

# Whether it brings the kernels that run in thread block clusters.
_CLUSTERS = hasattr(torch.ops.seqmem, "lstm_forward_cluster_")

# A cell is the only step of a sequence.
_ONLY_STEP = {
    "lengths_ptr": None,
    "reset_ptr": None,
    "t": 0,
    "row0": 0,
    "steps": 1,
    "t_stride": 1,
    "b_stride": 1,
    "reverse": 0,
}


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
    block_h = max(16, triton.next_power_of_2(hidden))
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


class Grads(NamedTuple):
    """Gradients of the sequence's outputs, as rows."""

    output: Tensor | None
    hy: Tensor | None
    cy: Tensor | None
    gates: Tensor | None
    cells: Tensor | None


@dataclass(frozen=True)
class Rows:
    """Where step t of batch element b is stored in the flattened [rows, width] tensors."""

    steps: int
    batch: int
    t_stride: int
    b_stride: int
    reverse: bool
    starts: Sequence[int] | None  # packed: first row of each step
    sizes: Sequence[int] | None  # packed: rows of each step
    lengths: Tensor | None  # [B] int64 on the device; packed rows have them too
    reset: Tensor | None  # [rows] uint8

    @staticmethod
    def of(
        input: Tensor,
        lengths: Tensor | None,
        reset: Tensor | None,
        batch_sizes: Tensor | None,
        batch_first: bool,
        reverse: bool,
    ) -> Rows:
        if batch_sizes is not None:
            refuse_in_capture(input.device, "seqmem::lstm: expected no packed input (batch_sizes)")
            sizes = batch_sizes.tolist()
            starts = (batch_sizes.cumsum(0) - batch_sizes).tolist()
            ends = (batch_sizes[:, None] > torch.arange(sizes[0])).sum(0)
            ends = ends.to(input.device, non_blocking=True)
            return Rows(len(sizes), sizes[0], 0, 1, reverse, starts, sizes, ends, None)
        batch, steps = (0, 1) if batch_first else (1, 0)
        batch, steps = input.shape[batch], input.shape[steps]
        t_stride, b_stride = (1, steps) if batch_first else (batch, 1)
        if lengths is not None:
            lengths = row_lengths("lstm", lengths, input.device, steps)
        if reset is not None:
            reset = reset.contiguous().view(torch.uint8)
        return Rows(steps, batch, t_stride, b_stride, reverse, None, None, lengths, reset)

    def order(self) -> range:
        """Time steps in the order of computation."""
        return range(self.steps - 1, -1, -1) if self.reverse else range(self.steps)

    def start(self, t: int) -> int:
        return t * self.t_stride if self.starts is None else self.starts[t]

    def size(self, t: int) -> int:
        return self.batch if self.sizes is None else self.sizes[t]

    def at(self, a: Tensor, t: int) -> Tensor:
        """Step t of a [rows, width], as a view [size(t), width]."""
        start = self.start(t)
        return a[start : start + self.size(t) * self.b_stride : self.b_stride]

    def first_rows(self, device: torch.device) -> Tensor:
        """[B] the row of each batch element's first computed step (any row if it has none)."""
        b = torch.arange(self.batch, device=device)
        if not self.reverse or self.lengths is None:
            return self.start(self.order()[0]) + b * self.b_stride
        t = (self.lengths - 1).clamp_min(0)
        offsets = self.offsets(device)
        return (t * self.t_stride if offsets is None else offsets[t]) + b * self.b_stride

    def offsets(self, device: torch.device) -> Tensor | None:
        if self.starts is None:
            return None
        return torch.tensor(self.starts, dtype=torch.int64).to(device, non_blocking=True)

    def without_padding(self, input: Tensor) -> Tensor:
        """The input with zeros beyond `lengths`: dz is 0 there, but 0 * NaN is not."""
        if self.lengths is None or self.starts is not None:
            return input
        time = torch.arange(self.steps, device=input.device)
        ended = time[:, None] >= self.lengths  # [T, B]
        if self.b_stride != 1:
            ended = ended.t()
        return input.masked_fill(ended.reshape(*input.shape[:-1], 1), 0)  # T 1: either order

    def listed(self) -> tuple[Any, ...]:
        """What the loops in C++ take."""
        times = range(self.steps)
        starts, sizes = [self.start(t) for t in times], [self.size(t) for t in times]
        reset = None if self.reset is None else self.reset.view(torch.bool)
        return self.lengths, reset, starts, sizes, self.b_stride, self.reverse

    def strided(self) -> tuple[Any, ...]:
        """What the kernels take that stay on the GPU over all steps."""
        reset = None if self.reset is None else self.reset.view(torch.bool)
        strides = (self.steps, self.t_stride, self.b_stride, self.reverse)
        return self.lengths, reset, *strides

    def packed_or_strided(self, device: torch.device) -> tuple[Any, ...]:
        """What the cluster kernels take."""
        lengths, reset, *strides = self.strided()
        return lengths, reset, self.offsets(device), *strides

    def arguments(self) -> dict[str, Any]:
        """What every kernel of the sequence takes."""
        return {
            "lengths_ptr": self.lengths,
            "reset_ptr": self.reset,
            "steps": self.steps,
            "t_stride": self.t_stride,
            "b_stride": self.b_stride,
            "reverse": int(self.reverse),
        }


def lstm_cell(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    return_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`seqmem::lstm_cell` on GPU: one or two GEMMs, then everything else in one kernel."""
    torch.ops.seqmem.check_lstm_cell(
        input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, return_gates
    )
    batch, hidden = input.shape[0], weight_hh.shape[1]
    hy = input.new_empty(batch, hidden)
    cy = torch.empty_like(hy)
    with torch.cuda.device_of(input):
        z = torch.mm(input, weight_ih.t())  # [B, 4H]
        if hx is not None:
            z.addmm_(hx, weight_hh.t())
        _launch_step(
            lstm_step.lstm_forward_step,
            batch,
            hidden,
            z_ptr=z,
            bias_ih_ptr=_dense(bias_ih),
            bias_hh_ptr=_dense(bias_hh),
            c_in_ptr=_dense(cx),
            c_out_ptr=cy,
            h_out_ptr=hy,
            output_ptr=None,
            gates_ptr=z if return_gates else None,
            cells_ptr=None,
            PROJECTED=False,
            ACC=accumulator(input.dtype),
            **_ONLY_STEP,
        )
    return hy, cy, z if return_gates else input.new_empty(0)


def lstm_cell_backward(
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    grad_gates: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    gates: Tensor,
    cy: Tensor,
    has_bias: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`seqmem::lstm_cell_backward` on GPU: one kernel to dz, then a GEMM per gradient."""
    torch.ops.seqmem.check_lstm_cell_backward(
        grad_hy, grad_cy, grad_gates, input, hx, cx, weight_ih, weight_hh, gates, cy, has_bias,
        output_mask,
    )  # fmt: skip
    batch, hidden = cy.shape
    of_input, of_state, of_weights = output_mask
    with torch.cuda.device_of(input):
        dz = torch.empty_like(gates, memory_format=torch.contiguous_format)
        grad_cx = input.new_empty(batch, hidden) if of_state else None
        _launch_step(
            lstm_step.lstm_backward_step,
            batch,
            hidden,
            grad_output_ptr=None,
            grad_hy_ptr=_dense(grad_hy),
            from_next_ptr=None,
            d_c_in_ptr=_dense(grad_cy),
            d_c_out_ptr=grad_cx,
            grad_gates_ptr=_dense(grad_gates),
            grad_cells_ptr=None,
            cx_ptr=_dense(cx),
            gates_ptr=_dense(gates),
            cells_ptr=_dense(cy),
            dz_ptr=dz,
            prev_row0=0,
            PROJECTED=False,
            ACC=accumulator(input.dtype),
            **_ONLY_STEP,
        )
        none = input.new_empty(0)
        return (
            dz @ weight_ih if of_input else none,
            dz @ weight_hh if of_state else none,
            none if grad_cx is None else grad_cx,
            dz.t() @ input if of_weights else none,
            _grad_weight_hh(dz, hx, weight_hh) if of_weights else none,
            dz.sum(0) if of_weights and has_bias else none,
        )


def lstm(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    batch_first: bool,
    reverse: bool,
    return_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`seqmem::lstm` on GPU."""
    torch.ops.seqmem.check_lstm(
        input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, reset,
        batch_sizes, batch_first, reverse, return_gates,
    )  # fmt: skip
    rows = Rows.of(input, lengths, reset, batch_sizes, batch_first, reverse)
    hidden, width = weight_hh.shape[0] // 4, weight_hh.shape[1]
    lead = input.shape[:-1]
    hx, cx = _dense(hx), _dense(cx)
    biases = (_dense(bias_ih), _dense(bias_hh))
    with torch.cuda.device_of(input):
        z = torch.mm(input.flatten(0, -2), weight_ih.t())  # [rows, 4H]; becomes the gates
        output = input.new_empty(z.shape[0], width)
        cells = input.new_empty(z.shape[0], hidden) if return_gates else None
        saved = (output, z if return_gates else None, cells)
        plan, tile = _route(rows, weight_hh, weight_hr, backward=False)
        if plan is not None:
            hy, cy = _forward_on_chip(plan, rows, z, weight_hh, biases, hx, cx, saved)
        elif tile > 0:
            hy, cy = _forward_in_clusters(tile, rows, z, weight_hh, biases, hx, cx, saved)
        else:
            hy, cy = _forward_by_step(rows, z, weight_hh, weight_hr, biases, hx, cx, saved)
    if cells is None:
        return output.view(*lead, width), hy, cy, input.new_empty(0), input.new_empty(0)
    return output.view(*lead, width), hy, cy, z.view(*lead, 4 * hidden), cells.view(*lead, hidden)


def _route(
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


def _forward_on_chip(
    plan: OnChipPlan,
    rows: Rows,
    z: Tensor,
    weight_hh: Tensor,
    biases: tuple[Tensor | None, Tensor | None],
    hx: Tensor | None,
    cx: Tensor | None,
    saved: tuple[Tensor, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    output, gates, cells = saved
    hidden = weight_hh.shape[1]
    hy = z.new_empty(rows.batch, hidden)
    cy = torch.empty_like(hy)
    # [k, n, gate]: see the kernel's file for why.
    w = weight_hh if plan.dot else weight_hh.float().view(4, hidden, hidden).permute(2, 1, 0)
    _launch_on_chip(
        lstm_on_chip.lstm_forward_on_chip,
        plan,
        rows,
        hidden,
        z_ptr=z,
        w_ptr=w.contiguous(),
        bias_ih_ptr=biases[0],
        bias_hh_ptr=biases[1],
        hx_ptr=hx,
        cx_ptr=cx,
        offsets_ptr=rows.offsets(z.device),
        output_ptr=output,
        hy_ptr=hy,
        cy_ptr=cy,
        gates_ptr=gates,
        cells_ptr=cells,
    )
    return hy, cy


def _stays_resident(rows: Rows, like: Tensor, weight_hr: Tensor | None, hidden: int) -> bool:
    """Whether lstm_persistent_kernel.cu serves: no projection, not packed."""
    if not (_PERSISTENT and like.is_cuda and weight_hr is None and rows.starts is None):
        return False
    return bool(torch.ops.seqmem.lstm_persistent_serves(like, rows.batch, hidden))


def _forward_in_clusters(
    tile: int,
    rows: Rows,
    z: Tensor,
    weight_hh: Tensor,
    biases: tuple[Tensor | None, Tensor | None],
    hx: Tensor | None,
    cx: Tensor | None,
    saved: tuple[Tensor, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    output, gates, cells = saved
    hy = z.new_empty(rows.batch, weight_hh.shape[1])
    cy = torch.empty_like(hy)
    torch.ops.seqmem.lstm_forward_cluster_(
        z, output, hy, cy, cells, gates is not None, weight_hh.contiguous(), *biases, hx, cx, tile,
        *rows.packed_or_strided(z.device),
    )  # fmt: skip
    return hy, cy


def _forward_by_step(
    rows: Rows,
    z: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    hx: Tensor | None,
    cx: Tensor | None,
    saved: tuple[Tensor, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    output, gates, cells = saved
    batch, hidden, width = rows.batch, weight_hh.shape[0] // 4, weight_hh.shape[1]
    acc = torch.float64 if z.dtype == torch.float64 else torch.float32
    h = z.new_zeros(batch, width) if hx is None else hx.clone()
    c = z.new_zeros(batch, hidden, dtype=acc) if cx is None else cx.to(acc, copy=True)
    if rows.reset is not None and not rows.reverse:
        cut = rows.at(rows.reset.view(-1, 1), 0) != 0
        if rows.lengths is not None:
            cut = cut & (rows.lengths > 0)[:, None]
        h.masked_fill_(cut, 0)
        c.masked_fill_(cut, 0)
    if _stays_resident(rows, z, weight_hr, hidden):
        torch.ops.seqmem.lstm_forward_persistent_(
            z, h, c, output, cells, gates is not None, hx is None, weight_hh.contiguous(), *biases,
            *rows.strided(),
        )  # fmt: skip
        return h, c.to(z.dtype)
    if _CPP_STEPS and z.is_cuda and weight_hr is None:
        torch.ops.seqmem.lstm_forward_steps_(
            z, h, c, output, cells, gates is not None, hx is None, weight_hh, *biases,
            *rows.listed(),
        )  # fmt: skip
        return h, c.to(z.dtype)
    full = h if weight_hr is None else z.new_empty(batch, hidden)
    common = rows.arguments()
    if rows.starts is not None:  # every row of a packed step is active
        common["lengths_ptr"] = None
    for count, t in enumerate(rows.order()):
        size = rows.size(t)
        if count > 0 or hx is not None:
            rows.at(z, t).addmm_(h[:size], weight_hh.t())
        where = {**common, "t": t, "row0": rows.start(t)}
        _launch_step(
            lstm_step.lstm_forward_step,
            size,
            hidden,
            z_ptr=z,
            bias_ih_ptr=biases[0],
            bias_hh_ptr=biases[1],
            c_in_ptr=c,
            c_out_ptr=c,
            h_out_ptr=full,
            output_ptr=output if weight_hr is None else None,
            gates_ptr=gates,
            cells_ptr=cells,
            PROJECTED=weight_hr is not None,
            ACC=accumulator(z.dtype),
            **where,
        )
        if weight_hr is not None:
            _launch_step(
                lstm_step.lstm_store_projected,
                size,
                width,
                p_ptr=torch.mm(full[:size], weight_hr.t()),
                h_out_ptr=h,
                output_ptr=output,
                **where,
            )
    return h, c.to(z.dtype)


def lstm_backward(
    grad_output: Tensor | None,
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    grad_gates: Tensor | None,
    grad_cells: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    has_bias: bool,
    batch_first: bool,
    reverse: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`seqmem::lstm_backward` on GPU: dz of every step, then a GEMM per gradient."""
    torch.ops.seqmem.check_lstm_backward(
        grad_output, grad_hy, grad_cy, grad_gates, grad_cells, input, hx, cx, weight_ih, weight_hh,
        weight_hr, lengths, reset, batch_sizes, output, gates, cells, has_bias, batch_first,
        reverse, output_mask,
    )  # fmt: skip
    rows = Rows.of(input, lengths, reset, batch_sizes, batch_first, reverse)
    of_input, of_state, of_weights = output_mask
    hidden = weight_hh.shape[0] // 4
    hx, cx = _dense(hx), _dense(cx)
    output, gates, cells = (_flat(a) for a in (output, gates, cells))
    grads = Grads(
        _flat(grad_output),
        _dense(grad_hy),
        _dense(grad_cy),
        _flat(grad_gates),
        _flat(grad_cells),
    )
    with torch.cuda.device_of(input):
        dz = torch.empty_like(gates)
        plan, tile = _route(rows, weight_hh, weight_hr, backward=True)
        grad_p = None
        if plan is not None:
            grad_hx, grad_cx = _backward_on_chip(
                plan, rows, grads, weight_hh, cx, gates, cells, dz, of_state
            )
        elif tile > 0:
            grad_hx, grad_cx = _backward_in_clusters(
                tile, rows, grads, weight_hh, cx, gates, cells, dz, of_state
            )
        else:
            grad_hx, grad_cx, grad_p = _backward_by_step(
                rows, grads, weight_hh, weight_hr, cx, gates, cells, dz, of_state
            )
        none = input.new_empty(0)
        grad_weight_hh = grad_weight_hr = none
        if of_weights:
            entering = torch.empty_like(output)
            _launch_entering(rows, hx, output, entering)
            grad_weight_hh = dz.t() @ entering
        if of_weights and grad_p is not None:
            full = gates[:, 3 * hidden :] * cells.to(wide(cells.dtype)).tanh()  # [rows, H]
            grad_weight_hr = grad_p.t() @ full.to(gates.dtype)
        return (
            (dz @ weight_ih).view(input.shape) if of_input else none,
            none if grad_hx is None else grad_hx,
            none if grad_cx is None else grad_cx,
            dz.t() @ rows.without_padding(input).flatten(0, -2) if of_weights else none,
            grad_weight_hh,
            dz.sum(0) if of_weights and has_bias else none,
            grad_weight_hr,
        )


def _backward_on_chip(
    plan: OnChipPlan,
    rows: Rows,
    grads: Grads,
    weight_hh: Tensor,
    cx: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    dz: Tensor,
    of_state: bool,
) -> tuple[Tensor | None, Tensor | None]:
    hidden = weight_hh.shape[1]
    grad_hx = dz.new_empty(rows.batch, hidden) if of_state else None
    grad_cx = dz.new_empty(rows.batch, hidden) if of_state else None
    # [n, gate, k]: see the kernel's file for why.
    w = weight_hh if plan.dot else weight_hh.float().view(4, hidden, hidden).permute(1, 0, 2)
    _launch_on_chip(
        lstm_on_chip.lstm_backward_on_chip,
        plan,
        rows,
        hidden,
        grad_output_ptr=grads.output,
        grad_hy_ptr=grads.hy,
        grad_cy_ptr=grads.cy,
        grad_gates_ptr=grads.gates,
        grad_cells_ptr=grads.cells,
        w_ptr=w.contiguous(),
        cx_ptr=cx,
        gates_ptr=gates,
        cells_ptr=cells,
        offsets_ptr=rows.offsets(dz.device),
        dz_ptr=dz,
        grad_hx_ptr=grad_hx,
        grad_cx_ptr=grad_cx,
    )
    return grad_hx, grad_cx


def _backward_in_clusters(
    tile: int,
    rows: Rows,
    grads: Grads,
    weight_hh: Tensor,
    cx: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    dz: Tensor,
    of_state: bool,
) -> tuple[Tensor | None, Tensor | None]:
    grad_hx = dz.new_empty(rows.batch, weight_hh.shape[1]) if of_state else None
    grad_cx = None if grad_hx is None else torch.empty_like(grad_hx)
    torch.ops.seqmem.lstm_backward_cluster_(
        dz, grad_hx, grad_cx, *grads, weight_hh.contiguous(), cx, gates, cells, rows.batch, tile,
        *rows.packed_or_strided(dz.device),
    )  # fmt: skip
    return grad_hx, grad_cx


def _backward_by_step(
    rows: Rows,
    grads: Grads,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    cx: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    dz: Tensor,
    of_state: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    batch, hidden, width = rows.batch, weight_hh.shape[0] // 4, weight_hh.shape[1]
    d_c = dz.new_zeros(batch, hidden, dtype=wide(dz.dtype))
    if grads.cy is not None:
        d_c.copy_(grads.cy)
    grad_p = None if weight_hr is None else dz.new_empty(dz.shape[0], width)
    if _stays_resident(rows, dz, weight_hr, hidden):
        torch.ops.seqmem.lstm_backward_persistent_(
            dz, d_c, grads.output, grads.hy, grads.gates, grads.cells, weight_hh.contiguous(), cx,
            gates, cells, *rows.strided(),
        )  # fmt: skip
    elif _CPP_STEPS and dz.is_cuda and weight_hr is None:
        torch.ops.seqmem.lstm_backward_steps_(
            dz, d_c, grads.output, grads.hy, grads.gates, grads.cells, weight_hh, cx, gates, cells,
            *rows.listed(),
        )  # fmt: skip
    else:
        _step_back(rows, grads, weight_hh, weight_hr, cx, gates, cells, dz, d_c, grad_p)
    if not of_state:
        return None, None, grad_p
    grad_hx = dz[rows.first_rows(dz.device)] @ weight_hh
    if rows.reset is not None and not rows.reverse:
        grad_hx.masked_fill_(rows.at(rows.reset.view(-1, 1), 0) != 0, 0)
    if rows.lengths is not None:
        kept = torch.zeros_like(grad_hx) if grads.hy is None else grads.hy
        grad_hx = torch.where((rows.lengths == 0)[:, None], kept, grad_hx)
    return grad_hx, d_c.to(dz.dtype), grad_p


def _step_back(
    rows: Rows,
    grads: Grads,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    cx: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    dz: Tensor,
    d_c: Tensor,
    grad_p: Tensor | None,
) -> None:
    """The loop back over time: fills dz and grad_p, and takes d_c from cy to cx."""
    batch, hidden, width = rows.batch, weight_hh.shape[0] // 4, weight_hh.shape[1]
    from_next = dz.new_empty(batch, width)
    full = from_next if weight_hr is None else dz.new_empty(batch, hidden)
    common = rows.arguments()
    order = rows.order()[::-1]
    for count, t in enumerate(order):
        size = rows.size(t)
        if count > 0:  # rows whose last step t is take grad_hy instead
            after = rows.at(dz, order[count - 1])
            torch.mm(after[:size], weight_hh, out=from_next[: min(size, after.shape[0])])
        where = {**common, "t": t, "row0": rows.start(t)}
        if weight_hr is not None and grad_p is not None:
            _launch_step(
                lstm_step.lstm_gather_grad_projected,
                size,
                width,
                grad_output_ptr=grads.output,
                grad_hy_ptr=grads.hy,
                from_next_ptr=from_next,
                dp_ptr=grad_p,
                ACC=accumulator(dz.dtype),
                **where,
            )
            torch.mm(rows.at(grad_p, t), weight_hr, out=full[:size])
        _launch_step(
            lstm_step.lstm_backward_step,
            size,
            hidden,
            grad_output_ptr=grads.output,
            grad_hy_ptr=grads.hy,
            from_next_ptr=full,
            d_c_in_ptr=d_c,
            d_c_out_ptr=d_c,
            grad_gates_ptr=grads.gates,
            grad_cells_ptr=grads.cells,
            cx_ptr=cx,
            gates_ptr=gates,
            cells_ptr=cells,
            dz_ptr=dz,
            prev_row0=rows.start(order[count + 1]) if count + 1 < rows.steps else 0,
            PROJECTED=weight_hr is not None,
            ACC=accumulator(dz.dtype),
            **where,
        )


def _launch_step(kernel: Any, batch: int, width: int, **arguments: Any) -> None:
    """Run a pointwise kernel over [batch, width]."""
    if batch == 0:
        return
    block_h = min(triton.next_power_of_2(width), 128)
    block_b = _TILE // block_h
    grid = (triton.cdiv(batch, block_b), triton.cdiv(width, block_h))
    kernel[grid](
        batch=batch, width=width, BLOCK_B=block_b, BLOCK_H=block_h, num_warps=4, **arguments
    )


def _launch_entering(rows: Rows, hx: Tensor | None, output: Tensor, entering: Tensor) -> None:
    width = output.shape[1]
    block_h = min(triton.next_power_of_2(width), 128)
    block_b = _TILE // block_h
    blocks = triton.cdiv(rows.batch, block_b)
    if blocks == 0:
        return
    lstm_step.lstm_entering_state[(blocks * rows.steps, triton.cdiv(width, block_h))](
        hx_ptr=hx,
        output_ptr=output,
        offsets_ptr=rows.offsets(output.device),
        entering_ptr=entering,
        batch=rows.batch,
        blocks=blocks,
        width=width,
        BLOCK_B=block_b,
        BLOCK_H=block_h,
        num_warps=4,
        **rows.arguments(),
    )


def _launch_on_chip(
    kernel: Any, plan: OnChipPlan, rows: Rows, hidden: int, **arguments: Any
) -> None:
    if rows.batch == 0:
        return
    kernel[(triton.cdiv(rows.batch, plan.block_b),)](
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


def _grad_weight_hh(dz: Tensor, hx: Tensor | None, weight_hh: Tensor) -> Tensor:
    if hx is None:  # it multiplied zeros
        return torch.zeros_like(weight_hh, memory_format=torch.contiguous_format)
    return dz.t() @ hx


def _dense(a: Tensor | None) -> Tensor | None:
    return None if a is None else a.contiguous()


def _flat(a: Tensor | None) -> Any:
    return None if a is None else a.contiguous().flatten(0, -2)
