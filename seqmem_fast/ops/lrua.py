r"""A memory with least recently used access (MANN) over a sequence as one op, controller included.

One step, for the input x_t and the reads r_{t-1} of the step before; head h of R reads and writes:

.. math::
    h_t &= \mathrm{controller}([x_t, r_{t-1}]), \qquad p_t = W_p h_t + b_p \\
    s_1, \dots, s_R &= \text{the slots of least usage } u_{t-1},
        \text{ equal ones by ascending index} \\
    w^w_h &= g_h w^r_{h, t-1} + (1 - g_h)\, 1[s_h] \\
    M_t &= M_{t-1} \text{ with slot } s_1 \text{ set to zero} + \textstyle\sum_h w^w_h a_h^T \\
    w^r_h &= \mathrm{softmax}_i\left(\beta_h
        \frac{M_i \cdot k_h}{|M_i| |k_h| + 10^{-8}}\right), \qquad r_h = M_t^T w^r_h \\
    u_t &= \gamma u_{t-1} + \textstyle\sum_h (w^r_h + w^w_h)

p_t holds, head by head: key M, add M (not with ``add="key"``), gate 1 and, only with ``strength``,
strength 1. k and a are tanh, g is a sigmoid, beta = 1 + softplus, or 1 without a strength: then the
weight of a slot exceeds another's by e^2 at the most, as in the paper. The step's features are
[h_t, r_t].

Letters: T time, B batch, I input, L layers of C units, N slots of width M, R heads,
P = ``head_bias.size(0)`` = R (2M + 1), less R M with ``add="key"``, R more with ``strength``.

Paper: Santoro, Bartunov, Botvinick, Wierstra & Lillicrap, One-shot learning with memory-augmented
neural networks, arXiv 1605.06065, 2016. There a head writes its key; the public implementations,
and this op unless told otherwise, give it an add vector of its own.

Common to both functions. Every floating tensor is float32, float64, bfloat16 or float16 (the 16-bit
types are computed with in float32), all of one dtype and one device (under ``torch.autocast`` they
are cast), and is differentiable, any number of times, save usage, which only chooses slots and has
no gradient: the first derivative has its own kernel, higher ones run in plain PyTorch. Slots that
were chosen stay as they are under differentiation. Strides are free. For the backward about the
square root of T of the memories are kept; the others are recomputed. Inside a ``torch.func``
transform (grad, vmap, jacrev, ...) the whole call runs in plain PyTorch: right, but slow.

Slots whose usage is nearly equal may be chosen in another order by arithmetic that rounds otherwise
(another dtype, device or thread of calls); what the reads hold does not depend on it where such
slots are alike, as after the start.

Raises:
    ValueError: a shape or value does not fit; the message names the argument, what was expected
        and what came. T = 0 and B = 0 work.
    TypeError: a dtype, device or layout does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..reference import lrua as reference
from ..reference.lrua import LRUAState, LRUATrace
from .common import Gradients, differentiate, fall_back, vjp_of_lists
from .flops import Shape, count_products, of_weights

__all__ = ["LRUAState", "LRUATrace", "lrua", "lrua_trace"]

_STATE = len(LRUAState._fields)


def _plain(*arguments: Any) -> tuple[Tensor, ...]:
    """The op by the reference; what only the backward needs is left out."""
    input, state, controller, head_weight, head_bias, initial, lengths, reset = arguments[:8]
    lstm, own_add, strength, erase_all, gamma = arguments[8:13]
    features, final, trace = reference.lrua_trace(
        input,
        LRUAState(*state),
        controller,
        head_weight,
        head_bias,
        add="own" if own_add else "key",
        strength=strength,
        erase_all=erase_all,
        gamma=gamma,
        controller_type="lstm" if lstm else "feedforward",
        initial=LRUAState(*initial) if initial else None,
        lengths=lengths,
        reset=reset,
    )
    return features, *final, *trace


_lrua = fall_back("lrua", _plain)


def _products(
    input: Shape, state: Sequence[Shape], controller: Sequence[Shape], head_weight: Shape
) -> int:
    """The weights'; content, writes, reads."""
    memory, read_weights = state[2], state[4]
    row = of_weights(*controller, head_weight)
    return input[0] * input[1] * (row + 3 * math.prod(read_weights[1:]) * memory[-1])


count_products("lrua", _products)


