"""What determines a training: every number that the weights at its end depend on."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any

from . import TASKS
from .model import BUILDERS, DNC_OPTIONS
from .model_fixed import COMPRESSIONS
from .task import Task


@dataclass(frozen=True)
class Settings:
    """The settings of one training; equal settings give equal weights on the same machine
    with as many threads.

    What `Annotated` says is the help of the command line.

    Raises:
        ValueError: an unknown task or model, a number out of range.
    """

    task: str
    sizes: Mapping[str, int] = field(default_factory=dict)  # fields of the task, its defaults else
    model: Annotated[str, "the network"] = "ntm"
    seed: Annotated[int, "of the weights and of the data"] = 0
    steps: Annotated[int, "of the optimizer, at most"] = 5000
    batch_size: Annotated[int, "sequences a step"] = 8
    learning_rate: Annotated[float, "until it falls"] = 3e-3
    weight_decay: Annotated[float, "AdamW's, times the learning rate at each step"] = 0.01
    clip: Annotated[float, "largest norm of the gradient"] = 1.0
    curriculum: Annotated[
        float, "the loss under which sizes grow by one; 0: all from the start"
    ] = 0.0
    fall: Annotated[float, "the last share of the steps, over which the learning rate falls"] = 0.5
    learnt: Annotated[float, "the loss under which that begins early; 0: never"] = 0.0
    controller_size: Annotated[int, "units of the controller or LSTM; else the width"] = 100
    num_layers: Annotated[int, "of the controller or LSTM; else of the network"] = 1
    memory_size: Annotated[
        int, "slots; features of a key in an associative memory; steps of a band"
    ] = 128
    memory_dim: Annotated[int, "width of a slot; features of a value in an associative memory"] = 20
    heads: Annotated[str, "of an NTM, in order: w writes, r reads"] = "wr"
    read_heads: Annotated[
        int, "of a DNC, of attention, or of a MANN, where each writes as well"
    ] = 4
    write_heads: Annotated[int, "of a DNC"] = 1
    dnc_options: Annotated[str, f"of a DNC, separated by commas: {', '.join(DNC_OPTIONS)}"] = ""
    compression: Annotated[str, f"of a compressive memory: {', '.join(COMPRESSIONS)}"] = "conv"
    ratio: Annotated[int, "of a compressive memory: vectors in a compressed one"] = 4
    segment: Annotated[int, "of a compressive memory: steps that are read at once"] = 16

    def __post_init__(self) -> None:
        known_by: dict[str, Collection[str]] = {
            "task": TASKS,
            "model": BUILDERS,
            "compression": COMPRESSIONS,
        }
        for name, known in known_by.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if unknown := set(self.dnc_options.split(",")) - {"", *DNC_OPTIONS}:
            names = ", ".join(DNC_OPTIONS)
            raise ValueError(f"dnc_options: expected some of {names}, got {sorted(unknown)}")
        for name in (
            "steps",
            "batch_size",
            "controller_size",
            "num_layers",
            "memory_size",
            "memory_dim",
            "read_heads",
            "write_heads",
            "ratio",
            "segment",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected at least 0, got {self.weight_decay}")
        for name in ("learning_rate", "weight_decay"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)}")
        for name in ("curriculum", "fall", "learnt"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:  # all that a generator takes
            raise ValueError(f"seed: expected 0 to {2**32 - 1}, got {self.seed}")
        self.build_task()

    def build_task(self) -> Task:
        """The task with these sizes."""
        kind = TASKS[self.task]
        unknown = set(self.sizes) - {each.name for each in fields(kind)}  # type: ignore[arg-type]
        if unknown:
            raise ValueError(f"{self.task}: unknown sizes {', '.join(sorted(unknown))}")
        return kind(**self.sizes)

    def to_json(self) -> dict[str, Any]:
        """As a dictionary that JSON holds without loss."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Settings:
        """The settings that :meth:`to_json` gave; TypeError where names are missing or unknown."""
        return cls(**content)

    def with_changes(self, **changes: Any) -> Settings:
        """The same but for those."""
        return replace(self, **changes)


# What differs from the above, task by task.
DEFAULTS: dict[str, dict[str, Any]] = {
    "copy": {"steps": 8000, "weight_decay": 0.03},
    "copy_in_turn": {
        "model": "dnc",
        "steps": 12_000,
        "batch_size": 16,
        "learning_rate": 2e-3,
        "weight_decay": 0.0,
        "curriculum": 0.05,
        "fall": 0.25,
        "learnt": 0.005,
        "controller_size": 32,
        "memory_size": 10,
        "memory_dim": 16,
        "read_heads": 1,
    },
    "distant_recall": {
        "model": "compressive",
        "steps": 350,
        "batch_size": 32,
        "weight_decay": 0.0,
        "controller_size": 64,
        "memory_size": 32,
        "read_heads": 1,
        "compression": "conv_reconstruction",
    },
    "long_copy": {
        "model": "band",
        "steps": 400,
        "fall": 0.4,
        "batch_size": 32,
        "learning_rate": 5e-3,
        "weight_decay": 0.0,
        "controller_size": 32,
        "num_layers": 2,
        "memory_size": 8,
        "read_heads": 4,
    },
    "overwrite_recall": {
        "model": "gated_delta",
        "steps": 300,
        "fall": 0.4,
        "batch_size": 32,
        "learning_rate": 4e-3,
        "weight_decay": 0.0,
        "controller_size": 64,
        "memory_size": 32,
        "memory_dim": 32,
    },
    "associative_recall": {
        "steps": 10_000,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
    },
    "graph_traversal": {
        "model": "dnc",
        "steps": 12_000,
        "batch_size": 16,
        "learning_rate": 2e-3,
        "weight_decay": 0.0,
        "curriculum": 0.3,
        "fall": 0.25,
        "learnt": 0.03,
        "controller_size": 128,
        "memory_size": 64,
        "memory_dim": 64,
        "read_heads": 1,
        "dnc_options": "no_links,feedforward,masks",
    },
    "one_shot": {
        "model": "mann",
        "steps": 10_000,
        "fall": 0.4,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "controller_size": 200,
        "memory_dim": 40,
    },
    "repeat_copy": {
        "steps": 40_000,
        "learning_rate": 2e-3,
        "weight_decay": 0.0,
        "curriculum": 0.05,
        "fall": 0.2,
        "learnt": 0.02,
    },
}


def standard(task: str) -> Settings:
    """The settings that a task is trained with where nothing else is asked for."""
    return Settings(task, **DEFAULTS.get(task, {}))
