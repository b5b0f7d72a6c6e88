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
  capability 9.0 and newer: float32 up to H = 384 (lstm_cluster_forward_kernel.cu,
  lstm_cluster_backward_kernel.cu), 16-bit storage up to H = 512 (lstm_cluster_16_kernel.cu).
* Resident, in a CUDA build: weight_hh is shared out over all multiprocessors
  (lstm_persistent_*_kernel.cu), up to H = 1024 where 8 divides it, for up to two launches' rows.
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
from typing import Any

import torch
from torch import Tensor

from . import lstm_step
from .common import accumulator, dense, launcher
from .lstm_backward import Backward, Grads
from .lstm_forward import Forward
from .lstm_routes import route
from .lstm_rows import Ends, Layer, Rows, entering_states, launch_step

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


@launcher
def lstm_cell(
    layer: Layer, bias_ih: Tensor | None, bias_hh: Tensor | None, return_gates: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`seqmem::lstm_cell` on GPU: one or two GEMMs, then everything else in one kernel."""
    input, hx, cx, weight_ih, weight_hh = layer
    batch, hidden = input.shape[0], weight_hh.shape[1]
    hy = input.new_empty(batch, hidden)
    cy = torch.empty_like(hy)
    z = torch.mm(input, weight_ih.t())  # [B, 4H]
    if hx is not None:
        z.addmm_(hx, weight_hh.t())
    launch_step(
        lstm_step.lstm_forward_step,
        batch,
        hidden,
        z_ptr=z,
        bias_ih_ptr=dense(bias_ih),
        bias_hh_ptr=dense(bias_hh),
        c_in_ptr=dense(cx),
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


@launcher
def lstm_cell_backward(
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    grad_gates: Tensor | None,
    layer: Layer,
    gates: Tensor,
    cy: Tensor,
    has_bias: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`seqmem::lstm_cell_backward` on GPU: one kernel to dz, then a GEMM per gradient."""
    input, hx, cx, weight_ih, weight_hh = layer
    batch, hidden = cy.shape
    of_input, of_state, of_weights = output_mask
    dz = torch.empty_like(gates, memory_format=torch.contiguous_format)
    grad_cx = input.new_empty(batch, hidden) if of_state else None
    launch_step(
        lstm_step.lstm_backward_step,
        batch,
        hidden,
        grad_output_ptr=None,
        grad_hy_ptr=dense(grad_hy),
        from_next_ptr=None,
        d_c_in_ptr=dense(grad_cy),
        d_c_out_ptr=grad_cx,
        grad_gates_ptr=dense(grad_gates),
        grad_cells_ptr=None,
        cx_ptr=dense(cx),
        gates_ptr=dense(gates),
        cells_ptr=dense(cy),
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


@launcher
def lstm(
    layer: Layer,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    ends: Ends,
    batch_first: bool,
    reverse: bool,
    return_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`seqmem::lstm` on GPU."""
    input, hx, cx, weight_ih, weight_hh = layer
    lead, none = input.shape[:-1], input.new_empty(0)
    hidden, width = weight_hh.shape[0] // 4, weight_hh.shape[1]
    z = torch.mm(input.flatten(0, -2), weight_ih.t())  # [rows, 4H]; becomes the gates
    cells = z.new_empty(z.shape[0], hidden) if return_gates else None
    forward = Forward(
        Rows.of(input, ends, batch_first, reverse),
        weight_hh,
        weight_hr,
        (dense(bias_ih), dense(bias_hh)),
        dense(hx),
        dense(cx),
        z,
        z.new_empty(z.shape[0], width),
        cells,
    )
    plan, tile = route(forward.rows, weight_hh, weight_hr, backward=False)
    if plan is not None:
        hy, cy = forward.on_chip(plan)
    elif tile > 0:
        hy, cy = forward.in_clusters(tile)
    else:
        hy, cy = forward.by_step()
    output = forward.output.view(*lead, width)
    if cells is None:
        return output, hy, cy, none, none
    return output, hy, cy, z.view(*lead, 4 * hidden), cells.view(*lead, hidden)


@launcher
def lstm_backward(
    grads: Grads,
    layer: Layer,
    weight_hr: Tensor | None,
    ends: Ends,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    has_bias: bool,
    batch_first: bool,
    reverse: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`seqmem::lstm_backward` on GPU: dz of every step, then a GEMM per gradient."""
    input, hx, cx, weight_ih, weight_hh = layer
    of_input, of_state, of_weights = output_mask
    none = input.new_empty(0)
    rows = Rows.of(input, ends, batch_first, reverse)
    gates = _flat(gates)
    of_output, of_hy, of_cy, of_gates, of_cells = grads
    grads = Grads(_flat(of_output), dense(of_hy), dense(of_cy), _flat(of_gates), _flat(of_cells))
    dz = torch.empty_like(gates)
    backward = Backward(
        rows,
        grads,
        weight_hh,
        weight_hr,
        dense(cx),
        gates,
        _flat(cells),
        dz,
        None if weight_hr is None else dz.new_empty(dz.shape[0], weight_hh.shape[1]),
    )
    plan, tile = route(rows, weight_hh, weight_hr, backward=True)
    if plan is not None:
        grad_hx, grad_cx = backward.on_chip(plan, of_state)
    elif tile > 0:
        grad_hx, grad_cx = backward.in_clusters(tile, of_state)
    else:
        grad_hx, grad_cx = backward.by_step(of_state)
    return (
        (dz @ weight_ih).view(input.shape) if of_input else none,
        none if grad_hx is None else grad_hx,
        none if grad_cx is None else grad_cx,
        dz.t() @ rows.without_padding(input).flatten(0, -2) if of_weights else none,
        dz.t() @ entering_states(rows, dense(hx), _flat(output)) if of_weights else none,
        dz.sum(0) if of_weights and has_bias else none,
        backward.grad_weight_hr() if of_weights and weight_hr is not None else none,
    )


def _grad_weight_hh(dz: Tensor, hx: Tensor | None, weight_hh: Tensor) -> Tensor:
    if hx is None:  # it multiplied zeros
        return torch.zeros_like(weight_hh, memory_format=torch.contiguous_format)
    return dz.t() @ hx


def _flat(a: Tensor | None) -> Any:
    return None if a is None else a.contiguous().flatten(0, -2)
