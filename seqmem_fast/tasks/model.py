"""The networks that are trained, each input [T, B, I] -> logits [T, B, O]."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn import DNC, LSTM, MANN, NTM
from .model_fixed import AssociativeModel, CompressiveModel
from .model_windows import AttentionModel
from .task import Task

if TYPE_CHECKING:
    from .settings import Settings


DNC_OPTIONS: dict[str, dict[str, Any]] = {  # those of the layer that need no figure
    "no_links": {"links": False},
    "feedforward": {"controller": "feedforward"},
    **{name: {name: True} for name in ("masks", "deallocate", "sharpen", "layer_norm")},
}


class MemoryModel(nn.Module):
    """A network with a memory alone: its output layer gives the logits.

    Args:
        name: under which its weights are kept.
        layer: called as layer(input) -> (output, state).
        tracing: the argument that makes it return what its heads did as well.
    """

    def __init__(self, name: str, layer: nn.Module, tracing: str) -> None:
        super().__init__()
        self.name, self.tracing = name, tracing
        self.add_module(name, layer)

    def forward(self, input: Tensor) -> Tensor:
        """input [T, B, I] -> logits [T, B, O]."""
        logits: Tensor = self.get_submodule(self.name)(input)[0]
        return logits

    def trace(self, input: Tensor) -> tuple[Tensor, Any]:
        """Also what the layer's heads did: an NTM's weightings [T, B, Hd, N], others' traces."""
        logits, _, trace = self.get_submodule(self.name)(input, **{self.tracing: True})
        return logits, trace


class LSTMModel(nn.Module):
    """LSTM layers and a linear output: the comparison."""

    def __init__(self, task: Task, settings: Settings) -> None:
        super().__init__()
        self.lstm = LSTM(task.input_size, settings.controller_size, settings.num_layers)
        self.output = nn.Linear(settings.controller_size, task.output_size)

    def forward(self, input: Tensor) -> Tensor:
        """input [T, B, I] -> logits [T, B, O]."""
        logits: Tensor = self.output(self.lstm(input)[0])
        return logits


def _ntm(task: Task, settings: Settings) -> nn.Module:
    layer = NTM(*_sizes(task, settings), heads=settings.heads, num_layers=settings.num_layers)
    return MemoryModel("ntm", layer, "return_weightings")


def _dnc(task: Task, settings: Settings) -> nn.Module:
    chosen = [DNC_OPTIONS[name] for name in settings.dnc_options.split(",") if name]
    layer = DNC(
        *_sizes(task, settings),
        read_heads=settings.read_heads,
        write_heads=settings.write_heads,
        num_layers=settings.num_layers,
        **{name: value for option in chosen for name, value in option.items()},
    )
    return MemoryModel("dnc", layer, "return_trace")


def _mann(task: Task, settings: Settings) -> nn.Module:
    sizes, heads = _sizes(task, settings), settings.read_heads
    # Without a strength a perfect match among 128 slots gets a fiftieth of the weight.
    layer = MANN(*sizes, read_heads=heads, num_layers=settings.num_layers, strength=True)
    return MemoryModel("mann", layer, "return_trace")


def _sizes(task: Task, settings: Settings) -> tuple[int, int, int, int, int]:
    """What all layers with a memory take first."""
    controller = settings.controller_size
    return (
        task.input_size,
        task.output_size,
        controller,
        settings.memory_size,
        settings.memory_dim,
    )


BUILDERS: dict[str, Callable[[Task, Settings], nn.Module]] = {
    "ntm": _ntm,
    "dnc": _dnc,
    "mann": _mann,
    "lstm": LSTMModel,
    **dict.fromkeys(("additive", "window", "delta", "gated_delta"), AssociativeModel),
    "compressive": CompressiveModel,
    **dict.fromkeys(("band", "dense"), AttentionModel),
}


def build_model(settings: Settings, task: Task) -> nn.Module:
    """The network of these settings, its weights a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return BUILDERS[settings.model](task, settings)
