r"""A whole Differentiable Neural Computer over a sequence as one op, controller and heads included.

One step, for the input x_t and the reads r_{t-1} of the step before; rows of w are weightings over
the N slots:

.. math::
    h_t &= \mathrm{controller}([x_t, r_{t-1}]), \qquad p_t = W_p h_t + b_p \\
    \psi &= \textstyle\prod_r (1 - f_r w^r_{t-1}), \quad \hat w = 1 - \prod_h (1 - w^h_{t-1}), \quad
    u_t = (u_{t-1} + (1 - u_{t-1}) \hat w) \circ \psi \\
    a[o_j] &= (1 - v[o_j]) \textstyle\prod_{k<j} v[o_k], \quad
    v = 10^{-6} + (1 - 10^{-6}) u_t, \quad o \text{ sorts } v \text{ upwards} \\
    C(M, k, \beta) &= \mathrm{softmax}_i (\beta\, M_i \cdot k / (|M_i| |k| + \mathrm{eps})), \quad
    |k| = \sqrt{k \cdot k + \mathrm{norm\_floor}} \\
    w^h &= g^w_h (g^a_h a_h + (1 - g^a_h)\, C(M_{t-1}, k^w_h, \beta^w_h)) \\
    M_t &= M_{t-1} \circ \textstyle\prod_h (1 - w^h e_h^T) + \sum_h w^h v_h^T \\
    L_t[i, j] &= (1 - w[i] - w[j]) L_{t-1}[i, j] + w[i] p_{t-1}[j], \quad L_t[i, i] = 0, \quad
    p_t = (1 - \textstyle\sum w) p_{t-1} + w \\
    w^r_t &= \textstyle\sum_h \pi^b_h L_t^T w^r_{t-1} + \pi^c C(M_t, k^r, \beta^r)
        + \sum_h \pi^f_h L_t w^r_{t-1}, \qquad r_t = M_t^T w^r_t

The step's features are [h_t, r_t]. p_t holds, heads of a part one after the other: read keys R M,
read strengths R, write keys W M, write strengths W, erase W M, write vectors W M, free gates R,
allocation gates W, write gates W, read modes R (1 + 2 W) (per read head backward W, content 1,
forward W); then, where asked for, write masks W M, read masks R M, forward sharpness R, backward
sharpness R, allocation strengths W. Strengths and sharpness are 1 + softplus, erase, gates and
masks sigmoid, modes softmax. With several write heads allocation goes from head to head: each sees
the usage u + (1 - u) g^a g^w a that the heads before it would leave.

Letters: T time, B batch, I input, L layers of C units, N slots of width M, R read heads, W write
heads, P = ``interface_bias.size(0)``.

Papers: Graves et al., Hybrid computing using a neural network with dynamic external memory, Nature
538, 471, 2016; masks, deallocation and sharpening: Csordás & Schmidhuber, Improving differentiable
neural computers through memory masking, de-allocation, and link distribution sharpness control,
ICLR 2019; no links, and the interface's layer norm: Franke, Niehues & Waibel, Robust and scalable
differentiable neural computer for question answering, arXiv 1807.02658, 2018; allocation by
softmax: Ben-Ari & Bekker, Differentiable memory allocation mechanism for neural computing, 2017.

Common to both functions. Every floating tensor is float32, float64, bfloat16 or float16 (the 16-bit
types are computed with in float32), all of one dtype and one device (under ``torch.autocast`` they
are cast), and is differentiable, any number of times: the first derivative has its own kernel,
higher ones run in plain PyTorch. The order of allocation is held fixed, and no gradient flows
through w-hat unless ``usage_gradient`` asks for it. Strides are free. For the backward about the
square root of T of the link matrices and memories are kept; the others are recomputed. Inside a
``torch.func`` transform (grad, vmap, jacrev, ...) the whole call runs in plain PyTorch: right, but
slow.

Raises:
    ValueError: a shape or value does not fit; the message names the argument, what was expected
        and what came. T = 0 and B = 0 work.
    TypeError: a dtype, device or layout does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import dnc as reference
from ..reference.dnc import DNCOptions, DNCState, DNCTrace
from .common import Gradients, differentiate, fall_back, vjp_of_lists
from .flops import Shape, count_products, of_weights

__all__ = ["DNCOptions", "DNCState", "DNCTrace", "dnc", "dnc_trace"]

_STATE = len(DNCState._fields)
_FLAGS = ("squash", "usage_gradient", "masks", "deallocate", "sharpen", "links")


def _options_of(words: str, norm_floor: float, eps: float, mask_min: float) -> DNCOptions:
    """From the op's arguments."""
    asked = words.split()
    return DNCOptions(
        strength="softplus" if "softplus" in asked else "oneplus",
        allocation="softmax" if "softmax" in asked else "sort",
        norm_floor=norm_floor,
        eps=eps,
        mask_min=mask_min,
        **{flag: flag in asked for flag in _FLAGS},
    )


