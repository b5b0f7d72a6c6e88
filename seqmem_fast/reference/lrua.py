r"""A memory with least recently used access over a sequence in plain PyTorch: what ``seqmem::lrua``
computes.

Paper: Santoro, Bartunov, Botvinick, Wierstra & Lillicrap, One-shot learning with memory-augmented
neural networks, arXiv 1605.06065, 2016. One step, for the input x_t and the reads r_{t-1} of the
step before; head h of R both reads and writes:

.. math::
    h_t &= \mathrm{controller}([x_t, r_{t-1}]), \qquad p_t = W_p h_t + b_p
        && \text{heads side by side} \\
    s_1, \dots, s_R &= \text{the slots of least } u_{t-1}, \text{ equal ones by ascending index} \\
    w^w_h &= g_h w^r_{h, t-1} + (1 - g_h)\, 1[s_h] \\
    M_t &= M_{t-1} \text{ with slot } s_1 \text{ set to zero} + \textstyle\sum_h w^w_h a_h^T \\
    w^r_h &= \mathrm{softmax}_i\left(\beta_h
        \frac{M_i \cdot k_h}{|M_i| |k_h| + 10^{-8}}\right), \qquad r_h = M_t^T w^r_h \\
    u_t &= \gamma u_{t-1} + \textstyle\sum_h (w^r_h + w^w_h)

A head's part of p_t holds key M, add M (not where the key is added itself), gate 1 and, only with
``strength``, strength 1: k and a = tanh, g = sigmoid, beta = 1 + softplus, or 1 without a strength.
Usage only chooses slots: it carries no gradient. The step's features are [h_t, r_t].

Letters: T time, B batch, I input, L layers of C units, N slots of width M, R heads, P = width of
p_t.
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
    norm,
    projected_inputs,
    samples,
    started,
    where_row,
    without_padding,
)

EPSILON = 1e-8  # beside the product of norms


class LRUAState(NamedTuple):
    """What a memory with least recently used access hands from one step to the next.

    L layers of C units (L = 0 for a feed-forward controller), N slots of width M, R heads.
    """

    hidden: Tensor  # [L, B, C]
    cell: Tensor  # [L, B, C]
    memory: Tensor  # [B, N, M]
    usage: Tensor  # [B, N], never differentiated
    read_weights: Tensor  # [B, R, N]
    reads: Tensor  # [B, R, M]

    def detach(self) -> LRUAState:
        """The same values without their history: later gradients end here."""
        return LRUAState(*(t.detach() for t in self))


class LRUATrace(NamedTuple):
    """What the heads did in every step; zero beyond ``lengths``."""

    usage: Tensor  # [T, B, N]
    write_weights: Tensor  # [T, B, R, N]
    read_weights: Tensor  # [T, B, R, N]


def lrua(
    input: Tensor,
    state: LRUAState,
    controller: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor,
    **options: Any,
) -> tuple[Tensor, LRUAState]:
    """input [T, B, I] -> features [T, B, C + R * M] and the last state; options as of
    :func:`lrua_trace`."""
    features, state, _ = lrua_trace(input, state, controller, head_weight, head_bias, **options)
    return features, state


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
    """As :func:`lrua`, also with what the heads did in every step.

    controller, initial, lengths, reset: as of :func:`.ntm.ntm_trace`. add: "own", or "key": heads
    write their keys. erase_all: all R slots of least usage are set to zero, not the first alone.
    """
    time, batch, width = input.shape
    input, valid = without_padding(input, lengths)
    heads = _Heads(state, add == "own", strength, erase_all, gamma, head_weight, head_bias)
    layers = controller_layers(controller, width, controller_type)
    projected = projected_inputs(input, controller, layers)

    steps: list[tuple[Tensor, ...]] = []
    state = state._replace(usage=state.usage.detach())
    if initial is not None:
        initial = initial._replace(usage=initial.usage.detach())
    for t in range(time):
        entered = started(reset, initial, t, state)
        hidden, cell, top = controller_step(
            projected[t], entered.hidden, entered.cell, entered.reads, layers, controller_type
        )
        memory, usage, write_weights, read_weights = heads.act(top, entered)
        new = LRUAState(hidden, cell, memory, usage, read_weights, read_weights @ memory)
        steps.append((top, new.reads, new.usage, write_weights, new.read_weights))
        state = new if valid is None else choose(valid[t], new, state)

    if not steps:  # T = 0
        features = input.new_zeros(0, batch, head_weight.size(1) + state.reads.shape[1:].numel())
        weightings = input.new_zeros(0, *state.read_weights.shape)
        trace = LRUATrace(input.new_zeros(0, *state.usage.shape), weightings, weightings.clone())
        return features, state, trace
    tops, reads, *heads_did = (torch.stack(column) for column in zip(*steps, strict=True))
    features, trace = torch.cat((tops, reads.flatten(2)), -1), LRUATrace(*heads_did)
    if valid is not None:
        features = where_row(valid, features, 0)
        trace = LRUATrace(*(where_row(valid, a, 0) for a in trace))
    return features, state, trace


def least_used(usage: Tensor, count: int) -> Tensor:
    """usage [B, N] -> the slots [B, count] of least usage; NaN counts as infinite."""
    usage = usage.masked_fill(usage.isnan(), torch.inf)
    return torch.sort(usage, dim=-1, stable=True).indices[:, :count]


class _Heads:
    """Turns the controller's output into what the heads do.

    The rows of head_weight are put in another order once, so that one call squashes what is
    squashed alike: keys and adds | gates | strengths.
    """

    def __init__(
        self,
        state: LRUAState,
        own_add: bool,
        strength: bool,
        erase_all: bool,
        gamma: float,
        weight: Tensor,
        bias: Tensor,
    ) -> None:
        self.heads, self.width = state.reads.shape[1:]
        self.vectors = 1 + own_add
        self.erased, self.gamma = self.heads if erase_all else 1, gamma
        self.sizes = [self.heads * self.vectors * self.width, self.heads, self.heads * strength]
        each = torch.arange(bias.numel(), device=bias.device).view(self.heads, -1)
        parts = each.split([self.vectors * self.width, 1, int(strength)], -1)
        order = torch.cat([part.flatten() for part in parts])
        self.weight, self.bias = weight[order].t(), bias[order]

    def act(self, top: Tensor, state: LRUAState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The heads' step: from h_t [B, C] to memory, usage, write and read weights."""
        vectors, gate, strength = torch.addmm(self.bias, top, self.weight).split(self.sizes, -1)
        vectors = torch.tanh(vectors).unflatten(-1, (self.heads, self.vectors, self.width))
        key, add = vectors[:, :, 0], vectors[:, :, -1]  # [B, R, M]
        gate = torch.sigmoid(gate).unsqueeze(-1)

        slots = least_used(state.usage, self.heads)
        places = torch.arange(state.usage.size(-1), device=slots.device)
        chosen = slots.unsqueeze(-1) == places  # [B, R, N]
        erased = chosen[:, : self.erased].any(1)
        write_weights = gate * state.read_weights + (1 - gate) * chosen
        kept = torch.where(erased.unsqueeze(-1), 0, state.memory)
        memory = torch.baddbmm(kept, write_weights.mT, add)

        cosines = (key @ memory.mT) / (norm(key)[..., None] * norm(memory)[:, None] + EPSILON)
        if self.sizes[-1]:
            cosines = (1 + F.softplus(strength)).unsqueeze(-1) * cosines
        read_weights = torch.softmax(cosines, -1)
        used = (read_weights.detach() + write_weights.detach()).sum(1)
        return memory, self.gamma * state.usage + used, write_weights, read_weights


