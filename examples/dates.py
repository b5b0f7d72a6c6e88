"""Dates as people write them, turned into ISO form, and where the network looks as it writes.

    python examples/dates.py [--seed 0] [--steps 800] [--out docs/images/dates_alignment.png]
    python examples/dates.py --normalizer entmax15 --out docs/images/dates_entmax15.png

"Mar 3rd, '98", "Tuesday, 3 March 1998" and "03.03.1998" all become 1998-03-03. The model is the
encoder and decoder of Bahdanau, Cho & Bengio 2014 (arXiv 1409.0473), small: a bidirectional
seqmem_fast.LSTM reads the characters, and for each character of the answer a
seqmem_fast.LSTMCell is given what seqmem_fast.AdditiveAttention found in the text. Dates come from
a generator; fresh ones, never trained on but by chance, are what it is examined on.

With --normalizer, two models attend by scaled dot products instead, one with softmax and one with
the normaliser named, and are drawn side by side.
"""

from __future__ import annotations

import argparse
import datetime
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import seqmem_fast as sf

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December")  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FIRST, LAST = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)  # so that '98 has one meaning
SOURCE = "".join(sorted({*"0123456789 ,./-'", *"".join((*MONTHS, *DAYS, "thestndrdof")).lower()}))
ANSWER = "0123456789-"
LENGTH = len("1998-03-03")
LEARNING_RATE = 5e-3
FRESH_SEED = 10**6  # dates to be examined on; training draws from small seeds
SHOWN = ("the 3rd of March, 1998", "Tuesday, 3 March 1998", "Mar 3rd, '98", "3/3/1998")


