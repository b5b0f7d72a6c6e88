"""The delta memory's kernels, launched by `delta_memory.py`.

A program takes one row, one head and a slice of V, whose memory S [K, slice] stays in registers:

    forward    for each step t:
                   S = 0 at a reset; S is kept where a segment begins
                   S = exp(g) S;  w = beta (v - S^T k);  S = S + k w^T;  o = S^T q
    backward   for each segment, from the last to the first, dS [K, slice] in registers:
                   for each step of it: S, from the kept one on, goes to scratch memory
                   for each step, from the last to the first:
                       S = exp(g) S from scratch;  e = v - S^T k;  w = beta e
                       dS = dS + q do^T;  dq = (S + k w^T) do
                       dw = dS^T k;  dv = beta dw;  dbeta = dw . e;  dk = dS w - S dv
                       dS = dS - k dv^T;  dg = sum_v dS S;  dS = exp(g) dS, 0 at a reset
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_wide, store_narrow


@triton.jit
def _decay(decay_ptr, at, k, K, FEATURE: tl.constexpr, ACC: tl.constexpr):
    """exp(g) [BK], of the head's step number `at`."""
    if FEATURE:
        factor = tl.exp(load_wide(decay_ptr + at * K, k, k < K, 0.0, ACC))
    else:
        factor = tl.exp(load_wide(decay_ptr + at, k * 0, k < K, 0.0, ACC))
    return factor


@triton.jit
def _is_reset(reset_ptr, at):
    return tl.load(reset_ptr + at) != 0


