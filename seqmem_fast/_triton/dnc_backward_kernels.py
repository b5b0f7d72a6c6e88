"""The whole DNC sequence of a batch row in one program, backward.

    for each segment of steps, the last one first:
        from its checkpoint: the memory, links and precedence that enter each of its steps
        for each step, the last one first:
            the weightings that entered it, and the allocations of its heads once more
            directions: L w^r and L^T w^r, with L formed again from what entered, tile by tile
            read heads: reads, modes, sharpening, content of the new memory
            links and precedence; the write; write heads in reverse: gates, allocation, content
            usage and free gates; the layer norm; the controller

Whatever is carried from step to step, the memory's gradient and links included, rests in global
memory, which for one row is L2: in registers it would make the rest spill. Weight gradients are
left to matrix products over dz and dp of all steps. Letters: dnc_kernels.py.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import sigmoid
from .controller_kernels import controller_backward
from .dnc_backward_parts import (
    entering,
    erased,
    next_links,
    normalised_backward,
    rewritten,
    unfreed,
    unwritten,
    zero,
)
from .dnc_backward_passes import reads_backward, write_heads_backward, writes_backward
from .dnc_parts import (
    allocation,
    directions,
    head_parts,
    normalised,
    preceding,
)
from .machine_kernels import (
    copy,
    hand_over,
    head_offset,
    move,
    of_step,
    origin,
    padded,
    softmax_of,
    softplus,
    this_row,
    with_trace,
)

VARYING = ("steps", "batch", "segment")


@triton.jit(do_not_specialize=VARYING)
def dnc_backward(
    grad_features_ptr,  # [T, B, C + R * M] with strides, or None
    grad_usage_trace_ptr,  # [T, B, N], dense, or None, as the next two
    grad_write_trace_ptr,  # [T, B, W, N]
    grad_read_trace_ptr,  # [T, B, R, N]
    weight_ptr,  # backward weights of all layers
    head_weight_ptr,  # [P, C]
    norm_weight_ptr,  # [P] or None both
    norm_bias_ptr,
    cell_ptr,  # [L, B, C] the first state's, as the next three
    usage_ptr,  # [B, N]
    write_weights_ptr,  # [B, W, N]
    read_weights_ptr,  # [B, R, N]
    initial_cell_ptr,  # wide; what reset goes back to, or None all seven
    initial_memory_ptr,  # [BN, BW], zero outside [N, M]
    initial_usage_ptr, initial_link_ptr, initial_precedence_ptr,
    initial_write_weights_ptr, initial_read_weights_ptr,
    lengths_ptr,  # [B] int64 or None
    reset_ptr,  # [T, B] uint8 or None
    features_ptr,  # [T, B, C + R * M]
    usage_trace_ptr,  # [T, B, N]
    write_trace_ptr,  # [T, B, W, N]
    read_trace_ptr,  # [T, B, R, N]
    record_ptr,  # [T, B, record] wide
    memories_ptr,  # [segments, B, ...] wide, as the forward
    links_ptr,
    precedences_ptr,
    segment_memories_ptr,  # [B, segment, BN, BW] wide scratch: what enters each step of a segment
    segment_links_ptr,  # [B, segment, W, N, N]
    segment_precedences_ptr,  # [B, segment, W, N]
    normalised_ptr,  # [B, segment, P] or None as the norm
    below_ptr,  # [B, C] wide scratch
    scratch_ptr,  # [B, scratch] wide
    d_hidden_ptr,  # [B, L, C] wide: of the last state before, of the first after, as all d_*
    d_cell_ptr,  # [B, L, C]
    d_memory_ptr,  # [B, BN, BW], zero outside [N, M]
    d_usage_ptr,  # [B, N]
    d_link_ptr,  # [B, W, N, N]
    d_precedence_ptr,  # [B, W, N]
    d_write_weights_ptr,  # [B, W, N]
    d_read_weights_ptr,  # [B, R, N]
    d_reads_ptr,  # [B, R * M]
    i_hidden_ptr,  # the gradients of initial, a part for each row, zeros coming in; or None
    i_cell_ptr,
    i_memory_ptr,
    i_usage_ptr,
    i_link_ptr,
    i_precedence_ptr,
    i_write_weights_ptr,
    i_read_weights_ptr,
    i_reads_ptr,
    dz_ptr,  # [T, B, L, C * G] wide
    dp_ptr,  # [T, B, P] wide
    dq_ptr,  # [T, B, P] wide: of the norm's result, or None as the norm
    steps, batch, record, scratch, checkpoint, segment, control, slots, width, values,
    read_width,  # R * M
    reads, writes, f_t, f_b, f_c,
    LAYERS: tl.constexpr, LSTM: tl.constexpr, SQUASH: tl.constexpr, STRENGTH: tl.constexpr,
    NORM_FLOOR: tl.constexpr, EPS: tl.constexpr, MASK_MIN: tl.constexpr, MASKS: tl.constexpr,
    DEALLOCATE: tl.constexpr, SHARPEN: tl.constexpr, LINKS: tl.constexpr, SOFTMAX: tl.constexpr,
    USAGE_GRADIENT: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    b, length, n, m, there = this_row(lengths_ptr, steps, slots, BN, BW)
    G: tl.constexpr = 4 if LSTM else 1
    states = LAYERS * control
    feature_width = control + read_width
    squares = writes * slots * slots
    head_at = head_offset(control, LAYERS, LSTM)
    (
        _read_strength_at, _write_key_at, _write_strength_at, erase_at, add_at, free_at,
        allocation_gate_at, write_gate_at, _mode_at, _write_mask_at, _read_mask_at, _sharpness_at,
        strength_at,
    ) = head_parts(reads, writes, width, MASKS, SHARPEN, LINKS)  # fmt: skip
    below_ptr += b * control
    d_hidden_ptr += b * states
    d_cell_ptr += b * states
    d_memory_ptr += b * BN * BW
    d_usage_ptr += b * slots
    d_link_ptr += b * squares
    d_precedence_ptr += b * writes * slots
    d_write_weights_ptr += b * writes * slots
    d_read_weights_ptr += b * reads * slots
    d_reads_ptr += b * read_width
    segment_memories_ptr += b * segment * BN * BW
    segment_links_ptr += b * segment * squares
    segment_precedences_ptr += b * segment * writes * slots
    # Scratch: vectors over slots that enter a step, then what its backward passes on.
    usage_before = scratch_ptr + b * scratch
    write_before = usage_before + slots
    read_before = write_before + writes * slots
    allocated = read_before + reads * slots  # per write head usage, then allocation
    direction = allocated + 2 * writes * slots
    d_direction = direction + 2 * writes * reads * slots
    d_along = d_direction + 2 * writes * reads * slots
    d_across = d_along + reads * slots
    d_written = d_across + reads * slots
    d_rows = d_written + writes * slots
    sorting = d_rows + slots  # [3, BN]

    grads = (d_hidden_ptr, d_cell_ptr, d_memory_ptr, d_reads_ptr)
    of_initial = (i_hidden_ptr, i_cell_ptr, i_memory_ptr, i_reads_ptr)
    segments = tl.cdiv(length, segment)
    for passed in tl.range(0, segments, disable_licm=True):
        begin = (segments - 1 - passed) * segment
        end = tl.minimum(begin + segment, length)
        stored = (begin // segment * batch + b) * checkpoint
        inside = there[:, None] & (m < width)[None, :]
        memory = tl.load(
            memories_ptr + stored + n[:, None] * width + m[None, :], mask=inside, other=0.0
        )
        if LINKS:
            copy(links_ptr + stored, segment_links_ptr, squares, 8 * BC)
            copy(precedences_ptr + stored, segment_precedences_ptr, writes * slots, BC)
        for t in tl.range(begin, end, disable_licm=True):
            row = b + t * batch
            before = row - batch
            first, follows, cut = origin(reset_ptr, row, t)
            link = segment_links_ptr + (t - begin) * squares
            precedence = segment_precedences_ptr + (t - begin) * writes * slots
            if reset_ptr is not None:
                again = there[:, None] & cut & (t > begin)
                memory = tl.load(padded(initial_memory_ptr, BN, BW), mask=again, other=memory)
                if LINKS:
                    tl.debug_barrier()
                    if cut:
                        copy(initial_link_ptr, link, squares, 8 * BC)
                        copy(initial_precedence_ptr, precedence, writes * slots, BC)
            tl.store(padded(segment_memories_ptr + (t - begin) * BN * BW, BN, BW), memory)
            q = record_ptr + row * record + head_at
            if norm_weight_ptr is not None:
                raw = q
                q = normalised_ptr + (b * segment + t - begin) * values
                normalised(raw, q, norm_weight_ptr, norm_bias_ptr, values, ACC, BC)
            entering(
                read_weights_ptr + b * reads * slots, read_trace_ptr + before * reads * slots,
                initial_read_weights_ptr, read_before, reads * slots, first, follows, cut, BC,
            )  # fmt: skip
            tl.debug_barrier()
            wrote = write_trace_ptr + row * writes * slots
            kept = unfreed(read_before, q + free_at, -1, reads, slots, ACC, BN)
            memory = rewritten(
                memory, kept, wrote, q + erase_at, q + add_at, writes, slots, width, SQUASH,
                DEALLOCATE, ACC, BN, BW,
            )  # fmt: skip
            if LINKS:
                if t + 1 < end:
                    for h in tl.range(0, writes, disable_licm=True):
                        next_links(
                            link + h * slots * slots, link + squares + h * slots * slots,
                            precedence + h * slots, wrote + h * slots, slots, BN, BI,
                        )  # fmt: skip
                        preceding(
                            precedence + h * slots, precedence + (writes + h) * slots,
                            wrote + h * slots, slots, BN,
                        )  # fmt: skip
            tl.debug_barrier()

        for back in tl.range(0, end - begin, disable_licm=True):
            t = end - 1 - back
            row = b + t * batch
            before = row - batch
            first, follows, cut = origin(reset_ptr, row, t)
            kept_ptr = record_ptr + row * record
            q = kept_ptr + head_at
            dp = dp_ptr + row * values
            dq = dp
            if norm_weight_ptr is not None:
                q = normalised_ptr + (b * segment + t - begin) * values
                dq = dq_ptr + row * values
            d_feature = of_step(grad_features_ptr, b, t, f_b, f_t)
            link = segment_links_ptr + (t - begin) * squares
            precedence = segment_precedences_ptr + (t - begin) * writes * slots
            wrote = write_trace_ptr + row * writes * slots

            entering(
                usage_ptr + b * slots, usage_trace_ptr + before * slots, initial_usage_ptr,
                usage_before, slots, first, follows, cut, BC,
            )  # fmt: skip
            entering(
                write_weights_ptr + b * writes * slots, write_trace_ptr + before * writes * slots,
                initial_write_weights_ptr, write_before, writes * slots, first, follows, cut, BC,
            )  # fmt: skip
            entering(
                read_weights_ptr + b * reads * slots, read_trace_ptr + before * reads * slots,
                initial_read_weights_ptr, read_before, reads * slots, first, follows, cut, BC,
            )  # fmt: skip
            zero(d_along, 2 * reads * slots, BC)
            tl.debug_barrier()
            if LINKS:
                for h in tl.range(0, writes, disable_licm=True):
                    directions(
                        link + h * slots * slots, precedence + h * slots, wrote + h * slots,
                        read_before, direction + 2 * h * reads * slots, slots, reads, False, BN,
                        BI,
                    )  # fmt: skip
            u = tl.load(usage_trace_ptr + row * slots + n, mask=there, other=0.0).to(ACC)
            for h in tl.range(0, writes, disable_licm=True):
                if SOFTMAX:
                    a = softmax_of(
                        (1.0 + softplus(tl.load(q + strength_at + h))) * (1.0 - u), there
                    )
                else:
                    a = allocation(u, sorting, slots, BN, BI)
                tl.store(allocated + 2 * h * slots + n, u, mask=there)
                tl.store(allocated + (2 * h + 1) * slots + n, a, mask=there)
                gate = sigmoid(tl.load(q + allocation_gate_at + h))
                u += (1.0 - u) * (gate * sigmoid(tl.load(q + write_gate_at + h))) * a
            kept = unfreed(read_before, q + free_at, -1, reads, slots, ACC, BN)
            memory = rewritten(
                tl.load(padded(segment_memories_ptr + (t - begin) * BN * BW, BN, BW)), kept,
                wrote, q + erase_at, q + add_at, writes, slots, width, SQUASH, DEALLOCATE, ACC,
                BN, BW,
            )  # fmt: skip

            d_memory = reads_backward(
                memory, tl.load(padded(d_memory_ptr, BN, BW)), q, dq,
                read_trace_ptr + row * reads * slots, direction, d_reads_ptr, d_read_weights_ptr,
                grad_read_trace_ptr, row, d_feature, f_c, d_direction, control, slots, width, reads,
                writes, SQUASH, MASKS, SHARPEN, LINKS, STRENGTH, NORM_FLOOR, EPS, MASK_MIN, ACC, BN,
                BW, BD,
            )  # fmt: skip
            tl.debug_barrier()  # several threads load what one stores
            tl.store(padded(d_memory_ptr, BN, BW), d_memory)
            tl.debug_barrier()

            writes_backward(
                segment_memories_ptr + (t - begin) * BN * BW, d_memory_ptr, kept, q, dq, wrote,
                link, precedence, read_before, d_write_weights_ptr, grad_write_trace_ptr, row,
                d_link_ptr, d_precedence_ptr, d_direction, d_along, d_across, d_rows, d_written,
                slots, width, reads, writes, SQUASH, MASKS, SHARPEN, LINKS, DEALLOCATE, ACC, BN, BI,
                BW,
            )  # fmt: skip
            memory = tl.load(padded(segment_memories_ptr + (t - begin) * BN * BW, BN, BW))
            d_memory = tl.load(padded(d_memory_ptr, BN, BW))
            d_kept = tl.zeros([BN], ACC)
            if DEALLOCATE:
                factor = erased(
                    kept, wrote, q + erase_at, -1, writes, slots, width, False, ACC, BN, BW
                )
                d_kept += tl.sum(d_memory * memory * factor, axis=1)
            d_memory *= erased(
                kept, wrote, q + erase_at, -1, writes, slots, width, DEALLOCATE, ACC, BN, BW
            )
            tl.debug_barrier()

            d_memory, du = write_heads_backward(
                memory, d_memory, q, dq, allocated, d_written, sorting, slots, width, reads, writes,
                SQUASH, MASKS, SHARPEN, LINKS, SOFTMAX, STRENGTH, NORM_FLOOR, EPS, MASK_MIN, ACC,
                BN, BI, BW,
            )  # fmt: skip
            tl.store(padded(d_memory_ptr, BN, BW), d_memory)

            du += tl.load(d_usage_ptr + n, mask=there, other=0.0)
            du = with_trace(du, grad_usage_trace_ptr, row * slots, there, ACC, BN)
            u = tl.load(usage_before + n, mask=there, other=0.0)
            free = unwritten(write_before, -1, writes, slots, ACC, BN)
            d_kept += du * (u + (1.0 - u) * (1.0 - free))
            du *= kept
            tl.debug_barrier()  # several threads load what one stores
            tl.store(d_usage_ptr + n, du * free, mask=there)
            for h in tl.range(0, writes, disable_licm=True):
                dw = tl.zeros([BN], ACC)
                if USAGE_GRADIENT:
                    dw += du * (1.0 - u) * unwritten(write_before, h, writes, slots, ACC, BN)
                tl.store(d_write_weights_ptr + h * slots + n, dw, mask=there)
            for r in tl.range(0, reads, disable_licm=True):
                others = d_kept * unfreed(read_before, q + free_at, r, reads, slots, ACC, BN)
                gate = sigmoid(tl.load(q + free_at + r))
                w = tl.load(read_before + r * slots + n, mask=there, other=0.0)
                d_gate = -tl.sum(others * w, axis=0) * gate * (1.0 - gate)
                tl.store(dq + free_at + r, d_gate)
                dw = tl.load(d_along + r * slots + n, mask=there, other=0.0) - gate * others
                dw += tl.load(d_across + r * slots + n, mask=there, other=0.0)
                tl.store(d_read_weights_ptr + r * slots + n, dw, mask=there)
            tl.debug_barrier()

            if norm_weight_ptr is not None:
                normalised_backward(dq, dp, kept_ptr + head_at, norm_weight_ptr, values, ACC, BC)
                tl.debug_barrier()
            controller_backward(
                d_feature, f_c, dp, weight_ptr, head_weight_ptr, cell_ptr, initial_cell_ptr,
                features_ptr + row * feature_width, kept_ptr, record_ptr + before * record,
                below_ptr, d_hidden_ptr, d_cell_ptr, d_reads_ptr,
                dz_ptr + row * LAYERS * control * G, first, follows, cut, b, batch, control,
                values, read_width, LAYERS, LSTM, ACC, BC, BK,
            )  # fmt: skip

            if reset_ptr is not None:
                if cut:
                    hand_over(grads, of_initial, b, states, read_width, LSTM, BN, BW, BC)
                    move(d_usage_ptr, i_usage_ptr + b * slots, slots, BC)
                    if LINKS:
                        move(d_link_ptr, i_link_ptr + b * squares, squares, 8 * BC)
                        to = i_precedence_ptr + b * writes * slots
                        move(d_precedence_ptr, to, writes * slots, BC)
                    to = i_write_weights_ptr + b * writes * slots
                    move(d_write_weights_ptr, to, writes * slots, BC)
                    to = i_read_weights_ptr + b * reads * slots
                    move(d_read_weights_ptr, to, reads * slots, BC)
                tl.debug_barrier()
