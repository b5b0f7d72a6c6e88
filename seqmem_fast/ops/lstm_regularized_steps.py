"""The steps of ``ops.lstm_regularized``, and their backward.

forward     all W_ih x at once, where the gates will be; for each step W_hh h, gates, c and h
backward    for all steps at once what the gradients of h and c are multiplied by:
                dz_i = dc g i(1-i),  dz_f = dc c' f(1-f),  dz_g = dc i (1-g^2),  dz_o = dh y o(1-o)
                dc += dh o (1-y^2),  y = tanh of c before it is mixed with the c' that entered
            for each step, last to first, these products and dh' = W_hh^T dz;
            then each weight's gradient is one product over all steps
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import lstm_regularized as reference
from ..reference.lstm import Layout
from .common import Gradients, reference_vjp

# Those of the reference's arguments that come first and have gradients.
ARGUMENTS: tuple[str, ...] = (
    *("input", "hx", "cx", "weight_ih", "weight_hh", "bias_ih", "bias_hh"),
    *("gain_ih", "gain_hh", "gain_c", "shift_c"),
)
OPTIONS = 8  # the others


class Norm:
    """Layer normalisation of [.., width], and its derivative."""

    def __init__(self, gain: Tensor, shift: Tensor | None) -> None:
        self.gain, self.shift, self.shape = gain, shift, list(gain.shape)

    def __call__(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised v, and the two statistics that the derivative reads."""
        return torch.native_layer_norm(v, self.shape, self.gain, self.shift, reference.EPSILON)

    def backward(self, grad: Tensor, v: Tensor, statistics: Sequence[Tensor], *wanted: bool) -> Any:
        """Gradients of v, gain and shift, those that are wanted."""
        tensors = grad, v, self.shape, *statistics, self.gain, self.shift
        return torch.ops.aten.native_layer_norm_backward(*tensors, wanted)


class Zoneout:
    """What is kept of the state that enters each step: all of it in a row that has ended."""

    def __init__(self, zoneout: Tensor | float, layout: Layout) -> None:
        self.share = 0.0 if isinstance(zoneout, Tensor) else zoneout
        mask = zoneout if isinstance(zoneout, Tensor) else None
        if layout.valid is not None:
            ended = ~layout.valid[..., None]
            mask = ended if mask is None else mask | ended
        self.mask = mask  # [T, B, H] or [T, B, 1]
        self.steps = None if mask is None else mask.unbind()

    def mix(self, t: int, old: Tensor, new: Tensor, out: Tensor) -> None:
        if self.share:
            new = torch.add(new, old - new, alpha=self.share)
        if self.steps is None:
            out.copy_(new)
        else:
            torch.where(self.steps[t], old, new, out=out)

    def kept(self, like: Tensor) -> Tensor:
        """The share of the old that each unit keeps, [T, B, H], [T, B, 1] or [T, 1, 1]."""
        if self.mask is None:
            return like.new_full((like.size(0), 1, 1), self.share)
        kept = self.mask.to(like.dtype)
        return kept.masked_fill(~self.mask, self.share) if self.share else kept