@triton.jit
def _slice(Hk, H, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """A program's head of all rows, its row and number there, the head of its keys, features k of
    these and v of its values, where in a memory [K, V] both are, and whether."""
    head = tl.program_id(0).to(tl.int64)
    h = head % H
    k = tl.arange(0, BK)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    at = k[:, None].to(tl.int64) * V + v[None, :]
    return head, head // H, h, h // (H // Hk), k, v, at, (k < K)[:, None] & (v < V)[None, :]


@triton.jit
def _written(memory, key, value, beta_ptr, decay_ptr, at, K, FEATURE: tl.constexpr,
             ACC: tl.constexpr):  # fmt: skip
    """The memory after the head's step number `at`."""
    if decay_ptr is not None:
        k = tl.arange(0, memory.shape[0])
        memory *= _decay(decay_ptr, at, k, K, FEATURE, ACC)[:, None]
    held = tl.sum(memory * key[:, None], axis=0)
    write = tl.load(beta_ptr + at).to(ACC) * (value - held)
    return memory + key[:, None] * write[None, :]


@triton.jit
def delta_memory_forward_kernel(
    q_ptr,  # [B, T, Hk, K], normalised if asked for; so k
    k_ptr,
    v_ptr,  # [B, T, H, V]
    beta_ptr,  # ACC [B, T, H]
    decay_ptr,  # ACC [B, T, H] or [B, T, H, K], or None
    state_ptr,  # ACC [B, H, K, V], or None
    lengths_ptr,  # int64 [B], or None
    reset_ptr,  # uint8 [B, T], or None
    output_ptr,  # [B, T, H, V]
    final_ptr,  # ACC [B, H, K, V]
    states_ptr,  # ACC [B, H, segments, K + segment, V], of which K rows are used; or None
    T, Hk, H, K, V, segment,
    SCALE: tl.constexpr,  # an argument would be rounded to float32
    FEATURE: tl.constexpr, ACC: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    head, b, h, key_head, k, v, at, there = _slice(Hk, H, K, V, BK, BV)
    memory = tl.zeros([BK, BV], ACC)
    if state_ptr is not None:
        memory = load_wide(state_ptr + head * K * V, at, there, 0.0, ACC)
    end = T
    if lengths_ptr is not None:
        end = tl.load(lengths_ptr + b).to(tl.int32)
    segments = (T + segment - 1) // segment
    for t in range(end):
        step = b * T + t
        if reset_ptr is not None:
            memory = tl.where(_is_reset(reset_ptr, step), 0.0, memory)
        if states_ptr is not None:
            if t % segment == 0:
                kept = head * segments + t // segment
                tl.store(states_ptr + kept * (K + segment) * V + at, memory, mask=there)
        row = (step * Hk + key_head) * K
        query = SCALE * load_wide(q_ptr + row, k, k < K, 0.0, ACC)
        key = load_wide(k_ptr + row, k, k < K, 0.0, ACC)
        value = load_wide(v_ptr + (step * H + h) * V, v, v < V, 0.0, ACC)
        memory = _written(memory, key, value, beta_ptr, decay_ptr, step * H + h, K, FEATURE, ACC)
        output = tl.sum(memory * query[:, None], axis=0)
        store_narrow(output_ptr + (step * H + h) * V, v, output, v < V)
    tl.store(final_ptr + head * K * V + at, memory, mask=there)


@triton.jit
def delta_memory_backward_kernel(
    grad_ptr,  # [B, T, H, V], of the output; or None
    grad_final_ptr,  # ACC [B, H, K, V], or None
    q_ptr,
    k_ptr,
    v_ptr,
    beta_ptr,
    decay_ptr,
    lengths_ptr,
    reset_ptr,
    states_ptr,
    scratch_ptr,  # ACC [B, H, segment, K, V]
    grad_q_ptr,  # ACC [slices, B, T, H, K]; so grad_k
    grad_k_ptr,
    grad_v_ptr,  # [B, T, H, V]
    grad_beta_ptr,  # ACC [slices, B, T, H]
    grad_decay_ptr,  # ACC [slices, B, T, H] or [slices, B, T, H, K], or None
    grad_state_ptr,  # ACC [B, H, K, V]
    T, Hk, H, K, V, segment,
    rows,  # B T H
    SCALE: tl.constexpr, FEATURE: tl.constexpr, ACC: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    head, b, h, key_head, k, v, at, there = _slice(Hk, H, K, V, BK, BV)
    slice_row = tl.program_id(1).to(tl.int64) * rows
    grad = tl.zeros([BK, BV], ACC)  # of the memory
    if grad_final_ptr is not None:
        grad = load_wide(grad_final_ptr + head * K * V, at, there, 0.0, ACC)
    end = T
    if lengths_ptr is not None:
        end = tl.load(lengths_ptr + b).to(tl.int32)
    segments = (T + segment - 1) // segment
    count = (end + segment - 1) // segment
    for n in range(count):
        begin = (count - 1 - n) * segment
        stop = tl.minimum(end, begin + segment)
        kept = head * segments + count - 1 - n
        memory = load_wide(states_ptr + kept * (K + segment) * V, at, there, 0.0, ACC)
        tl.debug_barrier()
        for t in range(begin, stop):
            step = b * T + t
            if reset_ptr is not None:
                memory = tl.where(_is_reset(reset_ptr, step), 0.0, memory)
            place = head * segment + t - begin
            tl.store(scratch_ptr + place * K * V + at, memory, mask=there)
            key = load_wide(k_ptr + (step * Hk + key_head) * K, k, k < K, 0.0, ACC)
            value = load_wide(v_ptr + (step * H + h) * V, v, v < V, 0.0, ACC)
            memory = _written(
                memory, key, value, beta_ptr, decay_ptr, step * H + h, K, FEATURE, ACC
            )
        tl.debug_barrier()
        for m in range(stop - begin):
            t = stop - 1 - m
            step = b * T + t
            to = step * H + h
            row = (step * Hk + key_head) * K
            query = SCALE * load_wide(q_ptr + row, k, k < K, 0.0, ACC)
            key = load_wide(k_ptr + row, k, k < K, 0.0, ACC)
            value = load_wide(v_ptr + to * V, v, v < V, 0.0, ACC)
            beta = tl.load(beta_ptr + to).to(ACC)
            before = load_wide(
                scratch_ptr + (head * segment + t - begin) * K * V, at, there, 0.0, ACC
            )
            decay = tl.zeros([BK], ACC) + 1.0
            if decay_ptr is not None:
                decay = _decay(decay_ptr, to, k, K, FEATURE, ACC)
            before *= decay[:, None]
            error = value - tl.sum(before * key[:, None], axis=0)
            write = beta * error
            of_query = tl.zeros([BK], ACC)
            if grad_ptr is not None:
                given = load_wide(grad_ptr + to * V, v, v < V, 0.0, ACC)
                grad += query[:, None] * given[None, :]
                after = before + key[:, None] * write[None, :]
                of_query = SCALE * tl.sum(after * given[None, :], axis=1)
            of_write = tl.sum(grad * key[:, None], axis=0)
            of_value = beta * of_write
            of_key = tl.sum(grad * write[None, :] - before * of_value[None, :], axis=1)
            grad -= key[:, None] * of_value[None, :]
            part = slice_row + to
            tl.store(grad_q_ptr + part * K + k, of_query, mask=k < K)
            tl.store(grad_k_ptr + part * K + k, of_key, mask=k < K)
            store_narrow(grad_v_ptr + to * V, v, of_value, v < V)
            tl.store(grad_beta_ptr + part, tl.sum(of_write * error, axis=0))
            if grad_decay_ptr is not None:
                of_decay = tl.sum(grad * before, axis=1)
                if FEATURE:
                    tl.store(grad_decay_ptr + part * K + k, of_decay, mask=k < K)
                else:
                    tl.store(grad_decay_ptr + part, tl.sum(of_decay, axis=0))
            grad *= decay[:, None]
            if reset_ptr is not None:
                grad = tl.where(_is_reset(reset_ptr, step), 0.0, grad)
    tl.store(grad_state_ptr + head * K * V + at, grad, mask=there)
