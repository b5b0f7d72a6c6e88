"""One training on its way: all that a step reads and changes, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .model import build_model
from .schedule import Schedule
from .settings import Settings


class Diverged(RuntimeError):
    """The loss, its gradient or the weights are no longer finite numbers."""


class Training:
    """A model, its optimizer, the random state of its data and the number of steps taken.

    Two trainings of the same settings take the same steps bit for bit, also where one of them is
    put away by :meth:`tensors` and :meth:`counters` and brought back by :meth:`restore`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.task = settings.build_task()
        self.model = build_model(settings, self.task)
        self.schedule = Schedule(settings, self.task.stages, self.task.chance)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            settings.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.step_count = 0
        self.seconds = 0.0

    def learning_rate(self) -> float:
        """That of the next step."""
        return self.schedule.learning_rate(self.step_count)

    @property
    def last_step(self) -> int:
        """The step it ends with, as far as is known by now: `settings.steps` or an earlier one."""
        return self.schedule.last_step

    def end_at(self, steps: int) -> None:
        """Goes on to that step, whatever its settings were: see :meth:`Schedule.with_settings`.

        Raises:
            ValueError: not more steps than were taken.
        """
        if steps <= self.step_count:
            raise ValueError(
                f"steps: expected more than the {self.step_count} that were taken, got {steps}"
            )
        self.settings = self.settings.with_changes(steps=steps)
        self.schedule = self.schedule.with_settings(self.settings)

    def step(self) -> tuple[float, float]:
        """One optimizer step on a fresh batch: its loss, and wrong bits or answers a sequence.

        Raises:
            Diverged: the loss or its gradient is not finite; the weights are those before.
        """
        size = self.task.draw(self.generator, self.schedule.stage)
        batch = self.task.training_batch(self.settings.batch_size, self.generator, **size)
        logits = self.model(batch.input)
        loss = self.task.loss(logits, batch)
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(f"the loss at step {self.step_count + 1} is {value}")
        side = getattr(self.model, "side_loss", None)
        (loss if side is None else loss + side).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip, foreach=True).item()
        if not math.isfinite(norm):
            raise Diverged(f"the gradient at step {self.step_count + 1} is {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        self.schedule.observe(value, self.step_count)
        return value, float(self.task.wrong(logits, batch).float().mean())

    def require_finite(self) -> None:
        """Raises Diverged where a weight is not finite: such a checkpoint could not go on."""
        wrong = (name for name, t in self.model.named_parameters() if not t.isfinite().all())
        if name := next(wrong, None):
            raise Diverged(f"after step {self.step_count} not all of {name} is finite")

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimizer state and random state, by name."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{index}.{key}": tensor for key, tensor in state.items()}
        return named | {"generator": self.generator.get_state()}

    def counters(self) -> dict[str, Any]:
        """Settings and counters, fit for JSON."""
        return {
            "settings": self.settings.to_json(),
            "step": self.step_count,
            "seconds": self.seconds,
            "schedule": self.schedule.state(),
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> Training:
        """The training that those came from.

        Raises:
            ValueError: they do not belong together.
        """
        try:
            training = cls(Settings.from_json(counters["settings"]))
            training.step_count = int(counters["step"])
            training.seconds = float(counters["seconds"])
            training.schedule.take(counters["schedule"])
            training._take(tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"not a checkpoint of this training: {error}") from error
        return training

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if rest:
                parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
