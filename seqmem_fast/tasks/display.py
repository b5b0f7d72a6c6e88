"""What a training shows: a progress bar, TensorBoard, and the table at its end. Needs rich."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .optional import MissingPackage
from .settings import Settings
from .task import Probe, Score, evaluate
from .training import Training

if TYPE_CHECKING:
    from rich.console import Console

SMOOTHING = 0.02  # of the figures in the bar
EVALUATION_SEED = 2**31  # a stream that no training's seed below 2^31 sees


def new_console() -> Console:
    """Where everything is printed."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise MissingPackage("training needs rich: run `pip install rich`") from error
    return Console()


class Bar:
    """A progress bar with the loss and what is wrong in a sequence; a watcher of the loop."""

    def __init__(self, console: Console, training: Training) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.5f}"),
            TextColumn(f"wrong {training.task.unit} {{task.fields[wrong]:.3f}}"),
            TimeElapsedColumn(),
            console=console,
        )
        settings = training.settings
        self._row = self._progress.add_task(
            f"{settings.task}, {settings.model}",
            total=training.last_step,
            completed=training.step_count,
            loss=float("nan"),
            wrong=float("nan"),
        )
        self.loss = self.wrong = float("nan")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()

    def __call__(self, training: Training, loss: float, wrong: float) -> None:
        if self.loss != self.loss:  # the first step
            self.loss, self.wrong = loss, wrong
        self.loss += SMOOTHING * (loss - self.loss)
        self.wrong += SMOOTHING * (wrong - self.wrong)
        self._progress.update(
            self._row,
            completed=training.step_count,
            total=training.last_step,
            loss=self.loss,
            wrong=self.wrong,
        )


class Board:
    """TensorBoard's curves of the same; a watcher of the loop."""

    def __init__(self, folder: Path, training: Training) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingPackage(
                "--tensorboard needs tensorboard: run `pip install tensorboard`"
            ) from error
        # A resumed training goes on in the same folder; what came after its checkpoint is dropped.
        self._writer: Any = SummaryWriter(str(folder), purge_step=training.step_count)

    def __call__(self, training: Training, loss: float, wrong: float) -> None:
        self._writer.add_scalar("loss", loss, training.step_count)
        name = f"wrong {training.task.unit} per sequence"
        self._writer.add_scalar(name, wrong, training.step_count)

    def close(self) -> None:
        self._writer.close()


def judge(training: Training, sequences: int) -> list[tuple[Probe, Score]]:
    """The scores at training's sizes and beyond them, on sequences never trained on."""
    fresh = Probe("as in training", {}, True)
    scores = []
    for probe in (fresh, *training.task.probes()):
        size = probe.size or None
        rows = 20 if size else 2  # all rows of a batch are of one size: few, so that many are drawn
        score = evaluate(
            training.model, training.task, size, sequences, EVALUATION_SEED, batch_size=rows
        )
        scores.append((probe, score))
    return scores


def show_scores(
    console: Console, settings: Settings, unit: str, scores: Sequence[tuple[Probe, Score]]
) -> None:
    """The table of scores, and in a sentence how far it reaches."""
    from rich.table import Table

    table = Table(title=f"{settings.task}, {settings.model}: means over fresh sequences")
    table.add_column("size")
    table.add_column("trained on")
    for heading in (f"wrong {unit}", "faultless", "cost in bits"):
        table.add_column(heading, justify="right")
    best_known = any(score.best_cost is not None for _, score in scores)
    if best_known:
        table.add_column("least possible", justify="right")
    further = list(scores[0][1].further)
    for heading in further:
        table.add_column(heading, justify="right")
    for probe, score in scores:
        row = [
            probe.label,
            "yes" if probe.trained else "no",
            f"{score.wrong_bits:.3f}",
            f"{score.perfect:.1%}",
            f"{score.cost:.3f}",
        ]
        row += [f"{score.best_cost:.3f}"] if score.best_cost is not None else []
        table.add_row(*row, *(f"{score.further[name]:.1%}" for name in further))
    console.print(table)
    console.print(verdict(scores), highlight=False)


def verdict(scores: Sequence[tuple[Probe, Score]]) -> str:
    """In a sentence: whether it has learnt the task, and whether that carries over to more."""
    if any(score.best_cost is not None for _, score in scores):
        _, score = scores[0]
        return (
            f"It spends {score.cost:.2f} bits a sequence where the optimal estimator spends "
            f"{score.best_cost:.2f}."
        )
    _, here = scores[0]
    if here.further:
        named = len(here.further) > 1
        shares = (f"{share:.1%}" + f" ({n})" * named for n, share in here.further.items())
        return f"Right: {', '.join(shares)}."
    learnt = "It has learnt what it was trained on"
    if here.wrong_bits >= 0.01:
        learnt = f"On what it was trained on it still gets {here.wrong_bits:.3f} bits wrong"
    beyond = [(probe, score) for probe, score in scores if not probe.trained]
    good = [probe.label for probe, score in beyond if score.wrong_bits < 1]
    bad = [probe.label for probe, score in beyond if score.wrong_bits >= 1]
    sentence = learnt + "."
    if good:
        sentence += f" Beyond it, less than one wrong bit a sequence: {'; '.join(good)}."
    if bad:
        sentence += f" It does not carry over to: {'; '.join(bad)}."
    return sentence
