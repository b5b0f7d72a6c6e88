"""The controller of a whole sequence with a memory, a step of it in a row's program.

    forward: per layer z = [below, h] W + its bias or the input's part; gates, cell, h
             head values = h W + b
    backward: per layer, the last one first: dh from head values, features, the layer above, the
              step after; dz; the gradients of below, or of the reads, and of h

Its weights are read from L2 at every step. Packed by `controller.py`, in the wide dtype: the LSTM's
gates of a unit side by side, so that one reduction leaves each thread all four; per layer the
weights of [below, h] as [K, C * G] for the forward and [C * G, K] for the backward, one layer after
the other.

Letters: G 4 gates or 1, K = width below + C (LSTM), P head values, R read heads; the record:
`machine_kernels.py`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import lstm_point, lstm_point_backward, tanh
from .machine_kernels import head_offset


@triton.jit
def accumulate(acc, x_ptr, rows, w_ptr, stride, o, o_inside, BK: tl.constexpr):
    """acc [BK, BO] += x[k] w[k, o], to be summed over its first dimension in the end."""
    for start in range(0, rows, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_ptr + k, mask=k < rows, other=0.0)
        at = w_ptr + k[:, None] * stride + o[None, :]
        acc += x[:, None] * tl.load(at, mask=(k < rows)[:, None] & o_inside[None, :], other=0.0)
    return acc


@triton.jit
def controller_forward(
    zx_ptr,  # [C * G] the input's part of the first layer, with its bias
    weight_ptr,  # forward weights of all layers
    bias_ptr,  # [L, C * G]; the first layer's is in zx
    head_weight_ptr,  # [C, P]
    head_bias_ptr,  # [P]
    reads_ptr,  # [R * M]
    old,  # [L, C] the hidden state before
    new,  # and after
    cell_ptr,  # [L, C] in and out
    feature,  # [C]
    kept,  # the step's record
    control, values, read_width,
    LAYERS: tl.constexpr, LSTM: tl.constexpr, ACC: tl.constexpr,
    BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One step: everything up to the head values, which are left in the record."""
    G: tl.constexpr = 4 if LSTM else 1
    head_at = head_offset(control, LAYERS, LSTM)
    weight = weight_ptr
    for layer in tl.static_range(LAYERS):
        if layer == 0:
            own = weight + read_width * control * G
        else:
            own = weight + control * control * G
        for start in range(0, control, BC):
            c = start + tl.arange(0, BC)
            o = start * G + tl.arange(0, G * BC)
            real = o < control * G
            acc = tl.zeros([BK, G * BC], ACC)
            if layer == 0:
                z = tl.load(zx_ptr + o, mask=real, other=0.0)
                acc = accumulate(acc, reads_ptr, read_width, weight, control * G, o, real, BK)
            else:
                z = tl.load(bias_ptr + layer * control * G + o, mask=real, other=0.0)
                below = new + (layer - 1) * control
                acc = accumulate(acc, below, control, weight, control * G, o, real, BK)
            if LSTM:
                before = old + layer * control
                acc = accumulate(acc, before, control, own, control * G, o, real, BK)
                z += tl.sum(acc, axis=0)
                z_ig, z_fo = tl.split(tl.reshape(z, [BC, 2, 2]))
                z_i, z_g = tl.split(z_ig)
                z_f, z_o = tl.split(z_fo)
                at = cell_ptr + layer * control + c
                c_prev = tl.load(at, mask=c < control, other=0.0)
                g_i, g_f, g_g, g_o, cell, h = lstm_point(z_i, z_f, z_g, z_o, c_prev)
                tl.debug_barrier()  # several threads load what one stores
                tl.store(at, cell, mask=c < control)
                to = kept + layer * 5 * control + c
                tl.store(to, g_i, mask=c < control)
                tl.store(to + control, g_f, mask=c < control)
                tl.store(to + 2 * control, g_g, mask=c < control)
                tl.store(to + 3 * control, g_o, mask=c < control)
                tl.store(to + 4 * control, cell, mask=c < control)
            else:
                h = tanh(z + tl.sum(acc, axis=0))
            tl.store(new + layer * control + c, h, mask=c < control)
            if layer == LAYERS - 1:
                tl.store(feature + c, h.to(feature.dtype.element_ty), mask=c < control)
            else:
                to = kept + head_at - (LAYERS - 1 - layer) * control + c
                tl.store(to, h, mask=c < control)
        if LSTM:
            weight = own + control * control * G
        else:
            weight = own
        tl.debug_barrier()

    p = kept + head_at
    for start in range(0, values, BC):
        o = start + tl.arange(0, BC)
        acc = tl.zeros([BK, BC], ACC)
        top = new + (LAYERS - 1) * control
        acc = accumulate(acc, top, control, head_weight_ptr, values, o, o < values, BK)
        bias = tl.load(head_bias_ptr + o, mask=o < values, other=0.0)
        tl.store(p + o, bias + tl.sum(acc, axis=0), mask=o < values)
    tl.debug_barrier()


