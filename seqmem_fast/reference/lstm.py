r"""The LSTM in plain PyTorch: what ``seqmem::lstm`` computes, to be read beside the formulas.

.. math::
    (z_i, z_f, z_g, z_o) &= W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh} \\
    i = \sigma(z_i), \quad f &= \sigma(z_f), \quad g = \tanh(z_g), \quad o = \sigma(z_o) \\
    c_t &= f \odot c_{t-1} + i \odot g \\
    h_t &= W_{hr} (o \odot \tanh c_t)

where W_hr is optional.

Letters: T time, B batch, I input, H hidden, P projection (P = H without ``weight_hr``).
Hochreiter & Schmidhuber 1997; the forget gate is Gers, Schmidhuber & Cummins 2000, the projection
Sak, Senior & Beaufays 2014 (arXiv 1402.1128).

Everything here works under ``torch.func`` and any order of derivative; nothing here is fast.
Arguments are not checked: the ops do that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Draw, Sample, samples

State = tuple[Tensor, Tensor]
Grads = tuple[Tensor | None, ...]


def lstm_cell(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> State:
    """One step: input [B, I], hx and cx [B, H] -> hy and cy [B, H]."""
    if hx is None:
        hx = _zero_state(input, weight_hh, None, input.size(0))
    projected = F.linear(input, weight_ih, bias_ih)  # [B, 4H]
    hy, cy, _ = _step(projected, hx[0], hx[1], weight_hh, bias_hh, None)
    return hy, cy


def lstm(
    input: Tensor, hx: State | None, *weights: Tensor | None, **options: Any
) -> tuple[Tensor, State]:
    """One layer in one direction over a whole sequence; arguments as of :func:`lstm_trace`."""
    output, state, _, _ = lstm_trace(input, hx, *weights, **options)  # type: ignore[arg-type]
    return output, state


def lstm_trace(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    batch_first: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, State, Tensor, Tensor]:
    """As :func:`lstm`, also with gates [T, B, 4H] (i, f, g, o) and cells [T, B, H] of all steps."""
    layout = Layout(input, lengths, reset, batch_sizes, batch_first, reverse)
    x = layout.to_padded(input)  # [T, B, I]
    h, c = _zero_state(x, weight_hh, weight_hr, x.size(1)) if hx is None else hx
    projected = F.linear(x, weight_ih, bias_ih).unbind()  # T of [B, 4H]

    steps: list[tuple[Tensor, Tensor, Tensor]] = [(h, h, h)] * x.size(0)
    for t in layout.order:
        h_in, c_in = layout.enter(t, h), layout.enter(t, c)
        h_new, c_new, gates = _step(projected[t], h_in, c_in, weight_hh, bias_hh, weight_hr)
        h, c = layout.keep(t, h_new, h), layout.keep(t, c_new, c)
        zero = h_new.new_zeros(())
        steps[t] = (
            layout.keep(t, h_new, zero),
            layout.keep(t, gates, zero),
            layout.keep(t, c_new, zero),
        )
    columns = zip(*steps, strict=True)
    output, gates, cells = (layout.from_padded(torch.stack(column)) for column in columns)
    return output, (h, c), gates, cells


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
) -> Grads:
    """Gradients of input, hx, cx, weight_ih, weight_hh and of either bias, from its gates."""
    h_in = torch.zeros_like(cy) if hx is None else hx
    c_in = torch.zeros_like(cy) if cx is None else cx
    grad_h = torch.zeros_like(cy) if grad_hy is None else grad_hy
    grad_c = torch.zeros_like(cy) if grad_cy is None else grad_cy
    grad_z, grad_cx = _step_backward(gates, cy, c_in, grad_h, grad_c, grad_gates)  # [B, 4H], [B, H]
    return (
        grad_z @ weight_ih,
        grad_z @ weight_hh,
        grad_cx,
        grad_z.t() @ input,
        grad_z.t() @ h_in,
        grad_z.sum(0),
    )


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
    batch_first: bool = False,
    reverse: bool = False,
) -> Grads:
    """Backpropagation through time as an explicit function of all its arguments.

    Gradients of input, hx, cx, weight_ih, weight_hh, of either bias, and of weight_hr (None without
    it).
    It reads ``output``, ``gates`` and ``cells`` instead of recomputing them, so differentiating it
    gives gradients for these too, which then continue through the forward op.
    """
    layout = Layout(input, lengths, reset, batch_sizes, batch_first, reverse)
    x, h_all, z_all, c_all = (layout.to_padded(a) for a in (input, output, gates, cells))
    hs, zs, cs = h_all.unbind(), z_all.unbind(), c_all.unbind()
    grad_hs, grad_zs, grad_cs = (
        None if a is None else layout.to_padded(a).unbind()
        for a in (grad_output, grad_gates, grad_cells)
    )
    steps, batch = x.size(0), x.size(1)
    h0, c0 = _zero_state(x, weight_hh, weight_hr, batch)
    h0, c0 = h0 if hx is None else hx, c0 if cx is None else cx
    grad_h = torch.zeros_like(h0) if grad_hy is None else grad_hy
    grad_c = torch.zeros_like(c0) if grad_cy is None else grad_cy

    entered: list[Tensor] = [h0] * steps
    projected: list[Tensor] = [h0] * steps
    grad_z_steps: list[Tensor] = [zs[0]] * steps
    for t in reversed(layout.order):
        entered[t] = layout.enter(t, layout.previous(t, hs, h0))  # [B, P]
        c_in = layout.enter(t, layout.previous(t, cs, c0))  # [B, H]
        dh = grad_h if grad_hs is None else grad_h + grad_hs[t]
        dc = grad_c if grad_cs is None else grad_c + grad_cs[t]
        if weight_hr is not None:
            projected[t] = layout.keep(t, dh, torch.zeros_like(dh))
            dh = dh @ weight_hr
        dgates = None if grad_zs is None else grad_zs[t]
        dz, dc = _step_backward(zs[t], cs[t], c_in, dh, dc, dgates)
        dz = grad_z_steps[t] = layout.keep(t, dz, torch.zeros_like(dz))
        grad_h = layout.keep(t, layout.enter(t, dz @ weight_hh), grad_h)
        grad_c = layout.keep(t, layout.enter(t, dc), grad_c)

    grad_z = torch.stack(grad_z_steps)  # [T, B, 4H]
    flat = grad_z.flatten(0, 1).t()  # [4H, T * B]
    grad_hr = None
    if weight_hr is not None:
        unprojected = z_all.chunk(4, -1)[3] * torch.tanh(c_all)  # [T, B, H]
        grad_hr = torch.stack(projected).flatten(0, 1).t() @ unprojected.flatten(0, 1)
    return (
        layout.from_padded(grad_z @ weight_ih),
        grad_h,
        grad_c,
        flat @ x.flatten(0, 1),
        flat @ torch.stack(entered).flatten(0, 1),
        flat.sum(1),
        grad_hr,
    )


def _zero_state(x: Tensor, weight_hh: Tensor, weight_hr: Tensor | None, batch: int) -> State:
    hidden = weight_hh.size(0) // 4
    width = hidden if weight_hr is None else weight_hr.size(0)
    return x.new_zeros(batch, width), x.new_zeros(batch, hidden)


def _step(
    projected: Tensor,
    h: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From W_ih x + b_ih [B, 4H] and the state: h_t [B, P], c_t [B, H] and gates [B, 4H]."""
    z_i, z_f, z_g, z_o = (projected + F.linear(h, weight_hh, bias_hh)).chunk(4, -1)
    i, f, g, o = torch.sigmoid(z_i), torch.sigmoid(z_f), torch.tanh(z_g), torch.sigmoid(z_o)
    c = f * c + i * g
    h = o * torch.tanh(c)
    if weight_hr is not None:
        h = F.linear(h, weight_hr)
    return h, c, torch.cat((i, f, g, o), -1)