class Steps(torch.autograd.Function):
    """Takes the reference's arguments by position; output, hy, cy, gates and cells."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        x, h, c, w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh, gain_c, shift_c = arguments[:-OPTIONS]
        zoneout_h, zoneout_c, *options, return_gates = arguments[-OPTIONS:]
        layout = Layout(x, *options)
        keep_h, keep_c = Zoneout(zoneout_h, layout), Zoneout(zoneout_c, layout)
        x = layout.to_padded(x)
        steps, batch, hidden = x.size(0), x.size(1), w_hh.size(1)
        h = x.new_zeros(batch, hidden) if h is None else h
        c = x.new_zeros(batch, hidden) if c is None else c
        bias = _total(b_ih, b_hh)
        kept: list[Tensor] = []  # for the backward, beside arguments and results
        if gain_ih is None:
            gates = F.linear(x, w_ih, bias)
        else:
            products = F.linear(x, w_ih)
            gates, *statistics = Norm(gain_ih, bias)(products)
            recurrent = torch.empty_like(gates)
            vs = recurrent.unbind()
            of_steps: list[Any] = [()] * steps
            norm_hh, norm_c = Norm(gain_hh, None), Norm(gain_c, shift_c)
            kept += [products, *statistics, recurrent]

        output, cells = (x.new_empty(steps, batch, hidden) for _ in range(2))
        hs, cs, zs = output.unbind(), cells.unbind(), gates.unbind()
        two = gates[..., : 2 * hidden].unbind()
        i, f, g, o = (part.unbind() for part in gates.chunk(4, -1))
        c_new, squashed, h_new = x.new_empty(3, batch, hidden)
        across = w_hh.t().contiguous()
        for t in layout.order:
            h, c = layout.enter(t, h), layout.enter(t, c)
            if gain_ih is None:
                zs[t].addmm_(h, across)
            else:
                torch.mm(h, across, out=vs[t])
                normalized, *of_steps[t] = norm_hh(vs[t])
                zs[t].add_(normalized)
            two[t].sigmoid_()
            g[t].tanh_()
            o[t].sigmoid_()
            torch.mul(f[t], c, out=c_new).addcmul_(i[t], g[t])
            torch.tanh(c_new if gain_ih is None else norm_c(c_new)[0], out=squashed)
            torch.mul(o[t], squashed, out=h_new)
            keep_h.mix(t, h, h_new, hs[t])
            keep_c.mix(t, c, c_new, cs[t])
            h, c = hs[t], cs[t]
        if gain_ih is not None:
            kept += [torch.stack(each) for each in zip(*of_steps, strict=True)]
        ctx.set_materialize_grads(False)
        ctx.numbers = [None if isinstance(each, Tensor) else each for each in arguments]
        tensors = [each if isinstance(each, Tensor) else None for each in arguments]
        ctx.save_for_backward(*tensors, output, gates, cells, *kept)
        shown = (_shown(layout, each) for each in (gates, cells)) if return_gates else (None, None)
        return _shown(layout, output), h.clone(), c.clone(), *shown

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        count = len(ARGUMENTS)
        saved, size = ctx.saved_tensors, len(ctx.numbers)
        given = zip(saved[:size], ctx.numbers, strict=True)
        arguments = [number if tensor is None else tensor for tensor, number in given]
        if torch.is_grad_enabled():
            found = _differentiable(arguments, grads, ctx.needs_input_grad[:count])
        else:
            found = _backward(arguments, saved[size:], grads, ctx.needs_input_grad[:count])
        return *found, *(None,) * OPTIONS


def _shown(layout: Layout, a: Tensor) -> Tensor:
    """As the caller laid out the input, zero where a row has ended."""
    if layout.valid is not None and not layout.packed:
        a = a.masked_fill(~layout.valid[..., None], 0)
    return layout.from_padded(a).contiguous()


def _total(b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor | None:
    return b_hh if b_ih is None else b_ih if b_hh is None else b_ih + b_hh


def _differentiable(
    arguments: Sequence[Any], grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> Gradients:
    """The gradients as functions of all that they depend on."""
    options = arguments[-OPTIONS:]

    def plain(*tensors: Tensor | None) -> Sequence[Tensor]:
        results = reference.lstm_regularized(*tensors, *options)  # type: ignore[arg-type]
        return [each for each in results if each is not None]

    results = grads if options[-1] else grads[:3]
    return reference_vjp(plain, arguments[:-OPTIONS], results, wanted)


def _backward(
    arguments: Sequence[Any],
    kept: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> Gradients:
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh, gain_c, shift_c = arguments[:-OPTIONS]
    zoneout_h, zoneout_c, *options, _ = arguments[-OPTIONS:]
    output, gates, cells, *of_norms = kept
    layout = Layout(x, *options)
    x = layout.to_padded(x)
    steps, batch, hidden = output.shape
    keep_h, keep_c = (Zoneout(z, layout).kept(output) for z in (zoneout_h, zoneout_c))
    h_in, c_in = _entering(layout, output, h0), _entering(layout, cells, c0)
    i, f, g, o = gates.chunk(4, -1)

    c_new = torch.addcmul(f * c_in, i, g)
    y = c_new
    if gain_c is not None:
        norm_hh, norm_c = Norm(gain_hh, None), Norm(gain_c, shift_c)
        y, *of_c = norm_c(c_new)
        products, *of_products, recurrent, mean, deviation = of_norms
        dy = torch.empty_like(y)
        dv = torch.empty_like(gates)
    y = torch.tanh(y)
    new_h, new_c = 1 - keep_h, 1 - keep_c
    through = torch.ops.aten.tanh_backward(o * new_h, y)  # from dh to dc
    dz = torch.empty_like(gates)  # at first what it is multiplied by
    dz_i, dz_f, dz_g, dz_o = dz.chunk(4, -1)
    sigmoid, tanh = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
    sigmoid.grad_input(g, i, grad_input=dz_i)
    sigmoid.grad_input(c_in, f, grad_input=dz_f)
    tanh.grad_input(i, g, grad_input=dz_g)
    sigmoid.grad_input(y * new_h, o, grad_input=dz_o)
    grad_h, grad_c = grads[1], grads[2]
    dh = torch.zeros_like(output[0]) if grad_h is None else grad_h
    dc = torch.zeros_like(output[0]) if grad_c is None else grad_c
    of_output, of_gates, of_cells = (
        None if grad is None else layout.to_padded(grad) for grad in (grads[0], *grads[3:])
    )
    if of_gates is not None:
        slope = gates - gates * gates
        slope[..., 2 * hidden : 3 * hidden] = 1 - g * g
        of_gates = of_gates * slope
    three = dz.view(steps, batch, 4, hidden)[:, :, :3].unbind()
    for t in reversed(layout.order):
        if of_output is not None:
            dh = dh + of_output[t]
        if of_cells is not None:
            dc = dc + of_cells[t]
        d_new = dc * new_c[t]
        if gain_c is None:
            d_new.addcmul_(dh, through[t])
        else:
            torch.mul(dh, through[t], out=dy[t])
            statistics = of_c[0][t], of_c[1][t]
            d_new += norm_c.backward(dy[t], c_new[t], statistics, True, False, False)[0]
        three[t].mul_(d_new[:, None])
        dz_o[t].mul_(dh)
        if of_gates is not None:
            dz[t] += of_gates[t]
        dv_t = dz[t]
        if gain_hh is not None:
            statistics = mean[t], deviation[t]
            dv_t = norm_hh.backward(dz[t], recurrent[t], statistics, True, False, False)[0]
            dv[t] = dv_t
        dh = torch.addcmul(dv_t @ w_hh, dh, keep_h[t])
        dc = torch.addcmul(d_new * f[t], dc, keep_c[t])
        dh, dc = layout.enter(t, dh), layout.enter(t, dc)

    found: list[Tensor | None] = [None, dh, dc, *[None] * 8]
    if gain_ih is None:
        dv = du = dz
        bias = dz.sum((0, 1)) if wanted[5] or wanted[6] else None
    else:
        norm_ih = Norm(gain_ih, _total(b_ih, b_hh))
        has_bias = norm_ih.shift is not None
        du, found[7], bias = norm_ih.backward(dz, products, of_products, True, True, has_bias)
        _, found[8], _ = norm_hh.backward(dz, recurrent, (mean, deviation), False, True, False)
        _, found[9], found[10] = norm_c.backward(dy, c_new, of_c, False, True, True)
    if wanted[0]:
        found[0] = layout.from_padded(du @ w_ih)
    if wanted[3]:
        found[3] = du.flatten(0, 1).t() @ x.flatten(0, 1)
    if wanted[4]:
        found[4] = dv.flatten(0, 1).t() @ h_in.flatten(0, 1)
    found[5] = found[6] = bias
    return tuple(each if wants else None for each, wants in zip(found, wanted, strict=True))


def _entering(layout: Layout, states: Tensor, first: Tensor | None) -> Tensor:
    """The state as each step sees it, from those that the steps left [T, B, H]."""
    start = torch.zeros_like(states[:1]) if first is None else first[None]
    before = (states[1:], start) if layout.before > 0 else (start, states[:-1])
    entered = torch.cat(before)
    return entered if layout.cut is None else entered.masked_fill(layout.cut[..., None], 0)
