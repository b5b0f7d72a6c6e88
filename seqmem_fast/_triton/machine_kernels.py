"""What the kernels of a whole sequence with a memory share: the memory's block, a row's program,
and what its steps pass on. The controller: `controller_kernels.py`.

A row's memory is one block [BN, BW] in registers, N slots and M values padded to powers of two; a
vector over slots is [BN]. Slots past N weigh nothing. The controller's vectors (state, reads, head
values) pass through global scratch that only the row's program touches, with a barrier between.

Letters: C units of the controller, P head values, R read heads. A step's record: per layer of an
LSTM the gates i, f, g, o and the cell [5C]; the outputs of all layers but the last [LAYERS - 1, C];
head values [P].
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .common import tanh


@triton.jit
def block_of(ptr, slots, width, BN: tl.constexpr, BW: tl.constexpr):
    """Pointers [BN, BW] into a dense [N, M], and which of them are in it."""
    n = tl.arange(0, BN)[:, None]
    m = tl.arange(0, BW)[None, :]
    return ptr + n * width + m, (n < slots) & (m < width)


@triton.jit
def similarity(memory, key):
    """K [BN] with what its gradient needs: the slots' norms and the key's."""
    norms = tl.sqrt(tl.sum(memory * memory, axis=1))
    key_norm = tl.sqrt(tl.sum(key * key, axis=0))
    return tl.sum(memory * key[None, :], axis=1) / (norms * key_norm + 1e-8), norms, key_norm


@triton.jit
def softmax_of(z, there):
    """Softmax of a vector, zero where nothing is."""
    z = tl.where(there, z, float("-inf"))
    e = tl.exp(z - tl.max(z, axis=0))
    return e / tl.sum(e, axis=0)


@triton.jit
def content_backward(dc, c, K, norms, key_norm, beta, memory, key):
    """Gradients of memory [BN, BW], key and beta."""
    dy = c * (dc - tl.sum(dc * c, axis=0))
    dd = beta * dy / (norms * key_norm + 1e-8)
    of_norms = dd * K
    down = tl.where(norms > 0.0, of_norms * key_norm / tl.where(norms > 0.0, norms, 1.0), 0.0)
    # A NaN norm is not above 0; it must not turn into 0 either.
    down = tl.where(norms == norms, down, norms)
    d_memory = dd[:, None] * key[None, :] - down[:, None] * memory
    pull = tl.sum(of_norms * norms, axis=0)
    pull = tl.where(key_norm > 0.0, pull / tl.where(key_norm > 0.0, key_norm, 1.0), 0.0)
    d_key = tl.sum(dd[:, None] * memory, axis=0) - pull * key
    return d_memory, d_key, tl.sum(dy * K, axis=0)


@triton.jit
def copy(from_ptr, to_ptr, count, BLOCK: tl.constexpr):
    for start in range(0, count, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(from_ptr + k, mask=k < count)
        tl.store(to_ptr + k, value.to(to_ptr.dtype.element_ty), mask=k < count)


@triton.jit
def move(carry_ptr, to_ptr, count, BLOCK: tl.constexpr):
    """to += carry, carry = 0."""
    for start in range(0, count, BLOCK):
        k = start + tl.arange(0, BLOCK)
        total = tl.load(to_ptr + k, mask=k < count) + tl.load(carry_ptr + k, mask=k < count)
        tl.debug_barrier()  # several threads load what one stores
        tl.store(to_ptr + k, total, mask=k < count)
        tl.store(carry_ptr + k, tl.zeros_like(total), mask=k < count)


@triton.jit
def padded(ptr, BN: tl.constexpr, BW: tl.constexpr):
    """Pointers into a padded [BN, BW] of scratch: no masks, and offsets known when compiling."""
    return ptr + tl.arange(0, BN)[:, None] * BW + tl.arange(0, BW)[None, :]


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def vector(p_ptr, width, SQUASH: tl.constexpr, BW: tl.constexpr):
    """A key or an add out of head values."""
    m = tl.arange(0, BW)
    x = tl.load(p_ptr + m, mask=m < width, other=0.0)
    if SQUASH:
        x = tanh(x)
    return x


@triton.jit
def head_offset(control, LAYERS: tl.constexpr, LSTM: tl.constexpr):
    """Where head values begin in a record."""
    head_at = (LAYERS - 1) * control
    if LSTM:
        head_at += 5 * LAYERS * control
    return head_at


@triton.jit
def this_row(lengths_ptr, steps, slots, BN: tl.constexpr, BW: tl.constexpr):
    """The program's row, its steps, indices of slots and of their values, which slots there are."""
    b = tl.program_id(0).to(tl.int64)
    length = steps
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b).to(tl.int32)
    n = tl.arange(0, BN)
    return b, length, n, tl.arange(0, BW), n < slots


@triton.jit
def hidden_of(hidden_ptr, t, b, batch, states):
    """Where step t finds the hidden state [L, C] of all layers, and where it leaves it."""
    old = hidden_ptr + ((t % 2) * batch + b) * states
    return old, hidden_ptr + ((1 - t % 2) * batch + b) * states


