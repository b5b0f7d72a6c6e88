"""GPU launchers of the LSTM with zoneout and layer normalisation.

forward     W_ih x of all steps; for each step the product W_hh h and one kernel
backward    for each step, last to first, one kernel and the product W_hh^T dv; then each weight's
            gradient is one product over all steps
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.lstm_regularized import Norms, Operands, Steps, Zoneout
from ..reference.lstm import Layout
from ..reference.lstm_regularized import EPSILON
from .common import (
    accumulator,
    dense,
    launcher,
    next_power_of_2,
    of_dropout,
    refuse_in_capture,
    wide,
)
from .lstm_backward import Grads
from .lstm_regularized_kernels import lstm_regularized_step, lstm_regularized_step_backward


def _options(x: Tensor, width: int, zoneout: Zoneout) -> dict[str, Any]:
    """What both kernels take."""
    seed, zoneout_h, zoneout_c = zoneout
    block = next_power_of_2(width)
    return {
        "seed_ptr": dense(seed),
        "batch": x.size(1),
        "width": width,
        "SHARE_H": zoneout_h,
        "SHARE_C": zoneout_c,
        "BELOW_H": of_dropout(zoneout_h, seed)["BELOW"],
        "BELOW_C": of_dropout(zoneout_c, seed)["BELOW"],
        "ACC": accumulator(x.dtype),
        "BLOCK": block,
        "num_warps": min(16, max(1, block // 128)),
    }


def _layout(input: Tensor, steps: Steps) -> tuple[Layout, Any]:
    """And for each step the rows that have it, or None."""
    if steps.batch_sizes is not None:
        refuse_in_capture(
            input.device, "seqmem::lstm_regularized: expected no batch_sizes, got a packed input"
        )
    layout = Layout(input, *steps)
    valid = None if layout.valid is None else layout.valid.to(torch.uint8).contiguous()
    return layout, [None] * len(layout.order) if valid is None else valid.unbind()


@launcher
def lstm_regularized(
    operands: Operands, norms: Norms, zoneout: Zoneout, layout_of: Steps, return_gates: bool
) -> tuple[Tensor, ...]:
    input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh = operands
    layout, valid = _layout(input, layout_of)
    x = layout.to_padded(input)
    steps, batch, hidden = x.size(0), x.size(1), weight_hh.size(1)
    exact = wide(x.dtype)
    h = x.new_zeros(batch, hidden) if hx is None else hx.clone().contiguous()
    c = x.new_zeros(batch, hidden, dtype=exact)
    if cx is not None:
        c.copy_(cx)
    given = dense(bias_ih), dense(bias_hh), *map(dense, norms)
    saves = return_gates and norms.gain_ih is not None

    products = F.linear(x, weight_ih).contiguous()
    v = x.new_empty(batch, 4 * hidden)
    output = x.new_empty(steps, batch, hidden)

    def make(wanted: bool, width: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return x.new_empty(*((steps, batch, width) if wanted else (0,)), dtype=dtype)

    traced = {
        "gates_ptr": make(return_gates, 4 * hidden),
        "cells_ptr": make(return_gates, hidden),
        "x_hat_ptr": make(saves, 4 * hidden),
        "v_hat_ptr": make(saves, 4 * hidden),
        "c_hat_ptr": make(saves, hidden),
        "scales_ptr": make(saves, 3, exact),
    }
    across = weight_hh.t()
    options = _options(x, hidden, zoneout)
    for t in layout.order:
        if layout.cut is not None:
            h, c = layout.enter(t, h), layout.enter(t, c)
        torch.mm(h, across, out=v)
        lstm_regularized_step[(batch,)](
            *(products[t], v, *given),
            valid_ptr=valid[t],
            h_ptr=h,
            c_ptr=c,
            output_ptr=output[t],
            **{name: each[t] if each.numel() else None for name, each in traced.items()},
            t=t,
            EPSILON=EPSILON,
            **options,
        )
    laid_out = (layout.from_padded(a).contiguous() if a.dim() > 1 else a for a in traced.values())
    return layout.from_padded(output).contiguous(), h, c.to(x.dtype), *laid_out


@launcher
def lstm_regularized_backward(
    grads: Grads,
    operands: Operands,
    norms: Norms,
    zoneout: Zoneout,
    steps: Steps,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    normalized_ih: Tensor | None,
    normalized_hh: Tensor | None,
    normalized_c: Tensor | None,
    scales: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh = operands
    layout, valid = _layout(input, steps)
    x, h_all, z_all, c_all = (
        layout.to_padded(a).contiguous() for a in (input, output, gates, cells)
    )
    arriving = [
        None if a is None else layout.to_padded(a).contiguous()
        for a in (grads.grad_output, grads.grad_gates, grads.grad_cells)
    ]
    batch, hidden = h_all.shape[1:]
    exact = wide(x.dtype)
    gains = [dense(t) for t in norms]
    entering_c = _entering(layout, c_all, cx)
    saved = [
        None if a is None else layout.to_padded(a).contiguous()
        for a in (normalized_ih, normalized_hh, normalized_c, scales)
    ]
    is_normalized = scales is not None
    dh, dc = (x.new_zeros(batch, hidden, dtype=exact) for _ in range(2))
    for total, grad in ((dh, grads.grad_hy), (dc, grads.grad_cy)):
        if grad is not None:
            total.copy_(grad)
    dz = torch.empty_like(z_all)
    dx, dv = (torch.empty_like(dz), torch.empty_like(dz)) if is_normalized else (dz, dz)
    dn = torch.empty_like(h_all) if is_normalized else None
    options = _options(x, hidden, zoneout)
    for t in reversed(layout.order):
        of_step = [None if a is None else a[t] for a in (*arriving, z_all, entering_c, *saved)]
        results = [None if a is None else a[t] for a in (dz, dx, dv, dn)]
        seed_ptr = options.pop("seed_ptr")
        lstm_regularized_step_backward[(batch,)](
            *(*of_step, *gains, seed_ptr, valid[t], dh, dc, *results), t=t, **options
        )
        options["seed_ptr"] = seed_ptr
        dh += dv[t] @ weight_hh
        if layout.cut is not None:
            dh, dc = layout.enter(t, dh), layout.enter(t, dc)

    of_input, of_state, of_weights = output_mask
    empty = x.new_empty(0)
    found: list[Tensor] = [empty] * 11
    if of_input:
        found[0] = layout.from_padded(dx @ weight_ih).contiguous()
    if of_state and hx is not None:
        found[1:3] = dh.to(x.dtype), dc.to(x.dtype)
    if of_weights:
        entering_h = _entering(layout, h_all, hx)
        found[3] = dx.flatten(0, 1).t() @ x.flatten(0, 1)
        found[4] = dv.flatten(0, 1).t() @ entering_h.flatten(0, 1)
        bias = dz.sum((0, 1), dtype=exact).to(x.dtype)
        found[5] = empty if bias_ih is None else bias
        found[6] = empty if bias_hh is None else bias.clone()
        pairs = ((dz, saved[0]), (dz, saved[1]), (dn, saved[2]))
        for k, (grad, normalized) in enumerate(pairs):
            if grad is not None and normalized is not None:
                found[7 + k] = (grad.to(exact) * normalized).sum((0, 1)).to(x.dtype)
        if dn is not None:
            found[10] = dn.sum((0, 1), dtype=exact).to(x.dtype)
    return tuple(found)


def _entering(layout: Layout, states: Tensor, first: Tensor | None) -> Tensor:
    """The state as each step sees it, from those that the steps left [T, B, H]."""
    start = torch.zeros_like(states[:1]) if first is None else first[None]
    before = (states[1:], start) if layout.before > 0 else (start, states[:-1])
    entered = torch.cat(before)
    if layout.before > 0 and layout.valid is not None and first is not None:
        # A row that ends early begins, backwards in time, with the first state.
        begins = layout.valid.clone()
        begins[:-1] &= ~layout.valid[1:]
        entered = torch.where(begins[..., None], start, entered)
    return entered if layout.cut is None else entered.masked_fill(layout.cut[..., None], 0)