def ordinal(day: int) -> str:
    """3 -> "3rd"."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{'th' if 11 <= day <= 13 else ending}"


FORMS: tuple[Callable[[datetime.date, str], str], ...] = (
    lambda d, month: f"{ordinal(d.day)} of {month} {d.year}",
    lambda d, month: f"the {ordinal(d.day)} of {month}, {d.year}",
    lambda d, month: f"{d.day} {month} {d.year}",
    lambda d, month: f"{month} {d.day}, {d.year}",
    lambda d, month: f"{month} {ordinal(d.day)}, '{d.year % 100:02}",
    lambda d, month: f"{month} {d.day}, {d.year % 100:02}",
    lambda d, month: f"{DAYS[d.weekday()]}, {d.day} {month} {d.year}",
    lambda d, month: f"{DAYS[d.weekday()][:3]} {month} {d.day} {d.year}",
    lambda d, month: f"{d.day}-{month}-{d.year % 100:02}",
    lambda d, month: f"{d.day:02}.{d.month:02}.{d.year}",  # with dots the day comes first,
    lambda d, month: f"{d.day}.{d.month}.{d.year % 100:02}",
    lambda d, month: f"{d.month}/{d.day}/{d.year}",  # with strokes the month
    lambda d, month: f"{d.year}/{d.month:02}/{d.day:02}",
)


def write(date: datetime.date, rng: random.Random) -> str:
    """A date in one of the forms, its month whole or short, in small letters, capitals or mixed."""
    month = MONTHS[date.month - 1]
    text = rng.choice(FORMS)(date, rng.choice((month, month[:3])))
    return rng.choice((str, str, str.lower, str.upper))(text)


def draw(rng: random.Random) -> tuple[str, str]:
    """A date as someone might write it, and in ISO form."""
    date = FIRST + datetime.timedelta(rng.randint(0, (LAST - FIRST).days))
    return write(date, rng), date.isoformat()


class Batch(NamedTuple):
    """Texts as numbers; capitals are read as small letters."""

    source: Tensor  # [B, S], padded with 0
    lengths: Tensor  # [B]
    answer: Tensor  # [B, LENGTH]


def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Numbers from 1 on for each character, and how many there are."""
    rows = [torch.tensor([SOURCE.index(c) + 1 for c in text.lower()]) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


def batch(rng: random.Random, size: int) -> Batch:
    """Freshly drawn dates."""
    texts, answers = zip(*(draw(rng) for _ in range(size)), strict=True)
    return Batch(*encode(texts), torch.tensor([[ANSWER.index(c) for c in a] for a in answers]))


class DotAttention(nn.Module):
    """Scaled dot products in additive attention's place, with any normaliser of ops.attention."""

    def __init__(self, query: int, memory: int, width: int, normalizer: str) -> None:
        super().__init__()
        self.query, self.project_keys = nn.Linear(query, width), nn.Linear(memory, width)
        self.normalizer = normalizer

    def forward(
        self, query: Tensor, keys: Tensor, memory: Tensor, mask: Tensor, keys_projected: bool
    ) -> tuple[Tensor, Tensor]:
        return sf.ops.attention(self.query(query), keys, memory, mask, normalizer=self.normalizer)


class Translator(nn.Module):
    """Reads a text and writes LENGTH characters, attending to the text before each one."""

    def __init__(self, width: int = 64, normalizer: str | None = None) -> None:
        super().__init__()
        self.read = nn.Embedding(len(SOURCE) + 1, 32, padding_idx=0)
        self.encoder = sf.LSTM(32, width, bidirectional=True, batch_first=True)
        self.attention: Any = (
            sf.AdditiveAttention(width, 2 * width, width)
            if normalizer is None
            else DotAttention(width, 2 * width, width, normalizer)
        )
        self.recall = nn.Embedding(len(ANSWER) + 1, 16)  # the last one: nothing written yet
        self.decoder = sf.LSTMCell(16 + 2 * width, width)
        self.start = nn.Linear(width, width)
        self.spell = nn.Linear(3 * width, len(ANSWER))

    def forward(
        self, source: Tensor, lengths: Tensor, answer: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, LENGTH, letters] and weights [B, LENGTH, S]; `answer` is taught while given,
        else the model goes on from what it has written itself."""
        memory, (state, _) = self.encoder(self.read(source), lengths=lengths)  # [B, S, 2 width]
        keys = self.attention.project_keys(memory)
        present = (source != 0).unsqueeze(1)  # [B, 1, S]
        h = torch.tanh(self.start(state[1]))  # from the direction that ends at the text's beginning
        c = torch.zeros_like(h)
        last = torch.full_like(lengths, len(ANSWER))
        logits, weights = [], []
        for step in range(LENGTH):
            found, looked = self.attention(
                h.unsqueeze(1), keys, memory, present, keys_projected=True
            )
            found = found.squeeze(1)
            h, c = self.decoder(torch.cat((self.recall(last), found), -1), (h, c))
            logits.append(self.spell(torch.cat((h, found), -1)))
            weights.append(looked.squeeze(1))
            last = logits[-1].argmax(-1) if answer is None else answer[:, step]
        return torch.stack(logits, 1), torch.stack(weights, 1)


def train(
    steps: int, size: int, seed: int, console: Console, normalizer: str | None = None
) -> tuple[Translator, list[float]]:
    """A model trained on `steps` batches of `size` dates, and the loss of each."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = Translator(normalizer=normalizer)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, max(steps, 2))
    losses = []
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("loss {task.fields[loss]}")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task(
            f"reading dates{', ' + normalizer if normalizer else ''}", total=steps, loss="..."
        )
        for _ in range(steps):
            given = batch(rng, size)
            logits, _ = model(*given)
            loss = F.cross_entropy(logits.flatten(0, 1), given.answer.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            progress.update(bar, advance=1, loss=f"{losses[-1]:.4f}")
    return model, losses


@torch.no_grad()
def accuracy(model: Translator, count: int = 2000) -> float:
    """The share of fresh dates that are right in every character."""
    given = batch(random.Random(FRESH_SEED), count)
    logits, _ = model(given.source, given.lengths)
    return float((logits.argmax(-1) == given.answer).all(-1).double().mean())


@torch.no_grad()
def zeros(model: Translator, count: int = 2000) -> float:
    """The share of weights over the characters of fresh dates that are exactly 0."""
    given = batch(random.Random(FRESH_SEED), count)
    _, weights = model(given.source, given.lengths)
    present = (given.source != 0).unsqueeze(1).expand_as(weights)
    return float((weights[present] == 0).double().mean())


@torch.no_grad()
def translate(model: Translator, text: str) -> tuple[str, Tensor]:
    """The answer, and for each of its characters the weights over those of the text."""
    logits, weights = model(*encode([text]))
    return "".join(ANSWER[i] for i in logits[0].argmax(-1)), weights[0]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, examines, draws; returns the first and the last loss and the accuracy of the last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--normalizer", choices=("sparsemax", "entmax15"))
    parser.add_argument("--text", default=SHOWN[0], help="the date to draw")
    parser.add_argument("--out", type=Path, default=Path("docs/images/dates_alignment.png"))
    args = parser.parse_args(argv)
    if min(args.steps, args.batch, len(args.text)) < 1:
        parser.error("--steps, --batch and the length of --text: expected at least 1")
    unknown = set(args.text.lower()) - set(SOURCE)
    if unknown:
        parser.error(f"characters that no date is written with: {''.join(sorted(unknown))}")
    console = Console()
    names = (None,) if args.normalizer is None else ("softmax", args.normalizer)
    pictures, answer = [], ""
    for name in names:
        model, losses = train(args.steps, args.batch, args.seed, console, name)
        share = accuracy(model.eval())
        told = f"{name}: " if name else ""
        console.print(
            f"{told}{share:.1%} of 2,000 fresh dates turned into ISO form without a mistake"
        )
        if name:
            console.print(f"{told}{zeros(model):.1%} of the weights are exactly 0")
        for text in SHOWN:
            console.print(f"{text:>24}  ->  {translate(model, text)[0]}", highlight=False)
        answer, weights = translate(model, args.text)
        pictures.append(weights)
    figure = sf.plot.attention(torch.stack(pictures), args.text, answer)
    for axes, name in zip(figure.axes, names, strict=False):
        axes.set_xlabel(name or "", fontsize=9)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)
    console.print(f"picture: {args.out}", highlight=False, soft_wrap=True)
    return {"first_loss": losses[0], "last_loss": losses[-1], "accuracy": share}


if __name__ == "__main__":
    main()