@samples(5, 3, 4, 6, 8, 5)
def sample_inputs(draw: Draw, sizes: Sequence[int], heads: int = 2) -> Iterator[Sample]:
    """Calls of :func:`lrua_trace` that reach every option once; sizes = (T, B, I, C, N, M).

    Usages are distinct, so that equal slots in another order cannot be mistaken for an error.
    """
    time, batch, width, control, slots, slot = sizes

    def sample(name: str, heads: int = heads, layers: int = 1, **kwargs: Any) -> Sample:
        heads, kind = min(heads, slots), kwargs.get("controller_type", "lstm")
        controller = draw.controller(kind, layers, width + heads * slot, control)
        vectors = 1 + (kwargs.get("add", "own") == "own")
        rows = heads * (vectors * slot + 1 + kwargs.get("strength", False))
        head_weight, head_bias = draw(rows, control, scale=2 * control**-0.5), draw(rows)
        kept = layers if kind == "lstm" else 0

        def state(*rows: int) -> LRUAState:
            return LRUAState(
                draw(kept, *rows, control),
                draw(kept, *rows, control),
                draw(*rows, slots, slot),
                draw(*rows, slots).sigmoid(),
                draw(*rows, heads, slots).softmax(-1),
                draw(*rows, heads, slot),
            )

        if "reset" in kwargs:
            kwargs["initial"] = state()
        args = (draw(time, batch, width), state(batch), controller, head_weight, head_bias)
        return Sample(name, args, kwargs, "lrua_trace")

    lengths = draw.whole(0, time + 1, batch)
    reset = draw.mask(time, batch, share=0.3)
    yield sample("plain")
    yield sample("one_head", heads=1, add="key", gamma=0.5)
    yield sample("many_heads", heads=5, strength=True, erase_all=True)
    yield sample("two_layers", layers=2, strength=True, add="key")
    yield sample("feedforward", layers=2, controller_type="feedforward")
    yield sample("lengths", lengths=lengths)
    yield sample("reset", reset=reset)
    yield sample("all_padded", layers=2, heads=3, strength=True, lengths=lengths, reset=reset)
