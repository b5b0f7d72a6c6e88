"""A character language model on English text that every Python carries, trained by either LSTM.

The text is the language reference inside pydoc_data.topics. The same model, from the same seed,
is trained once with torch.nn.LSTM and once with seqmem_fast.LSTM, taking turns; the losses must
agree, and characters per second are compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch import Tensor, nn
from torch.nn import functional as F

import seqmem_fast

State = tuple[Tensor, Tensor]
LENGTH, BATCH, HIDDEN, EMBEDDING = 100, 32, 256, 128
HELD_OUT = 0.05
TURN = 10  # training steps one side takes before it is the other's turn

EARLY = 10
# Relative. Rounding differs between the two, and training magnifies it step by step: the first
# loss has seen no update yet; the early one is the mean over ten steps, where a wrong gradient
# already shows; the others are means over the last tenth of training and over held-out text.
TOLERANCES = {
    "first_loss": 1e-5,
    "early_loss": 1e-4,
    "final_loss": 5e-3,
    "held_out_loss": 5e-3,
}


class LossesDisagree(RuntimeError):
    """The two trainings did not come to the same loss: one of them computes something else."""


def english() -> str:
    """The whole language reference as one string."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class Corpus:
    """A text, its alphabet, and the characters as numbers."""

    alphabet: str
    train: Tensor  # [N] int64
    held_out: Tensor  # [N'] int64

    @classmethod
    def of(cls, text: str) -> Corpus:
        alphabet = "".join(sorted(set(text)))
        tokens = encode(text, alphabet)
        cut = int(len(tokens) * (1 - HELD_OUT))
        return cls(alphabet, tokens[:cut], tokens[cut:])


def encode(text: str, alphabet: str) -> Tensor:
    """Characters to their places in the alphabet."""
    place = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([place[character] for character in text])


