"""The whole sequence of a row of the memory with least recently used access in one program.

Usage stays in registers over all steps. The memory, the weightings, slots and everything that
passes between heads rest in global scratch that only this program touches, with a barrier between:
a memory of 128 by 40 in registers would make the controller's products spill. The controller:
`controller_kernels.py`.

A step has three passes over the heads: they choose their slots, all write, all read. Backward: the
memories that the steps left are recomputed from a checkpoint, a segment at a time, from the
weightings, slots and head values that were kept; of a step, the heads' reading in reverse, then
their writing. The memory's gradient rests in global scratch. Weight gradients are left to matrix
products over dz and dp of all steps.

Letters: G 4 gates or 1, P head values, R heads. A head's values: key M, add M (OWN), gate 1,
strength 1 (STRENGTH).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import sigmoid
from .controller_kernels import controller_backward, controller_forward
from .lrua_parts import gate_at, head_size, kept_of, strength_of, write_weights_of
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
    start_anew,
    this_row,
    vector,
    with_trace,
)

VARYING = ("steps", "batch", "record_rows", "erased", "segment")


@triton.jit(do_not_specialize=VARYING)
def lrua_forward(
    zx_ptr,  # [T, B, C * G] the input's part of the first layer, with its bias
    weight_ptr,  # forward weights of all layers
    bias_ptr,  # [L, C * G]; the first layer's is in zx
    head_weight_ptr,  # [C, P]
    head_bias_ptr,  # [P]
    hidden_ptr,  # [2, B, L, C] the state, in and out, at even and odd steps
    cell_ptr,  # [B, L, C] the state, in and out; all six are wide scratch
    memory_ptr,  # [B, BN, BW], zero outside [N, M]
    usage_ptr,  # [B, N]
    read_weights_ptr,  # [B, R, N] read with
    reads_ptr,  # [B, R * M]
    initial_hidden_ptr,  # [L, C] wide; what reset goes back to, or None all six
    initial_cell_ptr,
    initial_memory_ptr,  # [BN, BW], zero outside [N, M]
    initial_usage_ptr,  # [N]
    initial_read_weights_ptr,  # [R, N]
    initial_reads_ptr,  # [R * M]
    lengths_ptr,  # [B] int64 or None
    reset_ptr,  # [T, B] uint8 or None
    features_ptr,  # [T, B, C + R * M]
    hidden_out_ptr,  # [B, L, C]; None without LSTM
    usage_trace_ptr,  # [T, B, N] or None
    write_trace_ptr,  # [T, B, R, N] or None
    read_trace_ptr,  # [T, B, R, N] or None
    slots_ptr,  # [T, B, R] int64, one step long where nothing is saved, as the next
    record_ptr,  # [T, B, record] wide
    checkpoints_ptr,  # [segments, B, checkpoint] wide, or None
    steps, batch,
    record_rows,  # from a step's record of this row to the next's: 0 without saving
    record,  # elements of one
    checkpoint,  # as record
    segment,
    control,  # C
    slots, width,
    values,  # P
    heads,
    erased,  # how many of the chosen slots are set to zero
    read_width,  # R * M
    LAYERS: tl.constexpr, LSTM: tl.constexpr, OWN: tl.constexpr, STRENGTH: tl.constexpr,
    GAMMA: tl.constexpr,  # an argument would be rounded to float32
    ACC: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    b, length, n, _m, there = this_row(lengths_ptr, steps, slots, BN, BW)
    G: tl.constexpr = 4 if LSTM else 1
    memory_ptr += b * BN * BW
    usage = tl.load(usage_ptr + b * slots + n, mask=there, other=0.0)
    states = LAYERS * control
    read_weights_ptr += b * heads * slots
    reads_ptr += b * read_width
    cell_ptr += b * states
    feature_width = control + read_width
    head_at = head_offset(control, LAYERS, LSTM)
    size = head_size(width, OWN, STRENGTH)
    initial = (initial_hidden_ptr, initial_cell_ptr, initial_reads_ptr)
    state = (cell_ptr, reads_ptr)

    for t in range(length):
        row = b + t * batch
        old, new = hidden_of(hidden_ptr, t, b, batch, states)
        kept = record_ptr + (b + t * record_rows) * record
        chosen = slots_ptr + (b + t * record_rows) * heads
        feature = features_ptr + row * feature_width
        if reset_ptr is not None:
            cut = tl.load(reset_ptr + row) != 0
            usage = tl.load(initial_usage_ptr + n, mask=there & cut, other=usage)
            if cut:
                copy(initial_memory_ptr, memory_ptr, BN * BW, BC)
                start_anew(initial, state, old, states, read_width, LSTM, BC)
                copy(initial_read_weights_ptr, read_weights_ptr, heads * slots, BC)
            tl.debug_barrier()
        if checkpoints_ptr is not None:
            if t % segment == 0:
                at = checkpoints_ptr + (t // segment * batch + b) * checkpoint
                to, inside = block_of(at, slots, width, BN, BW)
                tl.store(to, tl.load(padded(memory_ptr, BN, BW)), mask=inside)

        controller_forward(
            zx_ptr + row * control * G, weight_ptr, bias_ptr, head_weight_ptr, head_bias_ptr,
            reads_ptr, old, new, cell_ptr, feature, kept, control, values, read_width, LAYERS, LSTM,
            ACC, BC, BK,
        )  # fmt: skip
        p = kept + head_at

        # NaN counts as infinite; what has been chosen is out.
        rank = tl.where(usage == usage, usage, float("inf"))
        free = there
        for h in range(heads):
            least = tl.min(tl.where(free, rank, float("inf")), axis=0)
            slot = tl.min(tl.where(free & (rank == least), n, BN), axis=0)
            free = free & (n != slot)
            tl.store(chosen + h, slot.to(tl.int64))
        tl.debug_barrier()

        memory = kept_of(tl.load(padded(memory_ptr, BN, BW)), chosen, erased, BN)
        used = tl.zeros([BN], ACC)
        for h in range(heads):
            at = p + h * size
            prev = tl.load(read_weights_ptr + h * slots + n, mask=there, other=0.0)
            w, _gate = write_weights_of(at, prev, tl.load(chosen + h), width, OWN, BN)
            add = vector(at + gate_at(width, OWN) - width, width, True, BW)
            memory += w[:, None] * add[None, :]
            used += w
            keep(write_trace_ptr, (row * heads + h) * slots, w, there, BN)
        tl.debug_barrier()  # memory and weightings of the step before have been read
        tl.store(padded(memory_ptr, BN, BW), memory)

        norms = tl.sqrt(tl.sum(memory * memory, axis=1))
        for h in range(heads):
            at = p + h * size
            key = vector(at, width, True, BW)
            key_norm = tl.sqrt(tl.sum(key * key, axis=0))
            K = tl.sum(memory * key[None, :], axis=1) / (norms * key_norm + 1e-8)
            w = softmax_of(strength_of(at, width, OWN, STRENGTH) * K, there)
            used += w
            tl.store(read_weights_ptr + h * slots + n, w, mask=there)
            keep(read_trace_ptr, (row * heads + h) * slots, w, there, BN)
            seen = feature + control + h * width
            read_out(w, memory, reads_ptr + h * width, seen, width, BW)
        usage = GAMMA * usage + used
        keep(usage_trace_ptr, row * slots, usage, there, BN)
        tl.debug_barrier()

    if LSTM:
        last, _ = hidden_of(hidden_ptr, length, b, batch, states)
        copy(last, hidden_out_ptr + b * states, states, BC)
    tl.store(usage_ptr + b * slots + n, usage, mask=there)


@triton.jit(do_not_specialize=VARYING)
def lrua_backward(
    grad_features_ptr,  # [T, B, C + R * M] with strides, or None
    grad_write_trace_ptr,  # [T, B, R, N], dense, or None
    grad_read_trace_ptr,  # [T, B, R, N], dense, or None
    weight_ptr,  # backward weights of all layers
    head_weight_ptr,  # [P, C]
    cell_ptr,  # [L, B, C] the first state's; None without LSTM
    read_weights_ptr,  # [B, R, N] the first state's
    initial_cell_ptr,  # wide; what reset goes back to, or None all three
    initial_memory_ptr,  # [BN, BW], zero outside [N, M]
    initial_read_weights_ptr,
    lengths_ptr,  # [B] int64 or None
    reset_ptr,  # [T, B] uint8 or None
    features_ptr,  # [T, B, C + R * M]
    trace_ptr,  # [T, B, R, N]
    slots_ptr,  # [T, B, R] int64
    record_ptr,  # [T, B, record] wide
    checkpoints_ptr,  # [segments, B, checkpoint] wide
    memories_ptr,  # [B, segment, BN, BW] wide scratch: what each step of a segment left
    below_ptr,  # [B, C] wide scratch
    d_hidden_ptr,  # [B, L, C] wide: of the last state before, of the first after, as all d_*
    d_cell_ptr,  # [B, L, C]
    d_memory_ptr,  # [B, BN, BW], zero outside [N, M]
    d_read_weights_ptr,  # [B, R, N]
    d_reads_ptr,  # [B, R * M]
    i_hidden_ptr,  # the gradients of initial, a part for each row, zeros coming in; or None
    i_cell_ptr,
    i_memory_ptr,
    i_read_weights_ptr,
    i_reads_ptr,
    dz_ptr,  # [T, B, L, C * G] wide
    dp_ptr,  # [T, B, P] wide
    steps, batch, record, checkpoint, segment, control, slots, width, values, heads, erased,
    read_width, f_t, f_b, f_c,
    LAYERS: tl.constexpr, LSTM: tl.constexpr, OWN: tl.constexpr, STRENGTH: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    b, length, n, m, there = this_row(lengths_ptr, steps, slots, BN, BW)
    G: tl.constexpr = 4 if LSTM else 1
    states = LAYERS * control
    feature_width = control + read_width
    head_at = head_offset(control, LAYERS, LSTM)
    size = head_size(width, OWN, STRENGTH)
    read_weights_ptr += b * heads * slots
    below_ptr += b * control
    d_hidden_ptr += b * states
    d_cell_ptr += b * states
    d_read_weights_ptr += b * heads * slots
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
            cut = t < 0
            if reset_ptr is not None:
                cut = tl.load(reset_ptr + row) != 0
                again = there[:, None] & cut
                memory = tl.load(padded(initial_memory_ptr, BN, BW), mask=again, other=memory)
            first = (t == 0) & (cut == 0)
            follows = (t > 0) & (cut == 0)
            memory = kept_of(memory, slots_ptr + row * heads, erased, BN)
            for h in range(heads):
                at = record_ptr + row * record + head_at + h * size
                prev = previous(
                    read_weights_ptr, trace_ptr + (row - batch) * heads * slots,
                    initial_read_weights_ptr, h, slots, first, follows, cut, ACC, BN,
                )  # fmt: skip
                slot = tl.load(slots_ptr + row * heads + h)
                w, _gate = write_weights_of(at, prev, slot, width, OWN, BN)
                add = vector(at + gate_at(width, OWN) - width, width, True, BW)
                memory += w[:, None] * add[None, :]
            tl.store(padded(memories_ptr + (t - begin) * BN * BW, BN, BW), memory)
        tl.debug_barrier()

        for back in range(end - begin):
            t = end - 1 - back
            row = b + t * batch
            before = row - batch
            first, follows, cut = origin(reset_ptr, row, t)
            kept = record_ptr + row * record
            p = kept + head_at
            dp = dp_ptr + row * values
            chosen = slots_ptr + row * heads
            d_feature = of_step(grad_features_ptr, b, t, f_b, f_t)

            # Reads: from dw and dread to the gradients of memory, key and strength.
            memory = tl.load(padded(memories_ptr + (t - begin) * BN * BW, BN, BW))
            for h in range(heads):
                at = p + h * size
                key = vector(at, width, True, BW)
                K, norms, key_norm = similarity(memory, key)
                beta = strength_of(at, width, OWN, STRENGTH)
                w = softmax_of(beta * K, there)
                dw = tl.load(d_read_weights_ptr + h * slots + n, mask=there, other=0.0)
                at_trace = (row * heads + h) * slots
                dw = with_trace(dw, grad_read_trace_ptr, at_trace, there, ACC, BN)
                d_read = read_gradient(
                    d_reads_ptr, d_feature, f_c, control, h * width, width, ACC, BW
                )
                dw += tl.sum(memory * d_read[None, :], axis=1)
                dw = tl.where(there, dw, 0.0)
                part, d_key, d_beta = content_backward(dw, w, K, norms, key_norm, beta, memory, key)
                d_memory = tl.load(padded(d_memory_ptr, BN, BW))
                d_memory += w[:, None] * d_read[None, :] + part
                tl.store(padded(d_memory_ptr, BN, BW), d_memory)
                if OWN:
                    d_key *= 1.0 - key * key
                tl.store(dp + h * size + m, d_key, mask=m < width)
                if STRENGTH:
                    of_strength = gate_at(width, OWN) + 1
                    slope = sigmoid(tl.load(at + of_strength))
                    tl.store(dp + h * size + of_strength, d_beta * slope)
                tl.debug_barrier()

            # Writes: to the gradients of add, gate and the weightings before.
            for h in range(heads):
                at = p + h * size
                d_memory = tl.load(padded(d_memory_ptr, BN, BW))
                prev = previous(
                    read_weights_ptr, trace_ptr + before * heads * slots,
                    initial_read_weights_ptr, h, slots, first, follows, cut, ACC, BN,
                )  # fmt: skip
                slot = tl.load(chosen + h)
                w, gate = write_weights_of(at, prev, slot, width, OWN, BN)
                of_add = gate_at(width, OWN) - width
                add = vector(at + of_add, width, True, BW)
                d_add = tl.sum(d_memory * w[:, None], axis=0)
                dw = tl.sum(d_memory * add[None, :], axis=1)
                at_trace = (row * heads + h) * slots
                dw = with_trace(dw, grad_write_trace_ptr, at_trace, there, ACC, BN)
                to = dp + h * size + of_add + m
                if OWN == 0:  # what is added is the key
                    d_add += tl.load(to, mask=m < width, other=0.0)
                    tl.debug_barrier()  # several threads load what one stores
                tl.store(to, d_add * (1.0 - add * add), mask=m < width)
                d_gate = tl.sum(dw * prev, axis=0) - tl.sum(tl.where(n == slot, dw, 0.0), axis=0)
                to_gate = dp + h * size + gate_at(width, OWN)
                tl.store(to_gate, d_gate * gate * (1.0 - gate))
                tl.store(d_read_weights_ptr + h * slots + n, gate * dw, mask=there)
            tl.debug_barrier()
            d_memory = tl.load(padded(d_memory_ptr, BN, BW))
            tl.debug_barrier()
            tl.store(padded(d_memory_ptr, BN, BW), kept_of(d_memory, chosen, erased, BN))

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
                    to = i_read_weights_ptr + b * heads * slots
                    move(d_read_weights_ptr, to, heads * slots, BC)
                tl.debug_barrier()
