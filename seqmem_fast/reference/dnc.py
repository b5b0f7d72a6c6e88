r"""A whole Differentiable Neural Computer over a sequence in plain PyTorch: what ``seqmem::dnc``
computes.

Paper: Graves et al., Hybrid computing using a neural network with dynamic external memory, Nature
538, 471, 2016. One step, for the input x_t and the reads r_{t-1} of the step before:

.. math::
    h_t &= \mathrm{controller}([x_t, r_{t-1}]), \qquad p_t = W_p h_t + b_p
        && \text{the interface, cut up as } \texttt{interface\_parts} \text{ says} \\
    \psi &= \textstyle\prod_r (1 - f_r w^r_{t-1}), \quad \hat w = 1 - \prod_h (1 - w^h_{t-1}), \quad
    u_t = (u_{t-1} + (1 - u_{t-1}) \hat w) \circ \psi && \text{usage} \\
    a[o_j] &= (1 - v[o_j]) \textstyle\prod_{k<j} v[o_k], \quad v = \epsilon + (1 - \epsilon) u_t
        && \text{allocation; } o \text{ sorts } v \text{ upwards} \\
    C(M, k, \beta) &= \mathrm{softmax}_i (\beta\, M_i \cdot k / (|M_i| |k| + \delta))
        && \text{content} \\
    w^h &= g^w_h (g^a_h a_h + (1 - g^a_h)\, C(M_{t-1}, k^w_h, \beta^w_h)) && \text{write} \\
    M_t &= M_{t-1} \circ \textstyle\prod_h (1 - w^h e_h^T) + \sum_h w^h v_h^T \\
    L_t[i, j] &= (1 - w[i] - w[j]) L_{t-1}[i, j] + w[i] p_{t-1}[j], \quad L_t[i, i] = 0
        && \text{links, per write head} \\
    p_t &= (1 - \textstyle\sum w) p_{t-1} + w && \text{precedence} \\
    w^r_t &= \textstyle\sum_h \pi^b_h L_t^T w^r_{t-1} + \pi^c C(M_t, k^r, \beta^r)
        + \sum_h \pi^f_h L_t w^r_{t-1}, \qquad r_t = M_t^T w^r_t && \text{read}

The step's features are [h_t, r_t]. With several write heads allocation goes from head to head: each
sees the usage that the heads before it would leave, u + (1 - u) g^a g^w a.

Letters: T time, B batch, I input, L layers of C units, N slots of width M, R read heads, W write
heads, P = width of p_t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    Draw,
    Sample,
    choose,
    controller_layers,
    controller_step,
    projected_inputs,
    samples,
    started,
    where_row,
    without_padding,
)

USAGE_FLOOR = 1e-6  # epsilon of allocation
SHARPEN_FLOOR = 1e-6
NORM_EPSILON = 1e-6  # of the interface's layer norm


class DNCState(NamedTuple):
    """What a DNC hands from one step to the next.

    L layers of C units (L = 0 for a feed-forward controller), N slots of width M, W write heads, R
    read heads. Without links, link is [B, 0, N, N] and precedence [B, 0, N].
    """

    hidden: Tensor  # [L, B, C]
    cell: Tensor  # [L, B, C]
    memory: Tensor  # [B, N, M]
    usage: Tensor  # [B, N], in 0..1
    link: Tensor  # [B, W, N, N]: [i, j] says how far slot i was written right after slot j
    precedence: Tensor  # [B, W, N]: how far a slot was written last
    write_weights: Tensor  # [B, W, N]
    read_weights: Tensor  # [B, R, N]
    reads: Tensor  # [B, R, M]

    def detach(self) -> DNCState:
        """The same values without their history: later gradients end here."""
        return DNCState(*(t.detach() for t in self))


class DNCOptions(NamedTuple):
    """What a DNC computes beyond its sizes; the defaults are the paper's."""

    squash: bool = False  # tanh on keys and write vectors
    strength: str = "oneplus"  # 1 + softplus, or "softplus"
    norm_floor: float = 1e-6  # under the roots of the norms: |k| = sqrt(k . k + norm_floor)
    eps: float = 1e-6  # delta, beside the product of the norms
    usage_gradient: bool = False  # whether gradients flow through w-hat
    masks: bool = False  # per key a mask: content compares k m with M_i m
    mask_min: float = 0.0  # m = mask_min + (1 - mask_min) sigmoid
    deallocate: bool = False  # the memory is also multiplied by psi: what is freed is erased
    sharpen: bool = False  # directions become powers of themselves, normalised
    links: bool = True  # without: reads by content alone
    allocation: str = "sort"  # or "softmax": a = softmax(s (1 - u)), s from the interface

    def interface_size(self, width: int, reads: int, writes: int) -> int:
        """P, the width of p_t."""
        parts = interface_parts(width, reads, writes, self).values()
        return sum(torch.Size(shape).numel() for shape in parts)


