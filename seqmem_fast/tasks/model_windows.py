"""Layers of attention to the newest steps and to a task's first ones, or to all earlier steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..nn import Attention, WindowAttention, WindowWeights
from .task import Task

if TYPE_CHECKING:
    from .settings import Settings


class _Layer(nn.Module):
    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(width), attention
        self.rest = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )


class AttentionModel(nn.Module):
    """Causal attention layers, each followed by two linear ones, on a residual stream.

    band: to the `memory_size` newest steps and to the task's `header`, in time and memory that grow
    with the sequence. dense: to all earlier steps, by torch's fused op, which holds no weights.

    Where a step is, is told by sines and cosines whose longest period is twice the window: a
    network of short sequences knows how to read long ones.
    """

    def __init__(self, task: Task, settings: Settings) -> None:
        super().__init__()
        width, heads = settings.controller_size, settings.read_heads
        self.window, self.header = settings.memory_size, getattr(task, "header", 0)
        self.is_band = settings.model == "band"
        self.periods = 1 + math.ceil(math.log2(self.window))
        self.embedding = nn.Linear(task.input_size + 2 * self.periods, width)
        self.layers = nn.ModuleList(
            _Layer(self._attention(width, heads), width) for _ in range(settings.num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, task.output_size)

    def _attention(self, width: int, heads: int) -> nn.Module:
        if not self.is_band:
            return Attention(width, heads)
        return WindowAttention(width, heads, self.window - 1, 0, global_tokens=self.header)

    def forward(self, input: Tensor) -> Tensor:
        """input [T, B, I] -> logits [T, B, O]."""
        return self._run(input, False)[0]

    def trace(self, input: Tensor) -> tuple[Tensor, list[WindowWeights]]:
        """Also each layer's weights, of a band."""
        return self._run(input, True)

    def _run(self, input: Tensor, need_weights: bool) -> tuple[Tensor, list[WindowWeights]]:
        steps, batch = input.shape[:2]
        period = 2.0 ** torch.arange(1, self.periods + 1)  # 2, 4, .. twice the window or more
        angle = 2 * math.pi * torch.arange(steps)[:, None] / period
        told = torch.cat((angle.sin(), angle.cos()), 1).to(input.dtype)
        x = self.embedding(torch.cat((input, told[:, None].expand(-1, batch, -1)), 2))
        traced = []
        for layer in (each for each in self.layers if isinstance(each, _Layer)):
            y = layer.before(x)
            if self.is_band:
                read, weights = layer.attention(
                    y, y, y, need_weights=need_weights, average_attn_weights=False
                )
                traced.append(weights)
            else:
                none = torch.ones((), dtype=torch.bool).expand(steps, steps)  # the hint is enough
                read, _ = layer.attention(
                    y, y, y, need_weights=False, attn_mask=none, is_causal=True
                )
            x = x + read
            x = x + layer.rest(x)
        logits: Tensor = self.output(self.norm(x))
        return logits, traced
