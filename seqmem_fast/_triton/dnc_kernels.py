"""The whole DNC sequence of a batch row in one program, forward.

    for each step:
        h = controller(x, reads);  p = W h + b, layer norm where asked for
        usage from the weights of the step before
        per write head: w = gates of allocation(usage) and content(memory)
        memory = memory * prod (1 - w e) + sum w v
        per write head, a tile of rows of its links after the other:
            L = (1 - w_i - w_j) L + w_i p_j;  forward = L w^r;  backward += L^T w^r
        per read head: w^r = modes of backward, content(memory), forward;  read = M^T w^r

The row's memory stays in registers over all steps; links are in global memory, which for one row
is L2, and pass through registers once a step. Vectors that are summed over pass through global
scratch that only this program touches, with a barrier between. Allocation sorts nothing: the
product before slot i is that of all v_j with v_j < v_i, or equal and j < i, out of N x N compares.

Letters: R read heads, W write heads, D = 1 + 2 W modes, P head values; machine_kernels.py's.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import sigmoid
from .controller_kernels import controller_forward
from .dnc_parts import (
    allocation,
    content_of,
    direction_of,
    directions,
    element,
    head_parts,
    normalised,
)
from .machine_kernels import (
    copy,
    head_offset,
    hidden_of,
    keep,
    read_out,
    softmax_of,
    softplus,
    start_anew,
    started,
    this_row,
    vector,
)

VARYING = ("steps", "batch", "record_rows", "segment")


@triton.jit(do_not_specialize=VARYING)
def dnc_forward(
    zx_ptr,  # [T, B, C * G] the input's part of the first layer, with its bias
    weight_ptr,  # forward weights of all layers
    bias_ptr,  # [L, C * G]; the first layer's is in zx
    head_weight_ptr,  # [C, P]
    head_bias_ptr,  # [P]
    norm_weight_ptr,  # [P], or None both
    norm_bias_ptr,
    hidden_ptr,  # [2, B, L, C] the state, in and out, at even and odd steps; wide, as all states
    cell_ptr,  # [B, L, C] the state, in and out, as the next six
    usage_ptr,  # [B, N]
    link_ptr,  # [B, W, N, N]; without links this and the next are not read
    precedence_ptr,  # [B, W, N]
    write_weights_ptr,  # [B, W, N]
    read_weights_ptr,  # [B, R, N]
    reads_ptr,  # [B, R * M]
    initial_hidden_ptr,  # [L, C] wide; what reset goes back to, or None all nine
    initial_cell_ptr,
    initial_memory_ptr,  # [BN, BW], zero outside [N, M]
    initial_usage_ptr,
    initial_link_ptr,
    initial_precedence_ptr,
    initial_write_weights_ptr,
    initial_read_weights_ptr,
    initial_reads_ptr,
    memory_ptr,  # [B, N, M]
    lengths_ptr,  # [B] int64 or None
    reset_ptr,  # [T, B] uint8 or None
    features_ptr,  # [T, B, C + R * M]
    hidden_out_ptr,  # [B, L, C]
    memory_out_ptr,  # [B, N, M]
    usage_trace_ptr,  # [T, B, N], or None all three
    write_trace_ptr,  # [T, B, W, N]
    read_trace_ptr,  # [T, B, R, N]
    record_ptr,  # [T, B, record] wide: gates, cells and head values; one step if nothing is saved
    memories_ptr,  # [segments, B, ...] wide: where a segment starts, or None all three
    links_ptr,
    precedences_ptr,
    normalised_ptr,  # [B, P] wide scratch, or None as the norm
    scratch_ptr,  # [B, 2 * BN + W * R * 2 * N] wide: of allocation, and the directions
    steps, batch,
    record_rows,  # from a step's record of this row to the next's: 0 without saving
    record,  # elements of one
    scratch,  # as record
    checkpoint,  # as record, of memories, links and precedences
    segment,
    control,  # C
    slots, width,
    values,  # P
    read_width,  # R * M
    reads, writes,
    LAYERS: tl.constexpr, LSTM: tl.constexpr, SQUASH: tl.constexpr,
    STRENGTH: tl.constexpr,  # the least
    NORM_FLOOR: tl.constexpr, EPS: tl.constexpr, MASK_MIN: tl.constexpr, MASKS: tl.constexpr,
    DEALLOCATE: tl.constexpr, SHARPEN: tl.constexpr, LINKS: tl.constexpr, SOFTMAX: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    b, length, n, m, there = this_row(lengths_ptr, steps, slots, BN, BW)
    G: tl.constexpr = 4 if LSTM else 1
    d = tl.arange(0, BD)
    inside = there[:, None] & (m < width)[None, :]
    of_memory = b * slots * width + n[:, None] * width + m[None, :]
    memory = tl.load(memory_ptr + of_memory, mask=inside, other=0.0).to(ACC)
    states = LAYERS * control
    cell_ptr += b * states
    usage_ptr += b * slots
    link_ptr += b * writes * slots * slots
    precedence_ptr += b * writes * slots
    write_weights_ptr += b * writes * slots
    read_weights_ptr += b * reads * slots
    reads_ptr += b * read_width
    scratch_ptr += b * scratch
    direction_ptr = scratch_ptr + 2 * BN
    feature_width = control + read_width
    head_at = head_offset(control, LAYERS, LSTM)
    modes = 1 + 2 * writes
    (
        read_strength_at, write_key_at, write_strength_at, erase_at, add_at, free_at,
        allocation_gate_at, write_gate_at, mode_at, write_mask_at, read_mask_at, sharpness_at,
        strength_at,
    ) = head_parts(reads, writes, width, MASKS, SHARPEN, LINKS)  # fmt: skip
    initial = (initial_hidden_ptr, initial_cell_ptr, initial_reads_ptr)
    state = (cell_ptr, reads_ptr)

    for t in tl.range(0, length, disable_licm=True):
        row = b + t * batch
        old, new = hidden_of(hidden_ptr, t, b, batch, states)
        kept_ptr = record_ptr + (b + t * record_rows) * record
        feature = features_ptr + row * feature_width
        if reset_ptr is not None:
            memory, cut = started(memory, reset_ptr + row, initial_memory_ptr, there, BN, BW)
            if cut:
                start_anew(initial, state, old, states, read_width, LSTM, BC)
                copy(initial_usage_ptr, usage_ptr, slots, BC)
                if LINKS:
                    copy(initial_link_ptr, link_ptr, writes * slots * slots, 8 * BC)
                    copy(initial_precedence_ptr, precedence_ptr, writes * slots, BC)
                copy(initial_write_weights_ptr, write_weights_ptr, writes * slots, BC)
                copy(initial_read_weights_ptr, read_weights_ptr, reads * slots, BC)
            tl.debug_barrier()
        if memories_ptr is not None:
            if t % segment == 0:
                at = (t // segment * batch + b) * checkpoint
                tl.store(memories_ptr + at + n[:, None] * width + m[None, :], memory, mask=inside)
                if LINKS:
                    copy(link_ptr, links_ptr + at, writes * slots * slots, 8 * BC)
                    copy(precedence_ptr, precedences_ptr + at, writes * slots, BC)

        controller_forward(
            zx_ptr + row * control * G, weight_ptr, bias_ptr, head_weight_ptr,
            head_bias_ptr, reads_ptr, old, new, cell_ptr, feature, kept_ptr, control, values,
            read_width, LAYERS, LSTM, ACC, BC, BK,
        )  # fmt: skip
        p = kept_ptr + head_at
        if norm_weight_ptr is not None:
            raw = p
            p = normalised_ptr + b * values
            normalised(raw, p, norm_weight_ptr, norm_bias_ptr, values, ACC, BC)

        kept = tl.full([BN], 1.0, ACC)
        for r in tl.range(0, reads, disable_licm=True):
            w = tl.load(read_weights_ptr + r * slots + n, mask=there, other=0.0)
            kept *= 1.0 - sigmoid(tl.load(p + free_at + r)) * w
        unwritten = tl.full([BN], 1.0, ACC)
        for h in tl.range(0, writes, disable_licm=True):
            unwritten *= 1.0 - tl.load(write_weights_ptr + h * slots + n, mask=there, other=0.0)
        u = tl.load(usage_ptr + n, mask=there, other=0.0)
        u = (u + (1.0 - u) * (1.0 - unwritten)) * kept
        tl.debug_barrier()  # several threads load what one stores
        tl.store(usage_ptr + n, u, mask=there)
        keep(usage_trace_ptr, row * slots, u, there, BN)

        for h in tl.range(0, writes, disable_licm=True):
            content = content_of(
                memory, vector(p + write_key_at + h * width, width, SQUASH, BW),
                tl.load(p + write_strength_at + h), p + write_mask_at + h * width, slots,
                width, MASKS, STRENGTH, NORM_FLOOR, EPS, MASK_MIN, BN, BW,
            )  # fmt: skip
            if SOFTMAX:
                strength = 1.0 + softplus(tl.load(p + strength_at + h))
                a = softmax_of(strength * (1.0 - u), there)
            else:
                a = allocation(u, scratch_ptr, slots, BN, BI)
            gate = sigmoid(tl.load(p + allocation_gate_at + h))
            write = sigmoid(tl.load(p + write_gate_at + h))
            w = write * (gate * a + (1.0 - gate) * content)
            u += (1.0 - u) * (gate * write) * a
            tl.store(write_weights_ptr + h * slots + n, w, mask=there)
            keep(write_trace_ptr, (row * writes + h) * slots, w, there, BN)
        tl.debug_barrier()
        if DEALLOCATE:
            memory *= kept[:, None]
        for h in tl.range(0, writes, disable_licm=True):
            w = tl.load(write_weights_ptr + h * slots + n, mask=there, other=0.0)
            erase = sigmoid(tl.load(p + erase_at + h * width + m, mask=m < width, other=0.0))
            memory *= 1.0 - w[:, None] * erase[None, :]
        for h in tl.range(0, writes, disable_licm=True):
            w = tl.load(write_weights_ptr + h * slots + n, mask=there, other=0.0)
            memory += w[:, None] * vector(p + add_at + h * width, width, SQUASH, BW)[None, :]

        if LINKS:
            for h in tl.range(0, writes, disable_licm=True):
                directions(
                    link_ptr + h * slots * slots, precedence_ptr + h * slots,
                    write_weights_ptr + h * slots, read_weights_ptr,
                    direction_ptr + 2 * h * reads * slots, slots, reads, True, BN, BI,
                )  # fmt: skip
            tl.debug_barrier()
        for r in tl.range(0, reads, disable_licm=True):
            content = content_of(
                memory, vector(p + r * width, width, SQUASH, BW), tl.load(p + read_strength_at + r),
                p + read_mask_at + r * width, slots, width, MASKS, STRENGTH, NORM_FLOOR, EPS,
                MASK_MIN, BN, BW,
            )  # fmt: skip
            if LINKS:
                mode = tl.load(p + mode_at + r * modes + d, mask=d < modes, other=0.0)
                mode = softmax_of(mode, d < modes)
                w = element(mode, writes, BD) * content
                for h in tl.range(0, writes, disable_licm=True):
                    at = direction_ptr + 2 * (h * reads + r) * slots
                    back = direction_of(at, p + sharpness_at + reads + r, slots, SHARPEN, BN)
                    w += element(mode, h, BD) * back
                    ahead = direction_of(at + slots, p + sharpness_at + r, slots, SHARPEN, BN)
                    w += element(mode, writes + 1 + h, BD) * ahead
            else:
                w = content
            tl.store(read_weights_ptr + r * slots + n, w, mask=there)
            keep(read_trace_ptr, (row * reads + r) * slots, w, there, BN)
            seen = feature + control + r * width
            read_out(w, memory, reads_ptr + r * width, seen, width, BW)
        tl.debug_barrier()

    if LSTM:
        last, _ = hidden_of(hidden_ptr, length, b, batch, states)
        copy(last, hidden_out_ptr + b * states, states, BC)
    tl.store(memory_out_ptr + of_memory, memory.to(memory_out_ptr.dtype.element_ty), mask=inside)