class DNCTrace(NamedTuple):
    """What the heads did in every step; zero beyond ``lengths``."""

    usage: Tensor  # [T, B, N]
    write_weights: Tensor  # [T, B, W, N]
    read_weights: Tensor  # [T, B, R, N]
    allocation_gates: Tensor  # [T, B, W]
    write_gates: Tensor  # [T, B, W]
    free_gates: Tensor  # [T, B, R]
    read_modes: Tensor  # [T, B, R, 1 + 2 W]: backward, content, forward; [T, B, R, 0] without links


def interface_parts(
    width: int, reads: int, writes: int, options: DNCOptions
) -> dict[str, tuple[int, ...]]:
    """The parts of p_t in their order, each with its shape."""
    parts: dict[str, tuple[int, ...]] = {
        "read_keys": (reads, width),
        "read_strengths": (reads,),
        "write_keys": (writes, width),
        "write_strengths": (writes,),
        "erase": (writes, width),
        "write_vectors": (writes, width),
        "free_gates": (reads,),
        "allocation_gates": (writes,),
        "write_gates": (writes,),
    }
    if options.links:
        parts["read_modes"] = (reads, 1 + 2 * writes)
    if options.masks:
        parts |= {"write_masks": (writes, width), "read_masks": (reads, width)}
    if options.links and options.sharpen:
        parts |= {"forward_sharpness": (reads,), "backward_sharpness": (reads,)}
    if options.allocation == "softmax":
        parts["allocation_strengths"] = (writes,)
    return parts


def dnc(
    input: Tensor,
    state: DNCState,
    controller: Sequence[Tensor],
    interface_weight: Tensor,
    interface_bias: Tensor,
    **arguments: Any,
) -> tuple[Tensor, DNCState]:
    """input [T, B, I] -> features [T, B, C + R * M] and the last state; arguments as of
    :func:`dnc_trace`."""
    features, state, _ = dnc_trace(
        input, state, controller, interface_weight, interface_bias, **arguments
    )
    return features, state


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
    **options: Any,
) -> tuple[Tensor, DNCState, DNCTrace]:
    """As :func:`dnc`, also with what the heads did in every step.

    controller: per layer weight_ih, weight_hh, bias_ih, bias_hh (gates i, f, g, o) for "lstm",
    weight, bias for "feedforward"; the first layer's input is [x_t, r_{t-1}]. norm: weight and bias
    [P] of a layer norm on p_t, or nothing. initial: the state, without its batch dimension, that
    ``reset`` [T, B] brings a row back to before step t. lengths: row b ends after lengths[b] steps;
    its later features and trace are zero. options: those of :class:`DNCOptions`.
    """
    time, batch, width = input.shape
    input, valid = without_padding(input, lengths)
    chosen = DNCOptions(**options)
    layers = controller_layers(controller, width, controller_type)
    projected = projected_inputs(input, controller, layers)

    columns: list[list[Tensor]] = [[] for _ in range(5)]
    for t in range(time):
        entered = started(reset, initial, t, state)
        hidden, cell, top = controller_step(
            projected[t], entered.hidden, entered.cell, entered.reads, layers, controller_type
        )
        p = F.linear(top, interface_weight, interface_bias)
        if norm:
            p = F.layer_norm(p, p.shape[-1:], norm[0], norm[1], NORM_EPSILON)
        new = _step(interface(p, entered, chosen), entered, chosen)
        new = new._replace(hidden=hidden, cell=cell)
        steps = top, new.reads, new.usage, new.write_weights, new.read_weights
        for column, value in zip(columns, steps, strict=True):
            column.append(value)
        state = new if valid is None else choose(valid[t], new, state)

    tops, reads, usage, write_weights, read_weights = (
        torch.stack(column) if column else input.new_empty(0, batch, *like)
        for column, like in zip(
            columns,
            (
                interface_weight.shape[1:],
                state.reads.shape[1:],
                state.usage.shape[1:],
                state.write_weights.shape[1:],
                state.read_weights.shape[1:],
            ),
            strict=True,
        )
    )
    features = torch.cat((tops, reads.flatten(2)), -1)
    if valid is not None:
        features = where_row(valid, features, 0)
    gates = gates_of(features, state, interface_weight, interface_bias, norm, chosen)
    trace = DNCTrace(usage, write_weights, read_weights, *gates)
    if valid is not None:
        trace = DNCTrace(*(where_row(valid, a, 0) for a in trace))
    return features, state, trace


