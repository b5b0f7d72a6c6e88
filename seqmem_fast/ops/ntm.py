r"""A whole Neural Turing Machine over a sequence as one op, controller and heads included.

One step, for the input x_t and the reads r_{t-1} of the step before:

.. math::
    h_t &= \mathrm{controller}([x_t, r_{t-1}]), \qquad p_t = W_p h_t + b_p \\
    K_i &= \frac{M_i \cdot k}{\|M_i\| \|k\| + 10^{-8}}, \quad w^c = \mathrm{softmax}(\beta K) \\
    w^g &= g w^c + (1 - g) w_{t-1}, \quad
    \tilde w_i = \sum_{j=0}^{2r} s_j w^g_{(i - (j - r)) \bmod N}, \quad
    w_i = \tilde w_i^\gamma / \sum_j \tilde w_j^\gamma \\
    \text{write:}\quad M_i &\leftarrow M_i \circ (1 - w_i e) + w_i a, \qquad
    \text{read:}\quad r = \sum_i w_i M_i

The heads act in the order of the string ``heads``; a read sees the writes before it. A head's part
of p_t holds key M, beta 1, gate 1, shift 2r + 1, gamma 1 and, for a write head, erase M, add M;
beta = softplus, gate = sigmoid, shift = softmax, gamma = 1 + softplus, erase = sigmoid, and key and
add are squashed by tanh or taken as they are. The step's features are [h_t, its reads].

Letters: T time, B batch, I input, L layers of C units, N slots of width M, Hd heads of which R
read, P = ``head_bias.size(0)``.

Paper: Graves, Wayne & Danihelka, Neural Turing Machines, arXiv 1410.5401, 2014.

Common to both functions. Every floating tensor is float32, float64, bfloat16 or float16 (the 16-bit
types are computed with in float32), all of one dtype and one device (under ``torch.autocast`` they
are cast), and is differentiable, any number of times: the first derivative has its own kernel,
higher ones run in plain PyTorch. Strides are free. For the backward about the square root of T of
the memories are kept; the others are recomputed. Inside a ``torch.func`` transform (grad, vmap,
jacrev, ...) the whole call runs in plain PyTorch: right, but slow.

Raises:
    ValueError: a shape or value does not fit; the message names the argument, what was expected
        and what came. T = 0 and B = 0 work.
    TypeError: a dtype, device or layout does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..reference import ntm as reference
from ..reference.ntm_addressing import NTMState
from .common import Gradients, differentiate, fall_back, vjp_of_lists
from .flops import Shape, count_products, of_weights

__all__ = ["ntm", "ntm_trace"]

_STATE = len(NTMState._fields)


def _plain(*arguments: Any) -> tuple[Tensor, ...]:
    """The op by the reference; what only the backward needs is left out."""
    input, *state, controller, head_weight, head_bias, initial, lengths, reset = arguments[:12]
    heads, shift_range, lstm, squash = arguments[12:16]
    features, final, weightings = reference.ntm_trace(
        input,
        NTMState(*state),
        controller,
        head_weight,
        head_bias,
        heads=heads,
        shift_range=shift_range,
        squash=squash,
        controller_type="lstm" if lstm else "feedforward",
        initial=NTMState(*initial) if initial else None,
        lengths=lengths,
        reset=reset,
    )
    return features, *final, weightings


_ntm = fall_back("ntm", _plain)


def _products(
    input: Shape,
    memory: Shape,
    weightings: Shape,
    reads: Shape,
    controller: Sequence[Shape],
    head_weight: Shape,
) -> int:
    """The weights'; content and reads. Writes are outer products, element by element."""
    row = of_weights(*controller, head_weight)
    row += (weightings[-2] + reads[-2]) * memory[-2] * memory[-1]
    return input[0] * input[1] * row


count_products("ntm", _products)


def ntm(
    input: Tensor,
    state: NTMState,
    controller: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    heads: str = "wr",
    shift_range: int = 1,
    squash: bool = True,
    controller_type: str = "lstm",
    initial: NTMState | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, NTMState]:
    """The whole sequence; the equations, dtypes and errors are in the module's docstring.

    Args:
        input: [T, B, I].
        state: that after the step before: hidden and cell [L, B, C] ([0, B, C] for "feedforward"),
            memory [B, N, M], weightings [B, Hd, N] of all heads, reads [B, R, M].
        controller: per layer weight_ih, weight_hh, bias_ih, bias_hh (gates i, f, g, o) for "lstm":
            [4C, I + R * M] in the first layer and [4C, C] in the others, [4C, C], [4C], [4C];
            weight and bias for "feedforward" (tanh): [C, I + R * M] or [C, C], [C].
        head_weight: [P, C].
        head_bias: [P].
        heads: "w" and "r", in the order in which they act.
        shift_range: 0 <= r <= N / 2; at r = N / 2 the outermost taps meet on one slot and add up.
        squash: tanh on key and add.
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
    features, state, _ = _sequence(
        input, state, controller, head_weight, head_bias, heads, shift_range, squash,
        controller_type, initial, lengths, reset, False,
    )  # fmt: skip
    return features, state


def ntm_trace(
    input: Tensor,
    state: NTMState,
    controller: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    heads: str = "wr",
    shift_range: int = 1,
    squash: bool = True,
    controller_type: str = "lstm",
    initial: NTMState | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, NTMState, Tensor]:
    """As :func:`ntm`, and the weightings of every step come back as well.

    Returns:
        features, the state after the last step, and weightings [T, B, Hd, N], zero beyond
        ``lengths``; all of them differentiable.
    """
    return _sequence(
        input, state, controller, head_weight, head_bias, heads, shift_range, squash,
        controller_type, initial, lengths, reset, True,
    )  # fmt: skip


def _sequence(
    input: Tensor,
    state: NTMState,
    controller: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor,
    heads: str,
    shift_range: int,
    squash: bool,
    controller_type: str,
    first: NTMState | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    trace: bool,
) -> tuple[Tensor, NTMState, Tensor]:
    if controller_type not in ("lstm", "feedforward"):
        raise ValueError(
            "seqmem::ntm: expected controller_type 'lstm' or 'feedforward', "
            f"got {controller_type!r}"
        )
    initial = [] if first is None else list(first)
    lstm = controller_type == "lstm"
    options = lengths, reset, heads, shift_range, lstm, squash, trace, False
    features, *rest = _ntm(
        input, *state, list(controller), head_weight, head_bias, initial, *options
    )
    return features, NTMState(*rest[:_STATE]), rest[_STATE]


def _vjp(*arguments: Any) -> Gradients:
    """ntm_backward by the reference; what the forward saved is recomputed."""
    grads, rest = arguments[:7], arguments[7:]
    input, *state, controller, head_weight, head_bias, initial, lengths, reset = rest[:12]
    options = lengths, reset, *rest[16:20]
    of_input, of_state, of_weights, of_initial = rest[20]

    def function(
        x: list[Tensor],
        state: list[Tensor],
        head: list[Tensor],
        first: list[Tensor],
        layers: list[Tensor],
    ) -> tuple[Tensor, ...]:
        return _plain(*x, *state, layers, *head, first, *options)

    lists = [input], state, (head_weight, head_bias), initial, controller
    wanted = of_input, of_state, of_weights, of_initial, of_weights
    return vjp_of_lists(function, lists, grads, wanted)


differentiate("ntm_backward", _vjp)
