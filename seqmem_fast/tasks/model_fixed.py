"""Networks whose memory has a fixed size by a rule of its own: an associative one, or the newest
vectors of the stream and compressed older ones. Each input [T, B, I] -> logits [T, B, O]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..nn import CompressiveAttention, CompressiveMemory, CompressiveState
from .task import Task

if TYPE_CHECKING:
    from .settings import Settings

KEPT_AT_FIRST = 5.0  # a gated memory's decay is sigmoid(5) = 0.993 a step before it learns

# name: the ratio, the function and what trains it; None: the ratio that is asked for
COMPRESSIONS: dict[str, tuple[int | None, str, str]] = {
    "none": (1, "mean", "reconstruction"),  # groups of one: all slots are plain
    "mean": (None, "mean", "reconstruction"),
    "max": (None, "max", "reconstruction"),
    "conv": (None, "conv", "task"),
    "conv_reconstruction": (None, "conv", "reconstruction"),
    "most_used": (None, "most_used", "reconstruction"),
}


class _Associative(nn.Module):
    """A layer that keeps K V numbers, between projections that all kinds share.

    additive: S += beta k v'. delta: what the key held is taken away first. gated_delta: and S
    decays. window: attention over the newest K / 2 steps, a key and a value of V numbers each, with
    a learned preference for newer ones.
    """

    def __init__(self, kind: str, width: int, keys: int, values: int) -> None:
        super().__init__()
        self.kind, self.values = kind, values
        self.keys = values if kind == "window" else keys
        self.kept = keys // 2
        self.norm = nn.RMSNorm(width)
        self.project = nn.Linear(width, 2 * self.keys + values)
        if kind == "window":
            self.newer = nn.Parameter(torch.zeros(1))
        else:
            self.gates = nn.Linear(width, 2 if kind == "gated_delta" else 1)
        self.output = nn.Linear(values, width)

    def forward(self, input: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        x = self.norm(input)
        q, k, v = self.project(x).split((self.keys, self.keys, self.values), 2)
        if self.kind == "window":
            read = self._window(q, k, v)
        else:
            beta, *decays = self.gates(x).split(1, 2)
            beta = beta.sigmoid()
            if self.kind == "additive":
                q, k = F.normalize(q, dim=2), F.normalize(k, dim=2)
                read = (q @ k.transpose(1, 2)).tril() @ (beta * v)
            else:
                decay = F.logsigmoid(decays[0] + KEPT_AT_FIRST) if decays else None
                q, k, v = (part.unsqueeze(2) for part in (q, k, v))
                read = ops.delta_memory(q, k, v, beta, decay, scale=1.0, qk_l2norm=True)[0]
                read = read.squeeze(2)
        output: Tensor = self.output(read)
        return output

    def _window(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The preference is a further feature: keys have their step there, queries its weight."""
        step = torch.arange(k.shape[1], dtype=k.dtype).view(1, -1, 1)
        k = torch.cat((k, step.expand(k.shape[0], -1, -1)), 2)
        q = torch.cat((q, (self.newer * self.keys**0.5).expand(*q.shape[:2], 1)), 2)
        q, k, v = (part.unsqueeze(1) for part in (q, k, v))
        scale = self.keys**-0.5
        read, _, _ = ops.window_attention(
            q, k, v, self.kept - 1, 0, scale=scale, return_weights=False
        )
        return read.squeeze(1)


class AssociativeModel(nn.Module):
    """Residual layers over an associative memory of `memory_size` times `memory_dim` numbers."""

    def __init__(self, task: Task, settings: Settings) -> None:
        super().__init__()
        width, keys = settings.controller_size, settings.memory_size
        if settings.model == "window" and keys < 2:
            raise ValueError(f"memory_size: expected at least 2 of a window, got {keys}")
        self.embedding = nn.Linear(task.input_size, width)
        self.layers = nn.ModuleList(
            _Associative(settings.model, width, keys, settings.memory_dim)
            for _ in range(settings.num_layers)
        )
        self.output = nn.Linear(width, task.output_size)

    def forward(self, input: Tensor) -> Tensor:
        """input [T, B, I] -> logits [T, B, O]."""
        x = self.embedding(input.transpose(0, 1))
        for layer in self.layers:
            x = x + layer(x)
        logits: Tensor = self.output(x)
        return logits.transpose(0, 1)


class CompressiveModel(nn.Module):
    """Layers of attention over a compressive memory, which read the stream segment by segment.

    Of `memory_size` slots half are compressed.
    """

    def __init__(self, task: Task, settings: Settings) -> None:
        super().__init__()
        width, slots = settings.controller_size, settings.memory_size
        if slots < 2:
            raise ValueError(f"memory_size: expected at least 2 of a compressive one, got {slots}")
        ratio, function, trained_by = COMPRESSIONS[settings.compression]
        self.segment = settings.segment
        self.trained_apart = function == "conv" and trained_by == "reconstruction"
        self.embedding = nn.Sequential(nn.Linear(task.input_size, width), nn.LayerNorm(width))
        self.layers = nn.ModuleList(
            CompressiveAttention(
                width,
                settings.read_heads,
                slots - slots // 2,
                slots // 2,
                settings.ratio if ratio is None else ratio,
                function,
                trained_by,
            )
            for _ in range(settings.num_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(settings.num_layers))
        self.output = nn.Linear(width, task.output_size)
        self.side_loss: Tensor | None = None  # of the last call: what trains the compression alone

    @property
    def attentions(self) -> list[CompressiveAttention]:
        """The layers, as what they are."""
        return [layer for layer in self.layers if isinstance(layer, CompressiveAttention)]

    @property
    def memory(self) -> CompressiveMemory:
        """That of the first layer."""
        return self.attentions[0].memory

    def forward(self, input: Tensor) -> Tensor:
        """input [T, B, I] -> logits [T, B, O]."""
        return self.trace(input)[0]

    def trace(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Also what the first layer's last segment attends to, [B, T', slots + T']."""
        attentions = self.attentions
        states: list[CompressiveState | None] = [None] * len(attentions)
        losses, outputs = [], []
        for segment in self.embedding(input.transpose(0, 1)).split(self.segment, 1):
            x = segment
            for index, (layer, norm) in enumerate(zip(attentions, self.norms, strict=True)):
                read, states[index], weights = layer(x, states[index])
                x = norm(x + read)
                if index == 0:
                    looked = weights
                if self.trained_apart and self.training:
                    losses.append(layer.reconstruction_loss())
            outputs.append(x)
        self.side_loss = torch.stack(losses).sum() if losses else None
        logits: Tensor = self.output(torch.cat(outputs, 1))
        return logits.transpose(0, 1), looked