def batches(tokens: Tensor, length: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(input, next characters), each [length, batch]: `batch` places in the text, read onwards."""
    share = (len(tokens) - 1) // batch
    inputs = tokens[: share * batch].view(batch, share).t()
    targets = tokens[1 : share * batch + 1].view(batch, share).t()
    for start in range(0, share - length + 1, length):
        yield inputs[start : start + length], targets[start : start + length]


def forever(tokens: Tensor, length: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches again and again."""
    while True:
        yield from batches(tokens, length, batch)


class CharLM(nn.Module):
    """Embedding, LSTM, linear: the next character's logits at every step."""

    def __init__(
        self,
        letters: int,
        lstm: Callable[[int, int], nn.Module],
        hidden: int = HIDDEN,
        embedding: int = EMBEDDING,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, embedding)
        self.lstm = lstm(embedding, hidden)
        self.head = nn.Linear(hidden, letters)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """[T, B] characters to [T, B, letters] logits, and the state to go on from."""
        output, state = self.lstm(self.embed(tokens), state)
        return self.head(output), state


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per character."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass
class Training:
    """One model on its way: batches in order, the state carried over, losses and seconds kept."""

    name: str
    model: CharLM
    data: Iterator[tuple[Tensor, Tensor]]
    optimizer: torch.optim.Optimizer
    state: State | None = None
    losses: list[float] = field(default_factory=list)
    characters: int = 0
    seconds: float = 0.0

    @classmethod
    def start(
        cls,
        name: str,
        lstm: Callable[[int, int], nn.Module],
        corpus: Corpus,
        seed: int = 0,
        length: int = LENGTH,
        batch: int = BATCH,
        hidden: int = HIDDEN,
    ) -> Training:
        """A fresh model; the same seed gives the same weights and the same batches."""
        torch.manual_seed(seed)
        model = CharLM(len(corpus.alphabet), lstm, hidden)
        data = forever(corpus.train, length, batch)
        return cls(name, model, data, torch.optim.Adam(model.parameters(), lr=3e-3))

    def step(self) -> float:
        """One training step; the time of fetching the batch counts for neither side."""
        inputs, targets = next(self.data)
        start = time.perf_counter()
        logits, (h, c) = self.model(inputs, self.state)
        loss = loss_of(logits, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state = h.detach(), c.detach()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - start
        self.characters += targets.numel()
        return self.losses[-1]

    @property
    def characters_per_second(self) -> float:
        return self.characters / self.seconds

    @property
    def early_loss(self) -> float:
        """Mean over the first few steps."""
        head = self.losses[:EARLY]
        return sum(head) / len(head)

    @property
    def final_loss(self) -> float:
        """Mean over the last tenth of the steps, since single batches jump about."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)


@torch.no_grad()
def evaluate(model: CharLM, tokens: Tensor, length: int = LENGTH, batch: int = 8) -> float:
    """Mean loss on text not trained on."""
    model.eval()
    state, total, count = None, 0.0, 0
    for inputs, targets in batches(tokens, length, batch):
        logits, state = model(inputs, state)
        total, count = total + loss_of(logits, targets).item(), count + 1
    model.train()
    return total / count


@torch.no_grad()
def write(model: CharLM, alphabet: str, prompt: str, length: int, seed: int = 0) -> str:
    """The prompt, continued by characters drawn from the model."""
    rng = torch.Generator().manual_seed(seed)
    logits, state = model(encode(prompt, alphabet).unsqueeze(1))
    text = prompt
    for _ in range(length):
        chances = (logits[-1, 0] / 0.6).softmax(0)
        token = torch.multinomial(chances, 1, generator=rng)
        text += alphabet[int(token)]
        logits, state = model(token.unsqueeze(1), state)
    return text


def steps_within(seconds: float, corpus: Corpus, most: int = 400) -> int:
    """How many training steps torch.nn.LSTM manages in that time, judged by its second few."""
    probe = Training.start("probe", nn.LSTM, corpus)
    probe.step()
    probe.seconds = 0.0
    for _ in range(3):
        probe.step()
    return max(TURN, min(most, int(seconds / (probe.seconds / 3))) // TURN * TURN)


def train_both(
    corpus: Corpus, steps: int, console: Console, **shape: int
) -> tuple[Training, Training]:
    """torch.nn.LSTM and seqmem_fast.LSTM in turns of a few steps, with a bar for each."""
    sides = (
        Training.start("torch.nn.LSTM", nn.LSTM, corpus, **shape),
        Training.start("seqmem_fast.LSTM", seqmem_fast.LSTM, corpus, **shape),
    )
    for theirs, ours in zip(sides[0].model.parameters(), sides[1].model.parameters(), strict=True):
        if not torch.equal(theirs, ours):
            raise LossesDisagree("the same seed gave different weights")
    with _bars(console) as bars:
        tasks = [
            bars.add_task(side.name, total=steps, loss=float("nan"), speed=0.0) for side in sides
        ]
        for _ in range(0, steps, TURN):
            for side, task in zip(sides, tasks, strict=True):
                _turn(side, min(TURN, steps - len(side.losses)), bars, task)
    return sides


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:,.0f} characters/s"),
        console=console,
    )


def _turn(side: Training, count: int, bars: Progress, task: TaskID) -> None:
    for _ in range(count):
        loss = side.step()
        bars.update(task, advance=1, loss=loss, speed=side.characters_per_second)


def summary(theirs: Training, ours: Training, corpus: Corpus) -> dict[str, Any]:
    """Both losses and both speeds, torch.nn.LSTM's first, ready for JSON."""
    return {
        "characters": len(corpus.train) + len(corpus.held_out),
        "training_steps": len(ours.losses),
        "first_loss": [theirs.losses[0], ours.losses[0]],
        "early_loss": [theirs.early_loss, ours.early_loss],
        "final_loss": [theirs.final_loss, ours.final_loss],
        "held_out_loss": [evaluate(side.model, corpus.held_out) for side in (theirs, ours)],
        "characters_per_second": [theirs.characters_per_second, ours.characters_per_second],
        "ratio": ours.characters_per_second / theirs.characters_per_second,
    }


def check_losses(measured: Mapping[str, Any]) -> None:
    """Raises LossesDisagree unless every pair of losses agrees (NaN does not)."""
    for name, tolerance in TOLERANCES.items():
        theirs, ours = measured[name]
        if not abs(ours - theirs) <= tolerance * abs(theirs):
            raise LossesDisagree(
                f"{name}: torch.nn.LSTM {theirs:.6f}, seqmem_fast.LSTM {ours:.6f}, "
                f"further apart than {tolerance:g} of it"
            )


def save(path: Path, model: CharLM, alphabet: str) -> None:
    """Weights and alphabet in one file, for `plot gates`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"alphabet": alphabet, "weights": model.state_dict()}, path)


def load(path: Path) -> tuple[CharLM, str]:
    """The model, on this package's LSTM, and its alphabet."""
    kept = torch.load(path, weights_only=True)
    hidden = kept["weights"]["head.weight"].shape[1]
    model = CharLM(len(kept["alphabet"]), seqmem_fast.LSTM, hidden)
    model.load_state_dict(kept["weights"])
    return model, kept["alphabet"]