def _step_backward(
    gates: Tensor, c: Tensor, c_in: Tensor, dh: Tensor, dc: Tensor, dgates: Tensor | None
) -> State:
    """Gradients of the pre-activations z [B, 4H] and of the cell state that entered [B, H]."""
    i, f, g, o = gates.chunk(4, -1)
    tanh_c = torch.tanh(c)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    da = torch.cat((dc * g, dc * c_in, dc * i, dh * tanh_c), -1)  # by the activated gates
    if dgates is not None:
        da = da + dgates
    slope = torch.cat((i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)), -1)
    return da * slope, dc * f


class Layout:
    """Hides packing, batch_first, lengths, reset and direction from the loops over time."""

    def __init__(
        self,
        input: Tensor,
        lengths: Tensor | None,
        reset: Tensor | None,
        batch_sizes: Tensor | None,
        batch_first: bool,
        reverse: bool,
    ) -> None:
        self.batch_first = batch_first
        self.packed = batch_sizes is not None
        self.valid: Tensor | None = None  # [T, B]: step t exists in row b
        self.cut: Tensor | None = None  # [T, B]: the state entering step t is zeroed
        if batch_sizes is not None:
            sizes = batch_sizes.to(input.device)
            column = torch.arange(int(batch_sizes[0]), device=input.device)
            self.valid = column < sizes[:, None]
            rows = (sizes.cumsum(0) - sizes)[:, None] + column  # where (t, b) is in packed data
            self.rows = torch.where(self.valid, rows, 0)
            self.steps, self.columns = self.valid.nonzero(as_tuple=True)
        time = len(batch_sizes) if batch_sizes is not None else input.size(1 if batch_first else 0)
        if lengths is not None:
            step = torch.arange(time, device=input.device)
            self.valid = step[:, None] < lengths.to(input.device)
        if reset is not None:
            cut = reset.t() if batch_first else reset
            if self.valid is not None:
                cut = cut & self.valid
            if (
                reverse
            ):  # what enters step t comes from step t + 1, if that exists, and is cut there
                cut = torch.cat((cut[1:], torch.zeros_like(cut[:1])))
            self.cut = cut
        self.before = 1 if reverse else -1  # from a step to the one computed before it
        self.order = range(time - 1, -1, -1) if reverse else range(time)

    def to_padded(self, a: Tensor) -> Tensor:
        """To [T, B, ...], zero where a row has ended (padding may hold anything, even NaN)."""
        if self.packed:
            a = a[self.rows]
        elif self.batch_first:
            a = a.transpose(0, 1)
        return a if self.valid is None else torch.where(self.valid[..., None], a, 0)

    def from_padded(self, a: Tensor) -> Tensor:
        if self.packed:
            return a[self.steps, self.columns]
        return a.transpose(0, 1) if self.batch_first else a

    def keep(self, t: int, new: Tensor, old: Tensor) -> Tensor:
        """``new`` in the rows that have a step t, ``old`` in the others."""
        return new if self.valid is None else torch.where(self.valid[t][:, None], new, old)

    def enter(self, t: int, state: Tensor) -> Tensor:
        """The state as step t sees it: zero where a reset cuts."""
        return state if self.cut is None else torch.where(self.cut[t][:, None], 0, state)

    def previous(self, t: int, a: Sequence[Tensor], first: Tensor) -> Tensor:
        """``a`` one step before t in the order of computation, ``first`` where there is none."""
        s = t + self.before
        if not 0 <= s < len(self.order):
            return first
        return a[s] if self.valid is None else torch.where(self.valid[s][:, None], a[s], first)