def gates_of(
    features: Tensor,
    state: DNCState,
    interface_weight: Tensor,
    interface_bias: Tensor,
    norm: Sequence[Tensor],
    options: DNCOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of features [T, B, C + R * M]: allocation, write and free gates, and read modes."""
    p = F.linear(features[..., : interface_weight.size(1)], interface_weight, interface_bias)
    if norm:
        p = F.layer_norm(p, p.shape[-1:], norm[0], norm[1], NORM_EPSILON)
    found = interface(p, state, options)
    modes = found.get("read_modes")
    if modes is None:
        modes = p.new_empty(*p.shape[:-1], state.reads.size(1), 0)
    return found["allocation_gates"], found["write_gates"], found["free_gates"], modes


def interface(p: Tensor, state: DNCState, options: DNCOptions) -> dict[str, Tensor]:
    """p [..., P] cut into its parts, each squashed into its range."""
    reads, width = state.reads.shape[-2:]
    parts = interface_parts(width, reads, state.write_weights.size(-2), options)
    sizes = [shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in parts.values()]
    found = {
        name: piece.unflatten(-1, shape)
        for (name, shape), piece in zip(parts.items(), p.split(sizes, -1), strict=True)
    }
    least = 1 if options.strength == "oneplus" else 0
    for name, a in found.items():
        if name in ("read_keys", "write_keys", "write_vectors"):
            found[name] = torch.tanh(a) if options.squash else a
        elif name in ("read_strengths", "write_strengths"):
            found[name] = least + F.softplus(a)
        elif name in ("forward_sharpness", "backward_sharpness", "allocation_strengths"):
            found[name] = 1 + F.softplus(a)
        elif name == "read_modes":
            found[name] = torch.softmax(a, -1)
        elif name in ("write_masks", "read_masks"):
            found[name] = options.mask_min + (1 - options.mask_min) * torch.sigmoid(a)
        else:
            found[name] = torch.sigmoid(a)
    return found


def _step(p: dict[str, Tensor], state: DNCState, options: DNCOptions) -> DNCState:
    """Everything after the controller; its hidden and cell stay as they are."""
    kept = (1 - p["free_gates"][..., None] * state.read_weights).prod(1)  # psi [B, N]
    written = 1 - (1 - state.write_weights).prod(1)
    if not options.usage_gradient:
        written = written.detach()
    usage = (state.usage + (1 - state.usage) * written) * kept

    memory = state.memory
    content = _content(memory, p["write_keys"], p["write_strengths"], p.get("write_masks"), options)
    write_weights = _write_weights(p, usage, content)
    erased = (1 - write_weights[..., None] * p["erase"][:, :, None]).prod(1)  # [B, N, M]
    if options.deallocate:
        erased = kept[..., None] * erased
    memory = memory * erased + write_weights.mT @ p["write_vectors"]

    read_weights = _content(
        memory, p["read_keys"], p["read_strengths"], p.get("read_masks"), options
    )
    link, precedence = state.link, state.precedence
    if options.links:
        link = _linked(link, precedence, write_weights)
        rest = 1 - write_weights.sum(-1, keepdim=True)
        precedence = rest * precedence + write_weights
        forward = state.read_weights[:, None] @ link.mT  # [B, W, R, N]
        backward = state.read_weights[:, None] @ link
        if options.sharpen:
            forward = _sharpened(forward, p["forward_sharpness"])
            backward = _sharpened(backward, p["backward_sharpness"])
        directions = torch.cat((backward, read_weights[:, None], forward), 1)  # [B, 1 + 2 W, R, N]
        read_weights = (p["read_modes"].mT[..., None] * directions).sum(1)
    reads = read_weights @ memory
    return DNCState(
        state.hidden,
        state.cell,
        memory,
        usage,
        link,
        precedence,
        write_weights,
        read_weights,
        reads,
    )


def _content(
    memory: Tensor, keys: Tensor, strengths: Tensor, masks: Tensor | None, options: DNCOptions
) -> Tensor:
    """memory [B, N, M], keys and masks [B, H, M], strengths [B, H] -> weights [B, H, N]."""
    if masks is None:
        dots = keys @ memory.mT
        squares = (memory * memory).sum(-1).unsqueeze(1)  # [B, 1, N]
    else:
        keys, of_masks = keys * masks, masks * masks
        dots = (keys * masks) @ memory.mT
        squares = of_masks @ (memory * memory).mT  # [B, H, N]
    norms = _root(squares + options.norm_floor) * _root(
        (keys * keys).sum(-1, keepdim=True) + options.norm_floor
    )
    return torch.softmax(strengths[..., None] * (dots / (norms + options.eps)), -1)


def _root(x: Tensor) -> Tensor:
    """The square root; every derivative at zero is 0, never NaN."""
    zero = x == 0
    return torch.sqrt(x.masked_fill(zero, 1)).masked_fill(zero, 0)


def _write_weights(p: dict[str, Tensor], usage: Tensor, content: Tensor) -> Tensor:
    """usage [B, N], content [B, W, N] -> weights [B, W, N], head after head."""
    weights = []
    for h in range(content.size(1)):
        gate, write = p["allocation_gates"][:, h, None], p["write_gates"][:, h, None]
        if "allocation_strengths" in p:
            allocation = torch.softmax(p["allocation_strengths"][:, h, None] * (1 - usage), -1)
        else:
            allocation = allocate(usage)
        weights.append(write * (gate * allocation + (1 - gate) * content[:, h]))
        usage = usage + (1 - usage) * gate * write * allocation
    return torch.stack(weights, 1)


def allocate(usage: Tensor) -> Tensor:
    """usage [B, N] -> allocation [B, N]: the less used a slot, the more; ties by their index."""
    used, order = torch.sort(USAGE_FLOOR + (1 - USAGE_FLOOR) * usage, dim=-1, stable=True)
    before = F.pad(torch.cumprod(used, -1)[..., :-1], (1, 0), value=1.0)
    return torch.zeros_like(usage).scatter(-1, order, (1 - used) * before)


def _linked(link: Tensor, precedence: Tensor, weights: Tensor) -> Tensor:
    """The new links [B, W, N, N]."""
    to, since = weights[..., :, None], weights[..., None, :]  # w[i], w[j]
    link = (1 - to - since) * link + to * precedence[..., None, :]
    diagonal = torch.eye(link.size(-1), dtype=torch.bool, device=link.device)
    return link.masked_fill(diagonal, 0)


def _sharpened(direction: Tensor, sharpness: Tensor) -> Tensor:
    """direction [B, W, R, N] to the power of sharpness [B, R], normalised; of zeros uniform."""
    largest = direction.amax(-1, keepdim=True)
    empty = largest <= 0
    scaled = (direction / largest.masked_fill(empty, 1)).masked_fill(empty, 0)
    logits = sharpness[:, None, :, None] * torch.log(scaled.clamp(min=0) + SHARPEN_FLOOR)
    return torch.softmax(logits, -1)


@samples(5, 3, 4, 6, 8, 5)
def sample_inputs(draw: Draw, sizes: Sequence[int], reads: int = 2) -> Iterator[Sample]:
    """Calls of :func:`dnc_trace` that reach every option once; sizes = (T, B, I, C, N, M), `reads`
    read heads where a call does not say how many.

    Usages are distinct, so that equal slots in another order cannot be mistaken for an error.
    """
    time, batch, width, control, slots, slot = sizes

    def sample(
        name: str,
        reads: int = reads,
        writes: int = 1,
        layers: int = 1,
        norm: bool = False,
        **kwargs: Any,
    ) -> Sample:
        kind = kwargs.get("controller_type", "lstm")
        fields = {key: value for key, value in kwargs.items() if key in DNCOptions._fields}
        options = DNCOptions(**fields)
        controller = draw.controller(kind, layers, width + reads * slot, control)
        rows = options.interface_size(slot, reads, writes)
        weight, bias = draw(rows, control, scale=2 * control**-0.5), draw(rows)
        if norm:
            kwargs["norm"] = (draw(rows), draw(rows))
        kept, linked = layers if kind == "lstm" else 0, writes if options.links else 0

        def weightings(*shape: int) -> Tensor:
            return draw(*shape, slots).softmax(-1) * 0.9

        def state(*rows: int) -> DNCState:
            link = draw(*rows, linked, slots, slots).flatten(-2).softmax(-1)
            link = link.unflatten(-1, (slots, slots)) * (1 - torch.eye(slots, device=link.device))
            return DNCState(
                draw(kept, *rows, control),
                draw(kept, *rows, control),
                draw(*rows, slots, slot),
                draw(*rows, slots).sigmoid(),
                link.to(draw.dtype),
                weightings(*rows, linked),
                weightings(*rows, writes),
                weightings(*rows, reads),
                draw(*rows, reads, slot),
            )

        if "reset" in kwargs:
            kwargs["initial"] = state()
        args = (draw(time, batch, width), state(batch), controller, weight, bias)
        return Sample(name, args, kwargs, "dnc_trace")

    lengths = draw.whole(0, time + 1, batch)
    reset = draw.mask(time, batch, share=0.3)
    yield sample("plain")
    yield sample("many_heads", reads=3, writes=2, usage_gradient=True)
    yield sample("two_layers", layers=2, squash=True, strength="softplus")
    yield sample("feedforward", reads=1, layers=2, controller_type="feedforward", norm_floor=0.0)
    yield sample("sharpen", writes=2, sharpen=True, deallocate=True)
    yield sample("masks", masks=True, mask_min=0.1, eps=1e-8)
    yield sample("no_links", links=False, norm=True)
    yield sample("softmax_allocation", writes=2, allocation="softmax", deallocate=True, masks=True)
    yield sample("lengths", lengths=lengths)
    yield sample("reset", writes=2, lengths=lengths, reset=reset, norm=True)
