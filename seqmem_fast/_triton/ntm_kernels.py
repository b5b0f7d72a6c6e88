"""The whole NTM sequence of a batch row in one program, forward and backward.

The row's memory stays in registers over all steps. Vectors that are summed over (controller state,
reads, head values) pass through a few hundred bytes of global scratch that only this program
touches, with a barrier between; the controller's weights are read from L2 at every step, which
bounds a step from below (200 kB at C = 100: about 2 us). No launch and no grid-wide barrier per
step, and rows do not wait for each other.

Backward: memories are recomputed from a checkpoint, a segment at a time, from the weightings and
head values that were kept; each head's memory within a step by writing anew. The memory's
gradient rests in global scratch between heads: in registers it would make the rest spill. Weight
gradients are left to matrix products over dz and dp of all steps.

Letters: G 4 gates or 1, K = width below + C (LSTM), P head values, S taps, Hd heads, R read heads.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import sigmoid
from .controller_kernels import controller_backward, controller_forward
from .machine_kernels import (
    block_of,
    content_backward,
    copy,
    hand_over,
    head_offset,
    hidden_of,
    keep,
    move,
    of_step,
    origin,
    padded,
    previous,
    read_gradient,
    read_out,
    similarity,
    softmax_of,
    softplus,
    start_anew,
    started,
    this_row,
    vector,
    with_trace,
)
from .ntm_addressing_kernels import (
    gated,
    sharpened,
    sharpened_backward,
    shifted,
    shifted_backward,
    written,
    written_backward,
)

VARYING = ("steps", "batch", "record_rows", "writes", "segment")


@triton.jit
def _erase(p_ptr, width, BW: tl.constexpr):
    m = tl.arange(0, BW)
    return tl.where(m < width, sigmoid(tl.load(p_ptr + m, mask=m < width, other=0.0)), 0.0)


@triton.jit
def _taps(p_ptr, taps, BS: tl.constexpr):
    s = tl.arange(0, BS)
    return softmax_of(tl.load(p_ptr + s, mask=s < taps, other=0.0), s < taps)


@triton.jit
def _rewritten(memory, w_ptr, p_ptr, heads, writes, slots, width, taps, SQUASH: tl.constexpr,
               ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):  # fmt: skip
    """The memory after the first `heads` heads of a step whose weightings are known."""
    n = tl.arange(0, BN)
    for h in range(heads):
        is_write = (writes >> h) & 1
        if is_write != 0:
            at = p_ptr + width + taps + 3
            w = tl.load(w_ptr + h * slots + n, mask=n < slots, other=0.0).to(ACC)
            add = vector(at + width, width, SQUASH, BW)
            memory = written(memory, w, _erase(at, width, BW), add)
        p_ptr += width + taps + 3 + is_write * 2 * width
    return memory


@triton.jit(do_not_specialize=VARYING)
def ntm_forward(
    zx_ptr,  # [T, B, C * G] the input's part of the first layer, with its bias
    weight_ptr,  # forward weights of all layers
    bias_ptr,  # [L, C * G]; the first layer's is in zx
    head_weight_ptr,  # [C, P]
    head_bias_ptr,  # [P]
    hidden_ptr,  # [2, B, L, C] the state, in and out, at even and odd steps
    cell_ptr,  # [B, L, C] the state, in and out; all four are wide scratch
    weightings_ptr,  # [B, Hd, N]
    reads_ptr,  # [B, R * M]
    initial_hidden_ptr,  # [L, C] wide; what reset goes back to, or None all five
    initial_cell_ptr,
    initial_memory_ptr,  # [BN, BW], zero outside [N, M]
    initial_weightings_ptr,  # [Hd, N]
    initial_reads_ptr,  # [R * M]
    memory_ptr,  # [B, N, M]
    lengths_ptr,  # [B] int64 or None
    reset_ptr,  # [T, B] uint8 or None
    features_ptr,  # [T, B, C + R * M]
    hidden_out_ptr,  # [B, L, C]; None without LSTM
    memory_out_ptr,  # [B, N, M]
    trace_ptr,  # [T, B, Hd, N] or None
    record_ptr,  # [T, B, record] wide; one step long where nothing is saved
    checkpoints_ptr,  # [segments, B, checkpoint_t] wide, or None
    steps, batch,
    record_rows,  # from a step's record of this row to the next's: 0 without saving
    record,  # elements of one
    checkpoint,  # as record
    segment,
    control,  # C
    slots, width,
    values,  # P
    heads,
    writes,  # bit h: head h writes
    taps,
    read_width,  # R * M
    LAYERS: tl.constexpr, LSTM: tl.constexpr, SQUASH: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    b, length, n, _m, there = this_row(lengths_ptr, steps, slots, BN, BW)
    G: tl.constexpr = 4 if LSTM else 1
    block, inside = block_of(memory_ptr + b * slots * width, slots, width, BN, BW)
    memory = tl.load(block, mask=inside, other=0.0).to(ACC)
    states = LAYERS * control
    weightings_ptr += b * heads * slots
    reads_ptr += b * read_width
    cell_ptr += b * states
    feature_width = control + read_width
    head_at = head_offset(control, LAYERS, LSTM)
    initial = (initial_hidden_ptr, initial_cell_ptr, initial_reads_ptr)
    state = (cell_ptr, reads_ptr)

    for t in range(length):
        row = b + t * batch
        old, new = hidden_of(hidden_ptr, t, b, batch, states)
        kept = record_ptr + (b + t * record_rows) * record
        feature = features_ptr + row * feature_width
        if reset_ptr is not None:
            memory, cut = started(memory, reset_ptr + row, initial_memory_ptr, there, BN, BW)
            if cut:
                start_anew(initial, state, old, states, read_width, LSTM, BC)
                copy(initial_weightings_ptr, weightings_ptr, heads * slots, BC)
            tl.debug_barrier()
        if checkpoints_ptr is not None:
            if t % segment == 0:
                at = checkpoints_ptr + (t // segment * batch + b) * checkpoint
                to, _ = block_of(at, slots, width, BN, BW)
                tl.store(to, memory, mask=inside)

        controller_forward(
            zx_ptr + row * control * G, weight_ptr, bias_ptr, head_weight_ptr, head_bias_ptr,
            reads_ptr, old, new, cell_ptr, feature, kept, control, values, read_width, LAYERS, LSTM,
            ACC, BC, BK,
        )  # fmt: skip
        p = kept + head_at

        read_at = 0
        for h in range(heads):
            is_write = (writes >> h) & 1
            key = vector(p, width, SQUASH, BW)
            K, _norms, _key_norm = similarity(memory, key)
            content = softmax_of(softplus(tl.load(p + width)) * K, there)
            prev = tl.load(weightings_ptr + h * slots + n, mask=there, other=0.0)
            u = gated(content, sigmoid(tl.load(p + width + 1)), prev)
            v = shifted(u, _taps(p + width + 2, taps, BS), taps, slots, BN, BS)
            w, _log = sharpened(v, 1.0 + softplus(tl.load(p + width + 2 + taps)))
            tl.debug_barrier()  # several threads load what one stores
            tl.store(weightings_ptr + h * slots + n, w, mask=there)
            keep(trace_ptr, (row * heads + h) * slots, w, there, BN)
            p += width + 3 + taps
            if is_write != 0:
                add = vector(p + width, width, SQUASH, BW)
                memory = written(memory, w, _erase(p, width, BW), add)
                p += 2 * width
            else:
                seen = feature + control + read_at
                read_out(w, memory, reads_ptr + read_at, seen, width, BW)
                read_at += width
        tl.debug_barrier()

    if LSTM:
        last, _ = hidden_of(hidden_ptr, length, b, batch, states)
        copy(last, hidden_out_ptr + b * states, states, BC)
    to, inside = block_of(memory_out_ptr + b * slots * width, slots, width, BN, BW)
    tl.store(to, memory.to(memory_out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def ntm_backward(
    grad_features_ptr,  # [T, B, C + R * M] with strides, or None
    grad_trace_ptr,  # [T, B, Hd, N], dense, or None
    weight_ptr,  # backward weights of all layers
    head_weight_ptr,  # [P, C]
    cell_ptr,  # [L, B, C] the first state's; None without LSTM
    weightings_ptr,  # [B, Hd, N] the first state's
    initial_cell_ptr,  # wide; what reset goes back to, or None all three
    initial_memory_ptr,  # [BN, BW], zero outside [N, M]
    initial_weightings_ptr,
    lengths_ptr,  # [B] int64 or None
    reset_ptr,  # [T, B] uint8 or None
    features_ptr,  # [T, B, C + R * M]
    trace_ptr,  # [T, B, Hd, N]
    record_ptr,  # [T, B, record] wide
    checkpoints_ptr,  # [segments, B, checkpoint] wide
    memories_ptr,  # [B, segment, BN, BW] wide scratch: what enters each step of a segment
    below_ptr,  # [B, C] wide scratch
    d_hidden_ptr,  # [B, L, C] wide: of the last state before, of the first after, as all d_*
    d_cell_ptr,  # [B, L, C]
    d_memory_ptr,  # [B, BN, BW], zero outside [N, M]
    d_weightings_ptr,  # [B, Hd, N]
    d_reads_ptr,  # [B, R * M]
    i_hidden_ptr,  # the gradients of initial, a part for each row, zeros coming in; or None
    i_cell_ptr,
    i_memory_ptr,
    i_weightings_ptr,
    i_reads_ptr,
    dz_ptr,  # [T, B, L, C * G] wide
    dp_ptr,  # [T, B, P] wide
    steps, batch, record, checkpoint, segment, control, slots, width, values, heads, writes, taps,
    read_width, f_t, f_b, f_c,
    LAYERS: tl.constexpr, LSTM: tl.constexpr, SQUASH: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    b, length, n, m, there = this_row(lengths_ptr, steps, slots, BN, BW)
    G: tl.constexpr = 4 if LSTM else 1
    s = tl.arange(0, BS)
    states = LAYERS * control
    feature_width = control + read_width
    head_at = head_offset(control, LAYERS, LSTM)
    weightings_ptr += b * heads * slots
    below_ptr += b * control
    d_hidden_ptr += b * states
    d_cell_ptr += b * states
    d_weightings_ptr += b * heads * slots
    d_reads_ptr += b * read_width
    memories_ptr += b * segment * BN * BW
    d_memory_ptr += b * BN * BW

    grads = (d_hidden_ptr, d_cell_ptr, d_memory_ptr, d_reads_ptr)
    of_initial = (i_hidden_ptr, i_cell_ptr, i_memory_ptr, i_reads_ptr)
    segments = tl.cdiv(length, segment)
    for passed in range(segments):
        begin = (segments - 1 - passed) * segment
        end = tl.minimum(begin + segment, length)
        stored = checkpoints_ptr + (begin // segment * batch + b) * checkpoint
        block, inside = block_of(stored, slots, width, BN, BW)
        memory = tl.load(block, mask=inside, other=0.0)
        for t in range(begin, end):
            row = b + t * batch
            if reset_ptr is not None:
                cut = tl.load(reset_ptr + row) != 0
                again = there[:, None] & cut & (t > begin)
                memory = tl.load(padded(initial_memory_ptr, BN, BW), mask=again, other=memory)
            tl.store(padded(memories_ptr + (t - begin) * BN * BW, BN, BW), memory)
            memory = _rewritten(
                memory, trace_ptr + row * heads * slots, record_ptr + row * record + head_at,
                heads, writes, slots, width, taps, SQUASH, ACC, BN, BW,
            )  # fmt: skip
        tl.debug_barrier()

        for back in range(end - begin):
            t = end - 1 - back
            row = b + t * batch
            before = row - batch
            first, follows, cut = origin(reset_ptr, row, t)
            kept = record_ptr + row * record
            d_feature = of_step(grad_features_ptr, b, t, f_b, f_t)

            p = kept + head_at + values
            dp = dp_ptr + row * values + values
            read_at = read_width
            for h_back in range(heads):
                h = heads - 1 - h_back
                is_write = (writes >> h) & 1
                p -= width + 3 + taps + is_write * 2 * width
                dp -= width + 3 + taps + is_write * 2 * width
                memory = _rewritten(
                    tl.load(padded(memories_ptr + (t - begin) * BN * BW, BN, BW)),
                    trace_ptr + row * heads * slots, kept + head_at, h, writes, slots, width,
                    taps, SQUASH, ACC, BN, BW,
                )  # fmt: skip
                key = vector(p, width, SQUASH, BW)
                raw_beta = tl.load(p + width)
                gate = sigmoid(tl.load(p + width + 1))
                shift = _taps(p + width + 2, taps, BS)
                raw_gamma = tl.load(p + width + 2 + taps)
                prev = previous(
                    weightings_ptr, trace_ptr + before * heads * slots, initial_weightings_ptr, h,
                    slots, first, follows, cut, ACC, BN,
                )  # fmt: skip
                K, norms, key_norm = similarity(memory, key)
                content = softmax_of(softplus(raw_beta) * K, there)
                u = gated(content, gate, prev)
                v = shifted(u, shift, taps, slots, BN, BS)
                w, log = sharpened(v, 1.0 + softplus(raw_gamma))

                d_memory = tl.load(padded(d_memory_ptr, BN, BW))
                dw = tl.load(d_weightings_ptr + h * slots + n, mask=there, other=0.0)
                dw = with_trace(dw, grad_trace_ptr, (row * heads + h) * slots, there, ACC, BN)
                if is_write != 0:
                    more = width + 3 + taps
                    erase = _erase(p + more, width, BW)
                    add = vector(p + more + width, width, SQUASH, BW)
                    d_memory, d_w, d_erase, d_add = written_backward(
                        d_memory, memory, w, erase, add
                    )
                    dw += d_w
                    tl.store(dp + more + m, d_erase * erase * (1.0 - erase), mask=m < width)
                    if SQUASH:
                        d_add *= 1.0 - add * add
                    tl.store(dp + more + width + m, d_add, mask=m < width)
                else:
                    read_at -= width
                    d_read = read_gradient(
                        d_reads_ptr, d_feature, f_c, control, read_at, width, ACC, BW
                    )
                    dw += tl.sum(memory * d_read[None, :], axis=1)
                    d_memory += w[:, None] * d_read[None, :]

                dw = tl.where(there, dw, 0.0)
                dv, d_gamma = sharpened_backward(dw, v, w, log, 1.0 + softplus(raw_gamma))
                du, d_shift = shifted_backward(dv, u, shift, taps, slots, BN, BS)
                tl.debug_barrier()  # several threads load what one stores
                tl.store(d_weightings_ptr + h * slots + n, (1.0 - gate) * du, mask=there)
                part, d_key, d_beta = content_backward(
                    gate * du, content, K, norms, key_norm, softplus(raw_beta), memory, key
                )
                tl.store(padded(d_memory_ptr, BN, BW), d_memory + part)
                if SQUASH:
                    d_key *= 1.0 - key * key
                tl.store(dp + m, d_key, mask=m < width)
                tl.store(dp + width, d_beta * sigmoid(raw_beta))
                d_gate = tl.sum(du * (content - prev), axis=0)
                tl.store(dp + width + 1, d_gate * gate * (1.0 - gate))
                d_shift = shift * (d_shift - tl.sum(d_shift * shift, axis=0))
                tl.store(dp + width + 2 + s, d_shift, mask=s < taps)
                tl.store(dp + width + 2 + taps, d_gamma * sigmoid(raw_gamma))
                tl.debug_barrier()

            controller_backward(
                d_feature, f_c, dp, weight_ptr, head_weight_ptr, cell_ptr,
                initial_cell_ptr, features_ptr + row * feature_width, kept,
                record_ptr + before * record, below_ptr, d_hidden_ptr, d_cell_ptr, d_reads_ptr,
                dz_ptr + row * LAYERS * control * G, first, follows, cut, b, batch, control, values,
                read_width, LAYERS, LSTM, ACC, BC, BK,
            )  # fmt: skip

            if reset_ptr is not None:
                if cut:
                    hand_over(grads, of_initial, b, states, read_width, LSTM, BN, BW, BC)
                    to = i_weightings_ptr + b * heads * slots
                    move(d_weightings_ptr, to, heads * slots, BC)
                tl.debug_barrier()
