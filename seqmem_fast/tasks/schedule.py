"""What follows from how well a training does: the sizes, the learning rate and the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .settings import Settings

LOWEST = 0.02  # the share of the learning rate that training ends with
SMOOTHING = 0.02  # of the loss: it forgets over 50 steps


class Schedule:
    """Sizes grow when the present ones are learnt; the learning rate falls when all are.

    `loss` is smoothed and starts from chance at every stage. When it is under
    `settings.curriculum` the next stage begins; when, at the last stage, it is under
    `settings.learnt`, the learning rate begins to go down a cosine over `settings.fall` of the
    steps, and training ends with it. Whatever is not learnt by then, so it is for the last of
    `settings.steps`.
    """

    def __init__(self, settings: Settings, stages: int, chance: float) -> None:
        self.settings, self.stages, self.chance = settings, stages, chance
        self.falling_steps = round(settings.fall * settings.steps)
        self.stage = 0 if settings.curriculum else stages
        self.loss = chance
        self.turn = settings.steps - self.falling_steps  # the step from which the rate falls
        self.learnt = False

    def with_settings(self, settings: Settings) -> Schedule:
        """At the same stage, with the fall that belongs to these settings.

        Where the rate had not begun to fall, a training goes on as if it had started so; where it
        had, also because all was learnt, the rate is again what these settings give at that step.
        """
        other = Schedule(settings, self.stages, self.chance)
        other.stage, other.loss = self.stage, self.loss
        return other

    def observe(self, loss: float, step: int) -> None:
        """Takes in the loss of a step, the step-th, counted from 1."""
        self.loss += SMOOTHING * (loss - self.loss)
        if self.stage < self.stages:
            if self.loss < self.settings.curriculum:
                self.stage, self.loss = self.stage + 1, self.chance
        elif not self.learnt and step < self.turn and self.loss < self.settings.learnt:
            self.turn, self.learnt = step, True

    @property
    def last_step(self) -> int:
        """The step that training ends with, as far as is known by now."""
        return self.turn + self.falling_steps

    def learning_rate(self, done: int) -> float:
        """That of the next step after so many."""
        fallen = min(1.0, max(0.0, (done - self.turn) / max(1, self.falling_steps)))
        share = LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * fallen)) / 2
        return self.settings.learning_rate * share

    def state(self) -> dict[str, Any]:
        """All that changes, fit for JSON."""
        return {"stage": self.stage, "loss": self.loss, "turn": self.turn, "learnt": self.learnt}

    def take(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state` gave; KeyError or TypeError where it is not that."""
        self.stage, self.turn = int(state["stage"]), int(state["turn"])
        self.loss, self.learnt = float(state["loss"]), bool(state["learnt"])
