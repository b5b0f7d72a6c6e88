r"""A whole NTM over a sequence in plain PyTorch: what ``seqmem::ntm`` computes.

One step, for the input x_t and the reads r_{t-1} of the step before:

.. math::
    h_t &= \mathrm{controller}([x_t, r_{t-1}]) && \text{LSTM layers, or layers of tanh}(W u + b) \\
    p_t &= W_p h_t + b_p && \text{the parameters of all heads, side by side}

Then the heads act in the order of the string ``heads``. Each computes its weighting from the memory
as it stands (:func:`.ntm_addressing.ntm_addressing`); "w" then writes, "r" reads. A head's part of
p_t holds

    key M, beta 1, gate 1, shift 2r + 1, gamma 1, and for "w" also erase M, add M

with beta = softplus, gate = sigmoid, shift = softmax, gamma = 1 + softplus, erase = sigmoid, and
key and add squashed by tanh or taken as they are. The step's features are [h_t, reads of step t].

Letters: T time, B batch, I input, C controller, N slots, M slot width, Hd heads of which R read,
P = width of p_t.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

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
from .ntm_addressing import NTMState, ntm_addressing, ntm_read, ntm_write


def ntm(
    input: Tensor,
    state: NTMState,
    controller: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor,
    **options: Any,
) -> tuple[Tensor, NTMState]:
    """input [T, B, I] -> features [T, B, C + R * M] and the last state; options as of
    :func:`ntm_trace`."""
    features, state, _ = ntm_trace(input, state, controller, head_weight, head_bias, **options)
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
    """As :func:`ntm`, also with the weightings [T, B, Hd, N] of all steps.

    controller: per layer weight_ih, weight_hh, bias_ih, bias_hh (gates i, f, g, o) for "lstm",
    weight, bias for "feedforward"; the first layer's input is [x_t, r_{t-1}]. initial: the state,
    without its batch dimension, that ``reset`` [T, B] brings a row back to before step t. lengths:
    row b ends after lengths[b] steps; its later features and weightings are zero.
    """
    time, batch, width = input.shape
    input, valid = without_padding(input, lengths)
    layout = _Heads(heads, shift_range, state.memory.size(-1), squash, head_weight, head_bias)
    layers = controller_layers(controller, width, controller_type)
    projected = projected_inputs(input, controller, layers)

    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in range(time):
        entered = started(reset, initial, t, state)
        hidden, cell, top = controller_step(
            projected[t], entered.hidden, entered.cell, entered.reads, layers, controller_type
        )
        memory, weightings, reads = layout.act(top, entered)
        new = NTMState(hidden, cell, memory, weightings, reads)
        steps.append((top, new.reads, new.weightings))
        state = new if valid is None else choose(valid[t], new, state)

    if not steps:  # T = 0
        features = input.new_zeros(0, batch, head_weight.size(1) + state.reads.shape[1:].numel())
        return features, state, input.new_zeros(0, *state.weightings.shape)
    tops, reads, weightings = (torch.stack(column) for column in zip(*steps, strict=True))
    features = torch.cat((tops, reads.flatten(2)), -1)
    if valid is not None:
        features = where_row(valid, features, 0)
        weightings = where_row(valid, weightings, 0)
    return features, state, weightings


class _Heads:
    """Turns the controller's output into what the heads do.

    The rows of head_weight are put in another order once, so that one call squashes what is
    squashed alike: keys and adds | betas and gammas | gates and erases | shifts. Heads that read
    one after the other see the same memory and act together.
    """

    def __init__(
        self, heads: str, reach: int, width: int, squash: bool, weight: Tensor, bias: Tensor
    ) -> None:
        writes, taps = heads.count("w"), 2 * reach + 1
        self.count, self.writes, self.width, self.squash = len(heads), writes, width, squash
        self.taps = taps
        self.sizes = [(self.count + writes) * width, 2 * self.count]
        self.sizes += [self.count + writes * width, self.count * taps]
        self.runs: list[tuple[bool, slice]] = []  # whether they write, and which heads
        start = 0
        for run in re.findall("w|r+", heads):
            self.runs.append((run == "w", slice(start, start + len(run))))
            start += len(run)
        order = self._order(heads, taps)
        self.weight, self.bias = weight[order].t(), bias[order]

    def _order(self, heads: str, taps: int) -> list[int]:
        """Which rows of head_weight the parameters come from, all heads' keys first, and so on."""
        width, start = self.width, 0
        rows: dict[str, list[int]] = {}
        for head in heads:
            sizes = {"key": width, "beta": 1, "gate": 1, "shift": taps, "gamma": 1}
            if head == "w":
                sizes |= {"erase": width, "add": width}
            for name, size in sizes.items():
                rows.setdefault(name, []).extend(range(start, start + size))
                start += size
        names = ("key", "add", "beta", "gamma", "gate", "erase", "shift")
        return [row for name in names for row in rows.get(name, [])]

    def act(self, top: Tensor, state: NTMState) -> tuple[Tensor, Tensor, Tensor]:
        """The heads' step: from h_t [B, C] to memory, weightings [B, Hd, N], reads [B, R, M]."""
        batch, count, memory = top.size(0), self.count, state.memory
        parts = torch.addmm(self.bias, top, self.weight).split(self.sizes, -1)
        vectors = torch.tanh(parts[0]) if self.squash else parts[0]
        vectors = vectors.view(batch, count + self.writes, self.width)  # keys, then adds
        positive = F.softplus(parts[1])
        beta, gamma = positive[:, :count], positive[:, count:] + 1
        unit = torch.sigmoid(parts[2])
        gate, erase = unit[:, :count], unit[:, count:].view(batch, self.writes, self.width)
        shift = torch.softmax(parts[3].view(batch, count, self.taps), -1)

        weightings, reads, written = [], [], 0
        for writes, run in self.runs:
            weights = ntm_addressing(
                memory,
                vectors[:, run],
                beta[:, run],
                gate[:, run],
                shift[:, run],
                gamma[:, run],
                state.weightings[:, run],
            )
            weightings.append(weights)
            if writes:
                one = slice(written, written + 1)
                memory = ntm_write(memory, weights, erase[:, one], vectors[:, count:][:, one])
                written += 1
            else:
                reads.append(ntm_read(memory, weights))
        return memory, torch.cat(weightings, 1), torch.cat(reads, 1) if reads else state.reads


