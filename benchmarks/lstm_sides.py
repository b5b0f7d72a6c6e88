"""The LSTM as torch users run it and as this package runs it: what bench_lstm.py times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import seqmem_fast
from benchmarks.rows import INFERENCE, OURS, TRAINING, Contender

Outputs = tuple[Tensor, ...]
Forward = Callable[[nn.Module, "Sample"], Outputs]


@dataclass(frozen=True)
class Sample:
    """One call's arguments; `lengths`, `reset` and `state` only where the row has them."""

    x: Tensor  # [T, B, I]; [B, I] for a cell
    state: tuple[Tensor, Tensor] | None = None  # 2 of [B, H]
    lengths: Tensor | None = None  # [B]
    reset: Tensor | None = None  # [T, B]

    def double(self) -> Sample:
        """The same numbers in float64, the input a fresh leaf."""
        x = self.x.detach().double().requires_grad_(self.x.requires_grad)
        state = self.state and (self.state[0].double(), self.state[1].double())
        return replace(self, x=x, state=state)


def layer(module: nn.Module, s: Sample) -> Outputs:
    """The module over the whole sequence."""
    output, state = module(s.x)
    return output, *state


def cell(module: nn.Module, s: Sample) -> Outputs:
    """One step of a cell."""
    hy, cy = module(s.x, s.state)
    return hy, cy


def packed(module: nn.Module, s: Sample) -> Outputs:
    """Variable lengths as nn.LSTM takes them: pack, run, pad."""
    if s.lengths is None:
        raise ValueError("variable lengths need lengths")
    packed_x = nn.utils.rnn.pack_padded_sequence(s.x, s.lengths, enforce_sorted=False)
    packed_output, state = module(packed_x)
    output, _ = nn.utils.rnn.pad_packed_sequence(packed_output, total_length=s.x.shape[0])
    return output, *state


def with_lengths(module: nn.Module, s: Sample) -> Outputs:
    """Variable lengths as this package takes them."""
    output, state = module(s.x, lengths=s.lengths)
    return output, *state


def with_reset(module: nn.Module, s: Sample) -> Outputs:
    """A rollout with episode ends, in one call."""
    output, state = module(s.x, reset=s.reset)
    return output, *state


def _keep(s: Sample) -> Tensor:
    if s.reset is None:
        raise ValueError("a rollout needs reset")
    return (~s.reset).to(s.x.dtype).unsqueeze(-1)  # [T, B, 1]


def _hidden_size(module: nn.Module) -> int:
    return list(module.parameters())[1].shape[1]  # weight_hh is [4H, H]


def cell_loop(module: nn.Module, s: Sample) -> Outputs:
    """The usual rollout: a loop over nn.LSTMCell, the state masked at each step."""
    h = c = s.x.new_zeros(s.x.shape[1], _hidden_size(module))
    steps = []
    for x, keep in zip(s.x.unbind(0), _keep(s).unbind(0), strict=True):
        h, c = module(x, (h * keep, c * keep))
        steps.append(h)
    return torch.stack(steps), h.unsqueeze(0), c.unsqueeze(0)


def layer_loop(module: nn.Module, s: Sample) -> Outputs:
    """The other usual rollout: nn.LSTM called for one step at a time."""
    h = c = s.x.new_zeros(1, s.x.shape[1], _hidden_size(module))
    steps = []
    for x, keep in zip(s.x.split(1), _keep(s).unbind(0), strict=True):
        output, (h, c) = module(x, (h * keep, c * keep))
        steps.append(output)
    return torch.cat(steps), h, c


def inference(name: str, module: nn.Module, forward: Forward) -> Contender:
    """eval and no_grad, as one serves a model."""

    def call(s: Sample) -> Outputs:
        with torch.no_grad():
            return forward(module, s)

    module.eval()
    return Contender(name, lambda s: s, call, lambda s: list(call(s)))


def training(name: str, module: nn.Module, forward: Forward) -> Contender:
    """Forward, sum, backward to weights and input, gradients set to None."""

    def clear(s: Sample) -> None:
        module.zero_grad(set_to_none=True)
        s.x.grad = None

    def call(s: Sample) -> None:
        forward(module, s)[0].sum().backward()
        clear(s)

    def values(s: Sample) -> list[Tensor]:
        forward(module, s)[0].sum().backward()
        grads = [t.grad for t in (s.x, *module.parameters()) if t.grad is not None]
        clear(s)
        return grads

    module.train()
    return Contender(name, lambda s: s, call, values)


MODES: dict[str, Callable[[str, nn.Module, Forward], Contender]] = {
    INFERENCE: inference,
    TRAINING: training,
}


# What a user of torch alone would write; where there are two ways, the faster counts.
TORCH: dict[str, dict[str, Forward]] = {
    "layer": {"nn.LSTM": layer},
    "cell": {"nn.LSTMCell": cell},
    "lengths": {"nn.LSTM, packed": packed},
    "rollout": {"loop over nn.LSTMCell": cell_loop, "loop over nn.LSTM": layer_loop},
}


def torch_side(name: str, kind: str, weights: nn.LSTM) -> tuple[str, nn.Module, Forward]:
    """One of TORCH's ways, with its module holding the given weights."""
    forward = TORCH[kind][name]
    if not name.endswith("nn.LSTMCell"):
        return name, weights, forward
    module = nn.LSTMCell(weights.input_size, weights.hidden_size, dtype=_dtype(weights))
    _copy(weights, module)
    return name, module, forward


def our_side(kind: str, weights: nn.LSTM) -> tuple[str, nn.Module, Forward]:
    """The same work through this package's modules, with the same weights."""
    family, forward = {
        "layer": (seqmem_fast.LSTM, layer),
        "cell": (seqmem_fast.LSTMCell, cell),
        "rollout": (seqmem_fast.LSTM, with_reset),
        "lengths": (seqmem_fast.LSTM, with_lengths),
    }[kind]
    layers = {"num_layers": weights.num_layers} if family is seqmem_fast.LSTM else {}
    module = family(weights.input_size, weights.hidden_size, dtype=_dtype(weights), **layers)
    _copy(weights, module)
    return OURS, module, forward


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    """Weights by order (ih, hh, then the biases), since a cell's names lack the layer."""
    for theirs, its in zip(source.parameters(), target.parameters(), strict=True):
        its.copy_(theirs)
