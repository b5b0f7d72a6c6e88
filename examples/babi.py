"""Questions about little stories, and which fact each look at a story attends to.

    python examples/babi.py [--model episodic|dnc] [--seed 0] [--steps N] [--out PICTURE]

Two of the simplest tasks of Weston et al. 2015 (arXiv 1502.05698), told by a generator of our own
and learnt by one model:

1. one supporting fact. "Anna went to the attic. ... Where is Anna?"
2. two supporting facts. "Ben picked up the kite. Ben went to the barn. ... Where is the kite?" Who
   has the thing, or who left it, is one fact; where that person was then is the other.

Facts are bags of words that know their place in the sentence, each with a vector for how long ago
it was (Sukhbaatar et al. 2015, arXiv 1503.08895). seqmem_fast.EpisodicMemory looks at them twice,
the second time asking with what the first look found; a linear layer names the place. As in the
dynamic memory networks of Kumar et al. 2015 (arXiv 1506.07285), training tells the model which
facts support an answer; fresh stories are answered from facts and question alone. (Told answers
alone, this model learns the first task and stays below one half on the second.)

With --model dnc a Differentiable Neural Computer reads the same facts, one a step, and has two
steps for the question. It is told answers alone. No links, layer norm and bypass dropout, as those
that do best on the whole of bAbI (Franke et al. 2018, arXiv 1807.02658): seqmem_fast.DNC.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import seqmem_fast as sf

PEOPLE = ("Anna", "Ben", "Clara", "Dmitri", "Esra")
PLACES = ("attic", "barn", "cellar", "library", "orchard", "workshop")
THINGS = ("kite", "lantern", "map", "spoon")
WENT = ("went to the", "walked to the", "ran to the")
TOOK = ("picked up the", "got hold of the")
LEFT = ("put down the", "let go of the")
MOST_FACTS, MOST_WORDS, HOPS = 12, 6, 2
WORDS = sorted({word for text in (*PEOPLE, *PLACES, *THINGS, *WENT, *TOOK, *LEFT, "Where is the")
                for word in text.split()})  # fmt: skip
BATCH, LEARNING_RATE, HINT_WEIGHT = 64, 3e-3, 0.3
STEPS = {"episodic": 2500, "dnc": 6000}
FRESH_SEED = 10**6  # stories to be examined on; training draws from small seeds
NUMBER = {word: number for number, word in enumerate(WORDS, start=1)}  # 0 is no word


@dataclass
class Story:
    """Facts, a question about them, its answer, and the facts that it follows from."""

    facts: list[str]
    question: str
    answer: str
    support: list[int]


def one_fact_story(rng: random.Random, length: int) -> Story:
    """Task 1: people walk about; where is one of them?"""
    facts: list[str] = []
    where: dict[str, tuple[str, int]] = {}
    for place_in_story in range(length):
        who, place = rng.choice(PEOPLE), rng.choice(PLACES)
        facts.append(f"{who} {rng.choice(WENT)} {place}")
        where[who] = place, place_in_story
    asked = rng.choice(sorted(where))
    return Story(facts, f"Where is {asked}", where[asked][0], [where[asked][1]])


def two_fact_story(rng: random.Random, length: int) -> Story:
    """Task 2: people walk about, take things along and leave them; where is a thing?"""
    while True:
        facts: list[str] = []
        where: dict[str, tuple[str, int]] = {}  # person -> place, and the fact that says so
        holder: dict[str, tuple[str, int]] = {}  # thing -> person, and the fact that says so
        left: dict[str, tuple[str, list[int]]] = {}  # thing -> place, and the facts that say so
        for now in range(length):
            who = rng.choice(PEOPLE)
            mine = [thing for thing, (person, _) in holder.items() if person == who]
            free = [thing for thing in THINGS if thing not in holder]
            act = rng.random()
            if act < 0.3 and free:
                thing = rng.choice(free)
                facts.append(f"{who} {rng.choice(TOOK)} {thing}")
                holder[thing] = who, now
                left.pop(thing, None)
            elif act < 0.45 and mine:
                thing = rng.choice(mine)
                facts.append(f"{who} {rng.choice(LEFT)} {thing}")
                del holder[thing]
                if who in where:
                    left[thing] = where[who][0], [now, where[who][1]]
            else:
                place = rng.choice(PLACES)
                facts.append(f"{who} {rng.choice(WENT)} {place}")
                where[who] = place, now
        known = dict(left)
        for thing, (person, fact) in holder.items():
            if person in where:
                known[thing] = where[person][0], [fact, where[person][1]]
        if known:
            asked = rng.choice(sorted(known))
            return Story(facts, f"Where is the {asked}", *known[asked])


Teller = Callable[[random.Random, int], Story]
TASKS: dict[str, Teller] = {
    "one supporting fact": one_fact_story,
    "two supporting facts": two_fact_story,
}


class Batch(NamedTuple):
    """Stories as numbers: B stories of up to N facts of up to L words."""

    facts: Tensor  # [B, N, L] words
    age: Tensor  # [B, N] how many facts ago, 0 for the newest
    lengths: Tensor  # [B] facts
    question: Tensor  # [B, L]
    answer: Tensor  # [B] places
    support: Tensor  # [HOPS, B] the fact that each look should find


def words(text: str) -> list[int]:
    """A sentence as MOST_WORDS numbers."""
    found = [NUMBER[word] for word in text.split()]
    return found + [0] * (MOST_WORDS - len(found))


def batch_of(stories: Sequence[Story]) -> Batch:
    """The stories, the shorter ones padded."""
    lengths = torch.tensor([len(story.facts) for story in stories])
    most = int(lengths.max())
    empty = [0] * MOST_WORDS
    facts = [[words(fact) for fact in s.facts] + [empty] * (most - len(s.facts)) for s in stories]
    age = (lengths[:, None] - 1 - torch.arange(most)).clamp(min=0)
    question = torch.tensor([words(story.question) for story in stories])
    answer = torch.tensor([PLACES.index(story.answer) for story in stories])
    support = torch.tensor([[story.support[0], story.support[-1]] for story in stories]).t()
    return Batch(torch.tensor(facts), age, lengths, question, answer, support)


class Reader(nn.Module):
    """Encoded facts and question, episodes of attention, a place."""

    def __init__(self, memory_dim: int = 64, hidden_dim: int = 96) -> None:
        super().__init__()
        self.fact_words = nn.Embedding(len(WORDS) + 1, memory_dim, padding_idx=0)
        self.place_in_fact = nn.Parameter(1 + 0.1 * torch.randn(MOST_WORDS, memory_dim))
        self.age = nn.Embedding(MOST_FACTS, memory_dim)
        self.question_words = nn.Embedding(len(WORDS) + 1, hidden_dim, padding_idx=0)
        self.episodes = sf.EpisodicMemory(memory_dim, hidden_dim)
        self.answer = nn.Linear(hidden_dim, len(PLACES))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores of the places [B, places] and the attention of each hop [HOPS, B, N]."""
        facts = (self.fact_words(batch.facts) * self.place_in_fact).sum(2) + self.age(batch.age)
        question = self.question_words(batch.question).sum(1)
        state, attention = self.episodes(facts, question, HOPS, lengths=batch.lengths)
        return self.answer(state), attention

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of the answers, and of the attention against the supporting facts."""
        scores, attention = self(batch)
        found = attention.gather(2, batch.support[..., None])  # [HOPS, B, 1]
        hints = -(found + 1e-6).log().mean(dim=(1, 2)).sum()
        return F.cross_entropy(scores, batch.answer) + HINT_WEIGHT * hints


class DNCReader(nn.Module):
    """Facts one after the other, then the question HOPS times; the last output is the answer."""

    def __init__(self, width: int = 64, slots: int = 16, slot_width: int = 32) -> None:
        super().__init__()
        self.fact_words = nn.Embedding(len(WORDS) + 1, width, padding_idx=0)
        self.place_in_fact = nn.Parameter(1 + 0.1 * torch.randn(MOST_WORDS, width))
        self.question_words = nn.Embedding(len(WORDS) + 1, width, padding_idx=0)
        self.dnc = sf.DNC(width, len(PLACES), 2 * width, slots, slot_width, batch_first=True,
                          links=False, layer_norm=True, bypass_dropout=0.1)  # fmt: skip

    def steps(self, batch: Batch) -> Tensor:
        """What the DNC is shown, [B, N + HOPS, width]: each row's question follows its facts."""
        facts = (self.fact_words(batch.facts) * self.place_in_fact).sum(2)
        question = self.question_words(batch.question).sum(1, keepdim=True)
        at = torch.arange(facts.shape[1] + HOPS)
        asked = (at - batch.lengths[:, None]).unsqueeze(2)  # [B, N + HOPS, 1]
        return torch.where(asked < 0, F.pad(facts, (0, 0, 0, HOPS)), question)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As Reader's; the attention is how much of what a fact wrote each look reads."""
        ends = batch.lengths + HOPS
        output, _, trace = self.dnc(self.steps(batch), lengths=ends, return_trace=True)
        rows = torch.arange(len(ends))
        looks = torch.stack([rows, rows])  # [HOPS, B]
        when = batch.lengths + torch.arange(HOPS)[:, None]
        reads = trace.read_weights[looks, when].mean(2)  # [HOPS, B, slots]
        written = trace.write_weights[:, : batch.facts.shape[1]].sum(2)  # [B, N, slots]
        attention = torch.einsum("hbs,bns->hbn", reads, written)
        return output[rows, ends - 1], attention

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of the answers alone."""
        ends = batch.lengths + HOPS
        output, _ = self.dnc(self.steps(batch), lengths=ends)
        return F.cross_entropy(output[torch.arange(len(ends)), ends - 1], batch.answer)


READERS: dict[str, Callable[[], Reader | DNCReader]] = {"episodic": Reader, "dnc": DNCReader}


@torch.no_grad()
def accuracy(model: nn.Module, tell: Teller, count: int = 1000) -> float:
    """The share of right answers on fresh stories of 4 to MOST_FACTS facts."""
    rng = random.Random(FRESH_SEED)
    stories = [tell(rng, rng.randint(4, MOST_FACTS)) for _ in range(count)]
    batch = batch_of(stories)
    return float((model(batch)[0].argmax(-1) == batch.answer).float().mean())


def train(name: str, steps: int, seed: int, console: Console) -> Reader | DNCReader:
    """Half of every batch is of each task; stories grow from 3 facts to MOST_FACTS."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = READERS[name]()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    columns = (
        TextColumn("learning to read"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=steps, loss=float("nan"))
        for step in range(steps):
            most = min(MOST_FACTS, 3 + 25 * step // steps)
            stories = [
                tell(rng, rng.randint(2, most))
                for tell in TASKS.values()
                for _ in range(BATCH // 2)
            ]
            loss = model.loss(batch_of(stories))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            bar.update(task, advance=1, loss=loss.item())
    return model


class Reading(NamedTuple):
    """What the model made of one story."""

    story: Story
    answer: str
    attention: Tensor  # [HOPS, facts]


@torch.no_grad()
def read(model: nn.Module, story: Story) -> Reading:
    """One story, read alone."""
    scores, attention = model(batch_of([story]))
    return Reading(story, PLACES[int(scores[0].argmax())], attention[:, 0])


def show(console: Console, reading: Reading) -> None:
    """The story with the attention of each look beside every fact."""
    story = reading.story
    mark = "right" if reading.answer == story.answer else f"wrong: it is the {story.answer}"
    table = Table(
        title=f"{story.question}? In the {reading.answer} ({mark}).", title_justify="left"
    )
    table.add_column("fact")
    for hop in range(HOPS):
        table.add_column(f"look {hop + 1}", justify="right")
    for number, fact in enumerate(story.facts):
        weights = [f"{float(weight):.2f}" for weight in reading.attention[:, number]]
        style = "bold green" if number in story.support else ""
        table.add_row(fact, *weights, style=style)
    console.print(table)


def picture(readings: Sequence[Reading], out: Path) -> None:
    """One panel for each story: facts down, looks across."""
    from matplotlib.figure import Figure

    most = max(len(reading.story.facts) for reading in readings)
    figure = Figure(figsize=(5 * len(readings), 1.2 + 0.3 * most), layout="constrained")
    for axes, (story, answer, attention) in zip(
        figure.subplots(1, len(readings), squeeze=False)[0], readings, strict=True
    ):
        image = axes.imshow(attention.t().numpy(), cmap="magma", vmin=0, vmax=1, aspect="auto")
        axes.set_yticks(range(len(story.facts)), story.facts, fontsize=9)
        for number, label in enumerate(axes.get_yticklabels()):
            label.set_fontweight("bold" if number in story.support else "normal")
        axes.set_xticks(range(HOPS), [f"look {hop + 1}" for hop in range(HOPS)], fontsize=9)
        axes.set_title(f"{story.question}? {answer}", fontsize=10, loc="left")
    figure.colorbar(image, ax=axes, pad=0.02).set_label("attention", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, reports the accuracy of both tasks, shows a story of each; returns the accuracies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=READERS, default="episodic")
    parser.add_argument("--steps", type=int, help="standard: 2500, of a DNC 6000")
    parser.add_argument("--out", type=Path, help="standard: docs/images/babi_hops.png")
    args = parser.parse_args(argv)
    console = Console()
    model = train(args.model, args.steps or STEPS[args.model], args.seed, console).eval()
    found = {name: accuracy(model, tell) for name, tell in TASKS.items()}
    for name, share in found.items():
        console.print(f"{name}: {share:.1%} of 1,000 fresh stories answered right", highlight=False)
    rng = random.Random(FRESH_SEED + 1)
    readings = [read(model, tell(rng, 9)) for tell in TASKS.values()]
    for reading in readings:
        show(console, reading)
    name = "babi_hops" if args.model == "episodic" else f"babi_{args.model}"
    out = args.out or Path(f"docs/images/{name}.png")
    picture(readings, out)
    console.print(f"picture: {out}", highlight=False)
    return found


if __name__ == "__main__":
    main()