@samples(5, 3, 4, 6)
def sample_inputs(draw: Draw, sizes: Sequence[int]) -> Iterator[Sample]:
    """Calls of :func:`lstm` that reach every option once; sizes = (T, B, I, H)."""
    time, batch, width, hidden = sizes

    def weights(bias: bool = True, project: int = 0) -> tuple[Tensor | None, ...]:
        out, scale = project or hidden, hidden**-0.5
        shapes = [(4 * hidden, width), (4 * hidden, out)] + [(4 * hidden,)] * 2 * bias
        values: list[Tensor | None] = [draw(*shape, scale=scale) for shape in shapes]
        values += [None, None] * (not bias)
        return (*values, draw(project, hidden, scale=scale) if project else None)

    def state(project: int = 0) -> State:
        return draw(batch, project or hidden), draw(batch, hidden)

    x = draw(time, batch, width)
    lengths = draw.whole(0, time + 1, batch)
    reset = draw.mask(time, batch, share=0.3)
    sizes_packed = (torch.arange(batch, 0, -1)[:, None] * time > torch.arange(time) * batch).sum(0)
    project = hidden // 2
    yield Sample("plain", (x, state(), *weights()))
    yield Sample("zero_state", (x, None, *weights()))
    yield Sample("no_bias", (x, state(), *weights(bias=False)))
    yield Sample("projected", (x, state(project), *weights(project=project)))
    yield Sample("reverse", (x, state(), *weights()), {"reverse": True})
    yield Sample("lengths", (x, state(), *weights()), {"lengths": lengths})
    yield Sample("reset", (x, state(), *weights()), {"reset": reset})
    yield Sample(
        "all_padded",
        (x.transpose(0, 1).contiguous(), state(project), *weights(project=project)),
        {"lengths": lengths, "reset": reset.t(), "batch_first": True, "reverse": True},
    )
    yield Sample(
        "packed",
        (draw(int(sizes_packed.sum()), width), state(), *weights()),
        {"batch_sizes": sizes_packed},
    )
    yield Sample(
        "packed_reverse",
        (draw(int(sizes_packed.sum()), width), state(), *weights(bias=False)),
        {"batch_sizes": sizes_packed, "reverse": True},
    )


@samples(3, 4, 6)
def cell_sample_inputs(draw: Draw, sizes: Sequence[int]) -> Iterator[Sample]:
    """Calls of :func:`lstm_cell` that reach every option once; sizes = (B, I, H)."""
    of_layer = sample_inputs(draw.device, draw.dtype, sizes=(1, *sizes), seed=draw.first)
    for name, args, *_ in of_layer:
        if name in ("plain", "zero_state", "no_bias"):
            yield Sample(name, (args[0][0], *args[1:6]), function="lstm_cell")