@triton.jit
def controller_backward(
    d_feature,  # [C], `f_c` apart, or None
    f_c,
    dp,  # [P]
    weight_ptr,  # backward weights of all layers
    head_weight_ptr,  # [P, C]
    cell_ptr,  # [L, B, C], the first state's
    initial_cell_ptr,  # [L, C], or None
    features_ptr,  # [C]
    kept,  # the step's record
    kept_before,  # that of the step before
    below_ptr,  # [C] scratch
    d_hidden_ptr,  # [L, C] in and out
    d_cell_ptr,  # [L, C] in and out
    d_reads_ptr,  # [R * M] out
    dz_ptr,  # [L, C * G] out
    first,  # the step follows on the first state,
    follows,  # on another step,
    cut,  # or on the initial state
    b, batch, control, values, read_width,
    LAYERS: tl.constexpr, LSTM: tl.constexpr, ACC: tl.constexpr,
    BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One step: from the gradients of head values and features to those of reads and state."""
    G: tl.constexpr = 4 if LSTM else 1
    head_at = head_offset(control, LAYERS, LSTM)
    for layer in tl.static_range(LAYERS - 1, -1, -1):
        dz = dz_ptr + layer * control * G
        for start in range(0, control, BC):
            c = start + tl.arange(0, BC)
            real = c < control
            dh = tl.zeros([BC], ACC)
            if LSTM:
                dh += tl.load(d_hidden_ptr + layer * control + c, mask=real, other=0.0)
            if layer == LAYERS - 1:
                acc = tl.zeros([BK, BC], ACC)
                acc = accumulate(acc, dp, values, head_weight_ptr, control, c, real, BK)
                dh += tl.sum(acc, axis=0)
                if d_feature is not None:
                    of_control = d_feature + c.to(tl.int64) * f_c
                    dh += tl.load(of_control, mask=real, other=0.0).to(ACC)
            else:
                dh += tl.load(below_ptr + c, mask=real, other=0.0)
            if LSTM:
                at = kept + layer * 5 * control + c
                g_i = tl.load(at, mask=real, other=0.0)
                g_f = tl.load(at + control, mask=real, other=0.0)
                g_g = tl.load(at + 2 * control, mask=real, other=0.0)
                g_o = tl.load(at + 3 * control, mask=real, other=0.0)
                cell = tl.load(at + 4 * control, mask=real, other=0.0)
                at = cell_ptr + (layer * batch + b) * control + c
                c_prev = tl.load(at, mask=real & first, other=0.0).to(ACC)
                at = kept_before + (layer * 5 + 4) * control + c
                c_prev += tl.load(at, mask=real & follows, other=0.0)
                if initial_cell_ptr is not None:
                    at = initial_cell_ptr + layer * control + c
                    c_prev += tl.load(at, mask=real & cut, other=0.0)
                dc = tl.load(d_cell_ptr + layer * control + c, mask=real, other=0.0)
                dz_i, dz_f, dz_g, dz_o, dc = lstm_point_backward(
                    g_i, g_f, g_g, g_o, cell, c_prev, dh, dc, 0.0, 0.0, 0.0, 0.0
                )
                tl.debug_barrier()  # several threads load what one stores
                tl.store(d_cell_ptr + layer * control + c, dc, mask=real)
                tl.store(dz + 4 * c, dz_i, mask=real)
                tl.store(dz + 4 * c + 1, dz_f, mask=real)
                tl.store(dz + 4 * c + 2, dz_g, mask=real)
                tl.store(dz + 4 * c + 3, dz_o, mask=real)
            else:
                if layer == LAYERS - 1:
                    at = features_ptr + c
                else:
                    at = kept + head_at - (LAYERS - 1 - layer) * control + c
                out = tl.load(at, mask=real, other=0.0).to(ACC)
                tl.store(dz + c, dh * (1.0 - out * out), mask=real)
        tl.debug_barrier()
        if layer == 0:
            under = read_width
            weight = weight_ptr
        else:
            under = control
            K_rows = 2 * control if LSTM else control
            first_rows = read_width + control if LSTM else read_width
            weight = weight_ptr + (first_rows + (layer - 1) * K_rows) * control * G
        inputs = under
        if LSTM:
            inputs += control
        for start in range(0, inputs, BC):
            o = start + tl.arange(0, BC)
            acc = tl.zeros([BK, BC], ACC)
            acc = accumulate(acc, dz, control * G, weight, inputs, o, o < inputs, BK)
            down = tl.sum(acc, axis=0)
            if layer == 0:
                tl.store(d_reads_ptr + o, down, mask=o < under)
            else:
                tl.store(below_ptr + o, down, mask=o < under)
            if LSTM:
                to = d_hidden_ptr + layer * control + o - under
                tl.store(to, down, mask=(o >= under) & (o < inputs))
        tl.debug_barrier()