@triton.jit
def origin(reset_ptr, row, t):
    """Whether step t follows on the first state, on the step before, or on the initial state."""
    cut = t < 0
    if reset_ptr is not None:
        cut = tl.load(reset_ptr + row) != 0
    return (t == 0) & (cut == 0), (t > 0) & (cut == 0), cut


@triton.jit
def previous(state_ptr, trace_ptr, initial_ptr, h, slots, first, follows, cut, ACC: tl.constexpr,
             BN: tl.constexpr):  # fmt: skip
    """Head h's weighting of the step before: of the first state, the trace or the initial state."""
    n = tl.arange(0, BN)
    there = n < slots
    prev = tl.load(state_ptr + h * slots + n, mask=there & first, other=0.0).to(ACC)
    prev += tl.load(trace_ptr + h * slots + n, mask=there & follows, other=0.0).to(ACC)
    if initial_ptr is not None:
        prev += tl.load(initial_ptr + h * slots + n, mask=there & cut, other=0.0)
    return prev


@triton.jit
def keep(trace_ptr, at, values, there, BN: tl.constexpr):
    """A row of a trace [.., N]; None keeps nothing."""
    if trace_ptr is not None:
        to = trace_ptr + at + tl.arange(0, BN)
        tl.store(to, values.to(trace_ptr.dtype.element_ty), mask=there)


@triton.jit
def with_trace(d_values, grad_trace_ptr, at, there, ACC: tl.constexpr, BN: tl.constexpr):
    """The gradient [BN] with that of its row of a trace, which may be None."""
    if grad_trace_ptr is not None:
        of_trace = grad_trace_ptr + at + tl.arange(0, BN)
        d_values += tl.load(of_trace, mask=there, other=0.0).to(ACC)
    return d_values


@triton.jit
def read_out(w, memory, reads_ptr, feature, width, BW: tl.constexpr):
    """A head's reading, for the step after and among the features."""
    m = tl.arange(0, BW)
    read = tl.sum(w[:, None] * memory, axis=0)
    tl.store(reads_ptr + m, read, mask=m < width)
    tl.store(feature + m, read.to(feature.dtype.element_ty), mask=m < width)


@triton.jit
def read_gradient(d_reads_ptr, d_feature, f_c, control, at, width, ACC: tl.constexpr,
                  BW: tl.constexpr):  # fmt: skip
    """Of what `read_out` leaves for the step after and among the features, `at` of all reads."""
    m = tl.arange(0, BW)
    d_read = tl.load(d_reads_ptr + at + m, mask=m < width, other=0.0)
    if d_feature is not None:
        of_read = d_feature + (control + at + m).to(tl.int64) * f_c
        d_read += tl.load(of_read, mask=m < width, other=0.0).to(ACC)
    return d_read


@triton.jit
def of_step(grad_features_ptr, b, t, f_b, f_t):
    """Where the gradient of a step's features begins."""
    at = grad_features_ptr
    if grad_features_ptr is not None:
        at = grad_features_ptr + b * f_b + t.to(tl.int64) * f_t
    return at


@triton.jit
def started(memory, reset_ptr, initial_ptr, there, BN: tl.constexpr, BW: tl.constexpr):
    """The memory that enters a step, initial where its row starts anew, and whether it does."""
    cut = tl.load(reset_ptr) != 0
    initial = tl.load(padded(initial_ptr, BN, BW), mask=there[:, None] & cut, other=memory)
    return initial, cut


@triton.jit
def start_anew(initial, state, old, states, read_width, LSTM: tl.constexpr,
               BC: tl.constexpr):  # fmt: skip
    """What the controller is fed, `old` and the state's cell and reads, goes back to the initial
    hidden, cell and reads."""
    initial_hidden_ptr, initial_cell_ptr, initial_reads_ptr = initial
    cell_ptr, reads_ptr = state
    if LSTM:
        copy(initial_hidden_ptr, old, states, BC)
        copy(initial_cell_ptr, cell_ptr, states, BC)
    copy(initial_reads_ptr, reads_ptr, read_width, BC)


@triton.jit
def hand_over(grads, of_initial, b, states, read_width, LSTM: tl.constexpr, BN: tl.constexpr,
              BW: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Gradients of the controller's hidden and cell, of memory and reads, to the row's part of
    those of initial, where a step has started from it."""
    d_hidden_ptr, d_cell_ptr, d_memory_ptr, d_reads_ptr = grads
    i_hidden_ptr, i_cell_ptr, i_memory_ptr, i_reads_ptr = of_initial
    move(d_memory_ptr, i_memory_ptr + b * BN * BW, BN * BW, BC)
    if LSTM:
        move(d_hidden_ptr, i_hidden_ptr + b * states, states, BC)
        move(d_cell_ptr, i_cell_ptr + b * states, states, BC)
    move(d_reads_ptr, i_reads_ptr + b * read_width, read_width, BC)
