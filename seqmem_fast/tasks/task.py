"""What all algorithmic tasks share: a batch, its score, and the stream that a DataLoader takes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, get_worker_info

Size = dict[str, int]  # what one batch's rows have in common: {"length": 7}


class Batch(NamedTuple):
    """Sequences of one size, time first; the loss counts where `mask` is 1."""

    input: Tensor  # [T, B, I]
    target: Tensor  # [T, B, O] of 0 and 1; 0 where the mask is
    mask: Tensor  # [T, B] of 0 and 1
    lengths: Tensor  # [B] int64, the steps of each row: T, since a batch's rows are equally long


@dataclass(frozen=True)
class Probe:
    """A size to evaluate at, and whether training has sequences as large."""

    label: str
    size: Size
    trained: bool


class Task(ABC):
    """A family of sequences to learn; all that is random comes from the generator given.

    An answer is `output_size` bits at each step, unless a task says otherwise by :meth:`loss`,
    :meth:`wrong`, :meth:`counted`, `chance` and `unit`.
    """

    unit: ClassVar[str] = "bits"  # what is right or wrong
    fixed: ClassVar[tuple[str, ...]] = ()  # options that are the size of every training batch

    @property
    @abstractmethod
    def input_size(self) -> int:
        """I: the width of the input."""

    @property
    @abstractmethod
    def output_size(self) -> int:
        """O: the bits of the target at each step."""

    def draw(self, generator: Generator, stage: int | None = None) -> Size:
        """The size of a training batch, at random but for what is `fixed`.

        stage, 0 to `stages`: of a curriculum, from the least sizes to all of them; None: all.
        """
        return {name: getattr(self, name) for name in self.fixed}

    @property
    def stages(self) -> int:
        """The last stage of this task's curriculum; 0 where all sizes are there from the start."""
        return 0

    @abstractmethod
    def batch(self, batch_size: int, generator: Generator, *args: Any, **size: Any) -> Batch:
        """Random sequences of that size; a task names the whole numbers that make it."""

    def training_batch(
        self, batch_size: int, generator: Generator, *args: Any, **size: Any
    ) -> Batch:
        """What a training is shown: as :meth:`batch`, unless what is rare needs to come oftener."""
        return self.batch(batch_size, generator, *args, **size)

    @abstractmethod
    def probes(self) -> list[Probe]:
        """The sizes that a finished training is judged by, beyond training's own too."""

    @property
    def chance(self) -> float:
        """The loss of one who knows nothing."""
        return math.log(2)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """What is minimised: nats, the mean over all that counts; logits [T, B, O]."""
        return loss_of(logits, batch)

    def wrong(self, logits: Tensor, batch: Batch) -> Tensor:
        """How many bits, or what else `unit` names, of each sequence come out wrong, [B]."""
        return wrong_bits(logits, batch)

    def counted(self, batch: Batch) -> float:
        """How many there are in a batch."""
        return float(batch.mask.sum()) * batch.target.shape[2]

    def further(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Other shares from 0 to 1 to judge by: a heading, and one of each sequence, [B]."""
        return {}

    def best_cost(self, batch: Batch) -> float | None:
        """The bits per sequence that no learner gets under on average; None: zero."""
        return None


@dataclass(frozen=True)
class BitsTask(Task):
    """A task of vectors of random bits, with flags on input channels of their own.

    Raises:
        ValueError: bits below 1, a range that does not start at 1 or later, or is empty.
    """

    name: ClassVar[str]
    flags: ClassVar[int] = 1

    bits: Annotated[int, "of each vector"] = 8

    def __post_init__(self) -> None:
        require_positive(self.name, bits=self.bits)
        for name, (low, high) in self.ranges().items():
            if not 1 <= low <= high:
                raise ValueError(
                    f"{self.name}: expected 1 <= min_{name} <= max_{name}, got {low} and {high}"
                )

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Least and most of each number that makes a size; a curriculum lets the last one grow."""
        return {}

    @property
    def input_size(self) -> int:
        return self.bits + self.flags

    @property
    def output_size(self) -> int:
        return self.bits

    @property
    def stages(self) -> int:
        if not self.ranges():
            return 0
        low, high = [*self.ranges().values()][-1]
        return max(0, high - low - 1)  # stage 0 has low and the next one

    def draw(self, generator: Generator, stage: int | None = None) -> Size:
        ranges = self.ranges()
        growing = [*ranges][-1:]
        return super().draw(generator, stage) | {
            name: draw_between(low, high, generator, stage if name in growing else None)
            for name, (low, high) in ranges.items()
        }


class AnswersTask(Task):
    """A task whose answers are each one of `output_size`: the target is 1 there."""

    unit: ClassVar[str] = "answers"

    @property
    def chance(self) -> float:
        return math.log(self.output_size)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy in nats, the mean over all answers."""
        return -(logits.log_softmax(2) * batch.target).sum() / batch.mask.sum()

    def wrong(self, logits: Tensor, batch: Batch) -> Tensor:
        return (~self.right(logits, batch) * batch.mask).sum(0)

    def counted(self, batch: Batch) -> float:
        return float(batch.mask.sum())

    def right(self, logits: Tensor, batch: Batch) -> Tensor:
        """Which steps say what they should, bool [T, B]."""
        return logits.argmax(2) == batch.target.argmax(2)


class Score(NamedTuple):
    """Means over sequences."""

    wrong_bits: float  # of the output rounded to 0 or 1, per sequence; or answers: `Task.unit`
    cost: float  # negative log2 likelihood, bits per sequence
    perfect: float  # share of sequences without a wrong one
    best_cost: float | None
    further: dict[str, float]  # a task's own figures


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """Binary cross-entropy in nats, the mean over all bits that count; logits [T, B, O]."""
    each = F.binary_cross_entropy_with_logits(logits, batch.target, reduction="none").sum(2)
    return (each * batch.mask).sum() / (batch.mask.sum() * batch.target.shape[2])


def wrong_bits(logits: Tensor, batch: Batch) -> Tensor:
    """How many bits of each sequence come out wrong, [B]; logits [T, B, O]."""
    return (((logits > 0) != (batch.target > 0.5)).sum(2) * batch.mask).sum(0)


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, size: Size | None, sequences: int, seed: int, batch_size: int = 50
) -> Score:
    """The score over fresh sequences of that size, or of training's sizes where it is None.

    The model is called as model(input) -> logits [T, B, O]. The same seed gives the same sequences.
    """
    generator = torch.Generator().manual_seed(seed)
    wrong, cost, best = [], 0.0, 0.0
    known = False
    further: dict[str, list[Tensor]] = {}
    for start in range(0, sequences, batch_size):
        rows = min(batch_size, sequences - start)
        batch = task.batch(rows, generator, **(task.draw(generator) if size is None else size))
        logits = model(batch.input)
        wrong.append(task.wrong(logits, batch))
        cost += float(task.loss(logits, batch)) * task.counted(batch) / math.log(2)
        for name, share in task.further(logits, batch).items():
            further.setdefault(name, []).append(share)
        best_here = task.best_cost(batch)
        if best_here is not None:
            known, best = True, best + best_here * rows
    each = torch.cat(wrong)
    return Score(
        float(each.float().mean()),
        cost / sequences,
        float((each == 0).float().mean()),
        best / sequences if known else None,
        {name: float(torch.cat(shares).mean()) for name, shares in further.items()},
    )


class Stream(IterableDataset[Batch]):
    """Ready batches without end: `DataLoader(Stream(CopyTask(), 16), batch_size=None)`.

    Args:
        task: what to draw from.
        batch_size: B of every batch.
        seed: the same seed gives the same batches; each worker of a DataLoader has its own.
    """

    def __init__(self, task: Task, batch_size: int, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"Stream: expected batch_size of at least 1, got {batch_size}")
        self.task, self.batch_size, self.seed = task, batch_size, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        # 32 bits are all that a generator takes; the odd factor keeps workers of near seeds apart.
        seed = (self.seed + (worker.id * 0x9E3779B1 if worker else 0)) % 2**32
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.task.batch(self.batch_size, generator, **self.task.draw(generator))


def draw_between(low: int, high: int, generator: Generator, stage: int | None = None) -> int:
    """A whole number from low to high, both included; low and the next one at stage 0."""
    top = high if stage is None else min(high, low + 1 + stage)
    return int(torch.randint(low, top + 1, (), generator=generator))


def random_bits(*shape: int, generator: Generator) -> Tensor:
    """Fair coins, 0 or 1 in the default dtype."""
    return torch.randint(2, shape, generator=generator).to(torch.get_default_dtype())


def require_positive(task: str, **values: int) -> None:
    """A ValueError naming the first that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{task}: expected {name} of at least 1, got {value}")


def require_from(task: str, low: int, **values: int) -> None:
    """A ValueError naming the first that is below `low`."""
    for name, value in values.items():
        if value < low:
            raise ValueError(f"{task}: expected {name} from {low}, got {value}")


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th ... 20th."""
    return str(number) + {1: "st", 2: "nd", 3: "rd"}.get(number, "th")