def _words_of(options: DNCOptions, controller_type: str) -> str:
    """What stands in the op's string: the options in force, and the controller's kind if LSTM."""
    for name, value, values in (
        ("controller_type", controller_type, ("lstm", "feedforward")),
        ("strength", options.strength, ("oneplus", "softplus")),
        ("allocation", options.allocation, ("sort", "softmax")),
    ):
        if value not in values:
            raise ValueError(f"seqmem::dnc: expected {name} as one of {values}, got {value!r}")
    words = [flag for flag in _FLAGS if getattr(options, flag)]
    words += [word for word in ("softplus",) if options.strength == word]
    words += [word for word in ("softmax",) if options.allocation == word]
    return " ".join(words + ["lstm"] * (controller_type == "lstm"))


def _plain(*arguments: Any) -> tuple[Tensor, ...]:
    """The op by the reference; what only the backward needs is left out."""
    input, state, controller, weight, bias, norm, initial, lengths, reset, words = arguments[:10]
    features, final, trace = reference.dnc_trace(
        input,
        DNCState(*state),
        controller,
        weight,
        bias,
        norm=norm,
        controller_type="lstm" if "lstm" in words.split() else "feedforward",
        initial=DNCState(*initial) if initial else None,
        lengths=lengths,
        reset=reset,
        **_options_of(words, *arguments[10:13])._asdict(),
    )
    return features, *final, *trace[:3]


_dnc = fall_back("dnc", _plain)


def _products(
    input: Shape,
    state: Sequence[Shape],
    controller: Sequence[Shape],
    interface_weight: Shape,
    options: str,
) -> int:
    """The weights'; content, writes, reads; the links' both ways."""
    (_, slots, width), (_, writes, _), (_, reads, _) = state[2], state[6], state[7]
    contents = (writes + reads) * (2 if "masks" in options.split() else 1)
    row = of_weights(*controller, interface_weight)
    row += (contents + writes + reads) * slots * width
    if "links" in options.split():
        row += 2 * writes * reads * slots * slots
    return input[0] * input[1] * row


count_products("dnc", _products)


def dnc(
    input: Tensor,
    state: DNCState,
    controller: Sequence[Tensor],
    interface_weight: Tensor,
    interface_bias: Tensor,
    *,
    norm: Sequence[Tensor] = (),
    controller_type: str = "lstm",
    initial: DNCState | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    squash: bool = False,
    strength: str = "oneplus",
    norm_floor: float = 1e-6,
    eps: float = 1e-6,
    usage_gradient: bool = False,
    masks: bool = False,
    mask_min: float = 0.0,
    deallocate: bool = False,
    sharpen: bool = False,
    links: bool = True,
    allocation: str = "sort",
) -> tuple[Tensor, DNCState]:
    """The whole sequence; the equations, dtypes and errors are in the module's docstring.

    Args:
        input: [T, B, I].
        state: that after the step before: hidden and cell [L, B, C] ([0, B, C] for "feedforward"),
            memory [B, N, M], usage [B, N] in 0..1, link [B, W, N, N], precedence [B, W, N] (both
            with W = 0 without links), write_weights [B, W, N], read_weights [B, R, N], reads
            [B, R, M].
        controller: per layer weight_ih, weight_hh, bias_ih, bias_hh (gates i, f, g, o) for "lstm":
            [4C, I + R * M] in the first layer and [4C, C] in the others, [4C, C], [4C], [4C];
            weight and bias for "feedforward" (tanh): [C, I + R * M] or [C, C], [C].
        interface_weight: [P, C].
        interface_bias: [P].
        norm: weight and bias [P] of a layer norm on p_t (epsilon 1e-6), or nothing.
        controller_type: "lstm" or "feedforward".
        initial: what ``reset`` brings a row back to: a state without the batch dimension.
        lengths: [B], int64 or int32, 0 <= lengths <= T, on the CPU or the input's device. Row b
            ends after ``lengths[b]`` steps: later features are zero, the final state is that of its
            last step (the given state for length 0). What the padding holds does not matter.
            On a GPU they are clamped to 0..T, as a check would wait for it; while a CUDA graph is
            captured they must be there.
        reset: bool [T, B]; where true, row b goes back to ``initial`` before step t.
        squash: tanh on keys and write vectors.
        strength: "oneplus", 1 + softplus, or "softplus".
        norm_floor, eps: at least 0, one of them greater, or the content of a zero memory is NaN.
        usage_gradient: whether gradients flow through w-hat.
        masks: content compares k m with M_i m, by a mask m = mask_min + (1 - mask_min) sigmoid per
            key.
        mask_min: in 0..1, without 1.
        deallocate: the memory is also multiplied by psi, so that what is freed is erased.
        sharpen: directions d become (d / max d + 1e-6)^s, normalised; s = 1 + softplus.
        links: without them reads are by content alone, and nothing is N^2.
        allocation: "sort", or "softmax": a = softmax(s (1 - u)), s = 1 + softplus.

    Returns:
        features [T, B, C + R * M] and the state after the last step.
    """
    options = DNCOptions(
        squash, strength, norm_floor, eps, usage_gradient, masks, mask_min, deallocate, sharpen,
        links, allocation,
    )  # fmt: skip
    features, *rest = _sequence(
        input, state, controller, interface_weight, interface_bias, norm, controller_type, initial,
        lengths, reset, options, False,
    )  # fmt: skip
    return features, DNCState(*rest[:_STATE])