def lrua(
    input: Tensor,
    state: LRUAState,
    controller: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    add: str = "own",
    strength: bool = False,
    erase_all: bool = False,
    gamma: float = 0.95,
    controller_type: str = "lstm",
    initial: LRUAState | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, LRUAState]:
    """The whole sequence; the equations, dtypes and errors are in the module's docstring.

    Args:
        input: [T, B, I].
        state: that after the step before: hidden and cell [L, B, C] ([0, B, C] for "feedforward"),
            memory [B, N, M], usage [B, N], read_weights [B, R, N], reads [B, R, M]; 1 <= R <= N. A
            usage of NaN counts as infinite.
        controller: per layer weight_ih, weight_hh, bias_ih, bias_hh (gates i, f, g, o) for "lstm":
            [4C, I + R * M] in the first layer and [4C, C] in the others, [4C, C], [4C], [4C];
            weight and bias for "feedforward" (tanh): [C, I + R * M] or [C, C], [C].
        head_weight: [P, C].
        head_bias: [P].
        add: what a head writes: "own", a vector of its own, or "key", its key.
        strength: whether the softmax has a strength, beta >= 1; without, it is nearly flat.
        erase_all: set all R slots of least usage to zero in each step, not the first alone.
        gamma: what remains of usage after a step, in 0..1.
        controller_type: "lstm" or "feedforward".
        initial: what ``reset`` brings a row back to: a state without the batch dimension.
        lengths: [B], int64 or int32, 0 <= lengths <= T, on the CPU or the input's device. Row b
            ends after ``lengths[b]`` steps: later features are zero, the final state is that of its
            last step (the given state for length 0). What the padding holds does not matter.
            On a GPU they are clamped to 0..T, as a check would wait for it; while a CUDA graph is
            captured they must be there.
        reset: bool [T, B]; where true, row b goes back to ``initial`` before step t.

    Returns:
        features [T, B, C + R * M] and the state after the last step.
    """
    features, *rest = _sequence(
        input, state, controller, head_weight, head_bias, add, strength, erase_all, gamma,
        controller_type, initial, lengths, reset, False,
    )  # fmt: skip
    return features, LRUAState(*rest[:_STATE])


def lrua_trace(
    input: Tensor,
    state: LRUAState,
    controller: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    add: str = "own",
    strength: bool = False,
    erase_all: bool = False,
    gamma: float = 0.95,
    controller_type: str = "lstm",
    initial: LRUAState | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, LRUAState, LRUATrace]:
    """As :func:`lrua`, and what the heads did in every step comes back as well.

    Returns:
        features, the state after the last step, and an :class:`LRUATrace`: usage [T, B, N] after
        each step, write_weights and read_weights [T, B, R, N], zero beyond ``lengths``; all but
        usage differentiable.
    """
    features, *rest = _sequence(
        input, state, controller, head_weight, head_bias, add, strength, erase_all, gamma,
        controller_type, initial, lengths, reset, True,
    )  # fmt: skip
    return features, LRUAState(*rest[:_STATE]), LRUATrace(*rest[_STATE : _STATE + 3])


def _sequence(
    input: Tensor,
    state: LRUAState,
    controller: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor,
    add: str,
    strength: bool,
    erase_all: bool,
    gamma: float,
    controller_type: str,
    first: LRUAState | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    trace: bool,
) -> tuple[Tensor, ...]:
    for name, value, allowed in (
        ("controller_type", controller_type, ("lstm", "feedforward")),
        ("add", add, ("own", "key")),
    ):
        if value not in allowed:
            raise ValueError(
                f"seqmem::lrua: expected {name} '{allowed[0]}' or '{allowed[1]}', got {value!r}"
            )
    initial = [] if first is None else list(first)
    options = controller_type == "lstm", add == "own", strength, erase_all, gamma, trace, False
    arguments = list(state), list(controller), head_weight, head_bias, initial, lengths, reset
    return _lrua(input, *arguments, *options)


def _vjp(*arguments: Any) -> Gradients:
    """lrua_backward by the reference; what the forward saved is recomputed."""
    of_features, of_hidden, of_cell, of_memory, of_weights, of_reads, *of_traces = arguments[:8]
    grads = (of_features, of_hidden, of_cell, of_memory, None, of_weights, of_reads)
    input, state, controller, head_weight, head_bias, initial, lengths, reset = arguments[8:16]
    options, mask = arguments[21:26], arguments[26]
    learns = [part != "usage" for part in LRUAState._fields]

    def function(
        x: list[Tensor],
        state: list[Tensor],
        head: list[Tensor],
        first: list[Tensor],
        layers: list[Tensor],
    ) -> tuple[Tensor, ...]:
        return _plain(*x, state, layers, *head, first, lengths, reset, *options)

    lists = [input], state, (head_weight, head_bias), initial, controller
    of_state = [mask[1] and part for part in learns]
    of_initial = [mask[3] and part for part in learns[: len(initial)]]
    wanted = mask[0], of_state, mask[2], of_initial, mask[2]
    return vjp_of_lists(function, lists, (*grads, None, *of_traces), wanted)


differentiate("lrua_backward", _vjp)
