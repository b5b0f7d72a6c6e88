"""The forward of a whole sequence from the input's part of the pre-activations on, by each route.

See lstm.py for what the routes are and when each is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import lstm_on_chip, lstm_step
from .common import accumulator, wide
from .lstm_routes import OnChipPlan, launch_on_chip, stays_resident, steps_in_cpp
from .lstm_rows import Rows, launch_step


@dataclass(frozen=True)
class Forward:
    """What the routes take; each returns hy [B, P] and cy [B, H]."""

    rows: Rows
    weight_hh: Tensor  # [4H, P]
    weight_hr: Tensor | None  # [P, H]
    biases: tuple[Tensor | None, Tensor | None]  # [4H] each
    hx: Tensor | None  # [B, P]
    cx: Tensor | None  # [B, H]
    z: Tensor  # [rows, 4H] W_ih x; becomes the gates where cells are kept
    output: Tensor  # [rows, P], filled
    cells: Tensor | None  # [rows, H], filled; None where gates and cells are not kept

    @property
    def gates(self) -> Tensor | None:
        return None if self.cells is None else self.z

    def on_chip(self, plan: OnChipPlan) -> tuple[Tensor, Tensor]:
        hy, cy = self._final_state()
        hidden = self.weight_hh.shape[1]
        w = self.weight_hh
        if not plan.dot:  # [k, n, gate]: see the kernel's file for why
            w = w.float().view(4, hidden, hidden).permute(2, 1, 0)
        launch_on_chip(
            lstm_on_chip.lstm_forward_on_chip,
            plan,
            self.rows,
            hidden,
            z_ptr=self.z,
            w_ptr=w.contiguous(),
            bias_ih_ptr=self.biases[0],
            bias_hh_ptr=self.biases[1],
            hx_ptr=self.hx,
            cx_ptr=self.cx,
            offsets_ptr=self.rows.offsets(self.z.device),
            output_ptr=self.output,
            hy_ptr=hy,
            cy_ptr=cy,
            gates_ptr=self.gates,
            cells_ptr=self.cells,
        )
        return hy, cy

    def in_clusters(self, tile: int) -> tuple[Tensor, Tensor]:
        hy, cy = self._final_state()
        torch.ops.seqmem.lstm_forward_cluster_(
            self.z, self.output, hy, cy, self.cells, self.cells is not None,
            self.weight_hh.contiguous(), *self.biases, self.hx, self.cx, tile,
            *self.rows.packed_or_strided(self.z.device),
        )  # fmt: skip
        return hy, cy

    def _final_state(self) -> tuple[Tensor, Tensor]:
        hy = self.z.new_empty(self.rows.batch, self.weight_hh.shape[1])
        return hy, torch.empty_like(hy)

    def by_step(self) -> tuple[Tensor, Tensor]:
        """Resident on the GPU where that serves, else a GEMM and a kernel a step."""
        h, c = self._first_state()
        rows, weight_hh = self.rows, self.weight_hh
        given = (self.z, h, c, self.output, self.cells, self.cells is not None, self.hx is None)
        if stays_resident(rows, weight_hh, self.weight_hr):
            torch.ops.seqmem.lstm_forward_persistent_(
                *given, weight_hh.contiguous(), *self.biases, *rows.strided()
            )
        elif steps_in_cpp(weight_hh, self.weight_hr):
            torch.ops.seqmem.lstm_forward_steps_(*given, weight_hh, *self.biases, *rows.listed())
        else:
            self._each_step(h, c)
        return h, c.to(self.z.dtype)

    def _first_state(self) -> tuple[Tensor, Tensor]:
        """Copies of hx and cx, zero where the first step is reset; c is wide."""
        rows, z = self.rows, self.z
        hidden, width = self.weight_hh.shape[0] // 4, self.weight_hh.shape[1]
        acc = wide(z.dtype)
        h = z.new_zeros(rows.batch, width) if self.hx is None else self.hx.clone()
        if self.cx is None:
            c = z.new_zeros(rows.batch, hidden, dtype=acc)
        else:
            c = self.cx.to(acc, copy=True)
        if rows.reset is not None and not rows.reverse:
            cut = rows.at(rows.reset.view(-1, 1), 0) != 0
            if rows.lengths is not None:
                cut = cut & (rows.lengths > 0)[:, None]
            h.masked_fill_(cut, 0)
            c.masked_fill_(cut, 0)
        return h, c

    def _each_step(self, h: Tensor, c: Tensor) -> None:
        """The loop over time in Python; h and c go from the first state to the last."""
        rows, z, weight_hr = self.rows, self.z, self.weight_hr
        hidden, width = self.weight_hh.shape[0] // 4, self.weight_hh.shape[1]
        full = h if weight_hr is None else z.new_empty(rows.batch, hidden)
        for count, t in enumerate(rows.order()):
            size = rows.size(t)
            if count > 0 or self.hx is not None:
                rows.at(z, t).addmm_(h[:size], self.weight_hh.t())
            where = rows.at_step(t)
            if rows.starts is not None:  # every row of a packed step is active
                where["lengths_ptr"] = None
            launch_step(
                lstm_step.lstm_forward_step,
                size,
                hidden,
                z_ptr=z,
                bias_ih_ptr=self.biases[0],
                bias_hh_ptr=self.biases[1],
                c_in_ptr=c,
                c_out_ptr=c,
                h_out_ptr=full,
                output_ptr=self.output if weight_hr is None else None,
                gates_ptr=self.gates,
                cells_ptr=self.cells,
                PROJECTED=weight_hr is not None,
                ACC=accumulator(z.dtype),
                **where,
            )
            if weight_hr is not None:
                launch_step(
                    lstm_step.lstm_store_projected,
                    size,
                    width,
                    p_ptr=torch.mm(full[:size], weight_hr.t()),
                    h_out_ptr=h,
                    output_ptr=self.output,
                    **where,
                )