def dnc_trace(
    input: Tensor,
    state: DNCState,
    controller: Sequence[Tensor],
    interface_weight: Tensor,
    interface_bias: Tensor,
    *,
    norm: Sequence[Tensor] = (),
    controller_type: str = "lstm",
    initial: DNCState | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    squash: bool = False,
    strength: str = "oneplus",
    norm_floor: float = 1e-6,
    eps: float = 1e-6,
    usage_gradient: bool = False,
    masks: bool = False,
    mask_min: float = 0.0,
    deallocate: bool = False,
    sharpen: bool = False,
    links: bool = True,
    allocation: str = "sort",
) -> tuple[Tensor, DNCState, DNCTrace]:
    """As :func:`dnc`, and what the heads did in every step comes back as well.

    Returns:
        features, the state after the last step, and a :class:`DNCTrace`, zero beyond ``lengths``;
        all of them differentiable.
    """
    options = DNCOptions(
        squash, strength, norm_floor, eps, usage_gradient, masks, mask_min, deallocate, sharpen,
        links, allocation,
    )  # fmt: skip
    features, *rest = _sequence(
        input, state, controller, interface_weight, interface_bias, norm, controller_type, initial,
        lengths, reset, options, True,
    )  # fmt: skip
    final, usage, write_weights, read_weights = DNCState(*rest[:_STATE]), *rest[_STATE:][:3]
    gates = list(
        reference.gates_of(features, final, interface_weight, interface_bias, norm, options)
    )
    if lengths is not None:
        steps = torch.arange(input.size(0), device=input.device)[:, None]
        ended = steps >= lengths.to(input.device)  # [T, B]
        gates = [g.masked_fill(ended.view(*ended.shape, *[1] * (g.dim() - 2)), 0) for g in gates]
    return features, final, DNCTrace(usage, write_weights, read_weights, *gates)


def _sequence(
    input: Tensor,
    state: DNCState,
    controller: Sequence[Tensor],
    interface_weight: Tensor,
    interface_bias: Tensor,
    norm: Sequence[Tensor],
    controller_type: str,
    first: DNCState | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    options: DNCOptions,
    trace: bool,
) -> tuple[Tensor, ...]:
    words = _words_of(options, controller_type)
    lists = list(norm), [] if first is None else list(first)
    numbers = options.norm_floor, options.eps, options.mask_min
    weights = list(controller), interface_weight, interface_bias
    return _dnc(input, list(state), *weights, *lists, lengths, reset, words, *numbers, trace, False)


def _vjp(*arguments: Any) -> Gradients:
    """dnc_backward by the reference; what the forward saved is recomputed."""
    grads, rest = arguments[:13], arguments[13:]
    input, state, controller, weight, bias, norm, initial, lengths, reset = rest[:9]
    of_input, of_state, of_weights, of_initial = rest[19]

    def function(
        x: list[Tensor],
        state: list[Tensor],
        layers: list[Tensor],
        interface: list[Tensor],
        norm: list[Tensor],
        first: list[Tensor],
    ) -> tuple[Tensor, ...]:
        return _plain(*x, state, layers, *interface, norm, first, lengths, reset, *rest[15:19])

    lists = [input], state, controller, (weight, bias), norm, initial
    wanted = of_input, of_state, of_weights, of_weights, of_weights, of_initial
    return vjp_of_lists(function, lists, grads, wanted)


differentiate("dnc_backward", _vjp)