@samples(5, 3, 4, 6, 8, 5)
def sample_inputs(draw: Draw, sizes: Sequence[int]) -> Iterator[Sample]:
    """Calls of :func:`ntm` that reach every option once; sizes = (T, B, I, C, N, M)."""
    time, batch, width, control, slots, slot = sizes

    def sample(
        name: str, heads: str = "wr", layers: int = 1, shift_range: int = 1, **kwargs: Any
    ) -> Sample:
        reads, kind = heads.count("r"), kwargs.get("controller_type", "lstm")
        controller = draw.controller(kind, layers, width + reads * slot, control)
        rows = len(heads) * (slot + 2 * shift_range + 4) + heads.count("w") * 2 * slot
        head_weight, head_bias = draw(rows, control, scale=2 * control**-0.5), draw(rows)
        kept = layers if kind == "lstm" else 0

        def state(*rows: int) -> NTMState:
            return NTMState(
                draw(kept, *rows, control),
                draw(kept, *rows, control),
                draw(*rows, slots, slot),
                draw(*rows, len(heads), slots).softmax(-1),
                draw(*rows, reads, slot),
            )

        if "reset" in kwargs:
            kwargs["initial"] = state()
        if heads != "wr":
            kwargs["heads"] = heads
        if shift_range != 1:
            kwargs["shift_range"] = shift_range
        args = (draw(time, batch, width), state(batch), controller, head_weight, head_bias)
        return Sample(name, args, kwargs, "ntm_trace")

    lengths = draw.whole(0, time + 1, batch)
    reset = draw.mask(time, batch, share=0.3)
    yield sample("plain")
    yield sample("read_first", heads="rw", squash=False)
    yield sample("many_heads", heads="wrrwwr", shift_range=2)
    yield sample("writes_only", heads="w", shift_range=0)
    yield sample("two_layers", layers=2)
    yield sample("feedforward", layers=2, controller_type="feedforward")
    yield sample("lengths", lengths=lengths)
    yield sample("reset", reset=reset)
    yield sample("all_padded", layers=2, heads="rwr", lengths=lengths, reset=reset)


def __getattr__(name: str) -> Any:
    if name == "sequence_sample_inputs":
        warnings.warn(f"{__name__}.{name} is now sample_inputs", DeprecationWarning, stacklevel=2)
        return sample_inputs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
