"""The backward of a whole sequence down to dz, the gradient of the pre-activations, by each route.

See lstm.py for what the routes are and when each is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import lstm_on_chip, lstm_step
from .common import accumulator, wide
from .lstm_routes import OnChipPlan, launch_on_chip, stays_resident, steps_in_cpp
from .lstm_rows import Rows, launch_step

StateGrads = tuple[Tensor | None, Tensor | None]


class Grads(NamedTuple):
    """Gradients of the sequence's outputs."""

    grad_output: Tensor | None
    grad_hy: Tensor | None
    grad_cy: Tensor | None
    grad_gates: Tensor | None
    grad_cells: Tensor | None


@dataclass(frozen=True)
class Backward:
    """What the routes take; each fills dz and returns the gradients of hx and cx where asked to."""

    rows: Rows
    grads: Grads
    weight_hh: Tensor  # [4H, P]
    weight_hr: Tensor | None  # [P, H]
    cx: Tensor | None  # [B, H]
    gates: Tensor  # [rows, 4H]
    cells: Tensor  # [rows, H]
    dz: Tensor  # [rows, 4H], filled
    grad_p: Tensor | None  # [rows, P], filled: the gradient of the projected h

    def on_chip(self, plan: OnChipPlan, of_state: bool) -> StateGrads:
        grad_hx, grad_cx = self._state_grads(of_state)
        hidden = self.weight_hh.shape[1]
        w = self.weight_hh
        if not plan.dot:  # [n, gate, k]: see the kernel's file for why
            w = w.float().view(4, hidden, hidden).permute(1, 0, 2)
        launch_on_chip(
            lstm_on_chip.lstm_backward_on_chip,
            plan,
            self.rows,
            hidden,
            **self._pointers(),
            grad_cy_ptr=self.grads.grad_cy,
            w_ptr=w.contiguous(),
            offsets_ptr=self.rows.offsets(self.dz.device),
            grad_hx_ptr=grad_hx,
            grad_cx_ptr=grad_cx,
        )
        return grad_hx, grad_cx

    def in_clusters(self, tile: int, of_state: bool) -> StateGrads:
        grad_hx, grad_cx = self._state_grads(of_state)
        torch.ops.seqmem.lstm_backward_cluster_(
            self.dz, grad_hx, grad_cx, *self.grads, self.weight_hh.contiguous(), self.cx,
            self.gates, self.cells, self.rows.batch, tile,
            *self.rows.packed_or_strided(self.dz.device),
        )  # fmt: skip
        return grad_hx, grad_cx

    def _state_grads(self, wanted: bool) -> StateGrads:
        if not wanted:
            return None, None
        grad_hx = self.dz.new_empty(self.rows.batch, self.weight_hh.shape[1])
        return grad_hx, torch.empty_like(grad_hx)

    def by_step(self, of_state: bool) -> StateGrads:
        """Resident on the GPU where that serves, else a GEMM and a kernel a step."""
        rows, grads, dz, weight_hh = self.rows, self.grads, self.dz, self.weight_hh
        d_c = dz.new_zeros(rows.batch, weight_hh.shape[0] // 4, dtype=wide(dz.dtype))
        if grads.grad_cy is not None:
            d_c.copy_(grads.grad_cy)
        of_steps = dz, d_c, grads.grad_output, grads.grad_hy, grads.grad_gates, grads.grad_cells
        saved = self.cx, self.gates, self.cells
        if stays_resident(rows, weight_hh, self.weight_hr):
            torch.ops.seqmem.lstm_backward_persistent_(
                *of_steps, weight_hh.contiguous(), *saved, *rows.strided()
            )
        elif steps_in_cpp(weight_hh, self.weight_hr):
            torch.ops.seqmem.lstm_backward_steps_(*of_steps, weight_hh, *saved, *rows.listed())
        else:
            self._each_step(d_c)
        if not of_state:
            return None, None
        grad_hx = dz[rows.first_rows(dz.device)] @ weight_hh
        if rows.reset is not None and not rows.reverse:
            grad_hx.masked_fill_(rows.at(rows.reset.view(-1, 1), 0) != 0, 0)
        if rows.lengths is not None:
            kept = torch.zeros_like(grad_hx) if grads.grad_hy is None else grads.grad_hy
            grad_hx = torch.where((rows.lengths == 0)[:, None], kept, grad_hx)
        return grad_hx, d_c.to(dz.dtype)

    def _each_step(self, d_c: Tensor) -> None:
        """The loop back over time in Python: fills dz and grad_p, and takes d_c from cy to cx."""
        rows, grads, dz, weight_hr = self.rows, self.grads, self.dz, self.weight_hr
        hidden, width = self.weight_hh.shape[0] // 4, self.weight_hh.shape[1]
        from_next = dz.new_empty(rows.batch, width)
        full = from_next if weight_hr is None else dz.new_empty(rows.batch, hidden)
        order = rows.order()[::-1]
        for count, t in enumerate(order):
            size = rows.size(t)
            if count > 0:  # rows whose last step is t take grad_hy instead
                after = rows.at(dz, order[count - 1])
                torch.mm(after[:size], self.weight_hh, out=from_next[: min(size, after.shape[0])])
            common = {**rows.at_step(t), "ACC": accumulator(dz.dtype)}
            if weight_hr is not None and self.grad_p is not None:
                launch_step(
                    lstm_step.lstm_gather_grad_projected,
                    size,
                    width,
                    grad_output_ptr=grads.grad_output,
                    grad_hy_ptr=grads.grad_hy,
                    from_next_ptr=from_next,
                    dp_ptr=self.grad_p,
                    **common,
                )
                torch.mm(rows.at(self.grad_p, t), weight_hr, out=full[:size])
            launch_step(
                lstm_step.lstm_backward_step,
                size,
                hidden,
                from_next_ptr=full,
                d_c_in_ptr=d_c,
                d_c_out_ptr=d_c,
                prev_row0=rows.start(order[count + 1]) if count + 1 < rows.steps else 0,
                PROJECTED=weight_hr is not None,
                **self._pointers(),
                **common,
            )

    def _pointers(self) -> dict[str, Any]:
        """What the kernel of all steps and that of one step have in common."""
        return {
            "grad_output_ptr": self.grads.grad_output,
            "grad_hy_ptr": self.grads.grad_hy,
            "grad_gates_ptr": self.grads.grad_gates,
            "grad_cells_ptr": self.grads.grad_cells,
            "cx_ptr": self.cx,
            "gates_ptr": self.gates,
            "cells_ptr": self.cells,
            "dz_ptr": self.dz,
        }

    def grad_weight_hr(self) -> Tensor:
        """[P, H], from the gradient and the argument of every step's projection."""
        hidden = self.cells.shape[1]
        full = self.gates[:, 3 * hidden :] * self.cells.to(wide(self.cells.dtype)).tanh()
        assert self.grad_p is not None
        return self.grad_p.t() @ full.to(self.gates.dtype)
