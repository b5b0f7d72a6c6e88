"""The networks that are trained: an NTM, or an LSTM to compare with; both input -> logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import LSTM, NTM
from .settings import Settings
from .task import Task


class NTMModel(nn.Module):
    """The NTM alone: its output layer gives the logits."""

    def __init__(self, task: Task, settings: Settings) -> None:
        super().__init__()
        self.ntm = NTM(
            task.input_size,
            task.output_size,
            settings.controller_size,
            settings.memory_size,
            settings.memory_dim,
            heads=settings.heads,
            num_layers=settings.num_layers,
        )

    def forward(self, input: Tensor) -> Tensor:
        """input [T, B, I] -> logits [T, B, O]."""
        logits: Tensor = self.ntm(input)[0]
        return logits

    def trace(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Also the weightings of all heads, [T, B, Hd, N]."""
        logits, _, weightings = self.ntm(input, return_weightings=True)
        return logits, weightings


class LSTMModel(nn.Module):
    """LSTM layers and a linear output: the paper's comparison."""

    def __init__(self, task: Task, settings: Settings) -> None:
        super().__init__()
        self.lstm = LSTM(task.input_size, settings.controller_size, settings.num_layers)
        self.output = nn.Linear(settings.controller_size, task.output_size)

    def forward(self, input: Tensor) -> Tensor:
        """input [T, B, I] -> logits [T, B, O]."""
        logits: Tensor = self.output(self.lstm(input)[0])
        return logits


def build_model(settings: Settings, task: Task) -> nn.Module:
    """The network of these settings, its weights a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return (NTMModel if settings.model == "ntm" else LSTMModel)(task, settings)
