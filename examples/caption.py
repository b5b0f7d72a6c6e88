"""Saying what one sees: a decoder looks at one place for each word of its caption.

    python examples/caption.py [--seed 0] [--seeds 3] [--steps 1500]

Two or three digits stand on a canvas of 24 x 24 among fragments of others, and a caption says how:
"seven above three left of one". An LSTM writes it word by word. Before each word a policy, which
sees the canvas blurred to 8 x 8 and what the LSTM knows, chooses one of 16 places, and the LSTM
gets nothing but the patch of 12 x 12 there. Choosing is no differentiable step: the policy learns
by REINFORCE over the steps of a caption,

    sum over t of  -log pi(a_t | s_t) (R_t - b_t) - w H_t,

with the log-probability of word t as R_t and the average of that of the captions before as b_t
(Williams 1992; Xu et al. 2015, arXiv 1502.03044). Beside it the same
decoder trained with soft attention, which sees the average of all patches by the policy's
probabilities, and one with random places. Digits are from the fonts that matplotlib ships; captions
are examined in styles that no training has seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import seqmem_fast as sf
from seqmem_fast.tasks.glyphs import MARGIN, Pen

CANVAS, DIGIT, STRIDE, COARSE = 24, 8, 4, 8
SIDE = (CANVAS - DIGIT) // STRIDE + 1  # places of digits, a side
GLIMPSE = 12
LOOKS = (CANVAS - GLIMPSE) // STRIDE + 1  # places to look at, a side
PLACES = LOOKS**2
FRAGMENT, FRAGMENTS = 4, 4
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (*NAMES, "above", "left of", ".")
ABOVE, LEFT, END = range(10, 13)
LONGEST = 6  # three digits, what is between them, and the end
STYLES, HELD_OUT = 16, (1, 6, 8, 15)  # the last are for the examination
BATCH, LEARNING_RATE, ENTROPY_BONUS = 128, 4e-3, 0.1
EXAMINATION_SEED = 10**6
KINDS = ("random places", "soft attention", "REINFORCE")


class Scenes(NamedTuple):
    """Canvases [B, 24, 24], the words of their captions [B, 6] and how many these are [B]."""

    canvas: Tensor
    words: Tensor
    lengths: Tensor


class Painter:
    """Draws scenes with digits of some styles."""

    def __init__(self, styles: Sequence[int]) -> None:
        pen, inside = Pen(DIGIT + 2 * MARGIN), slice(MARGIN, MARGIN + DIGIT)
        digits = [[pen(ord(str(n)), style)[inside, inside] for style in styles] for n in range(10)]
        self.digits = torch.stack([torch.stack(row) for row in digits]) / 255  # [10, styles, 8, 8]
        self.layouts = layouts()

    def scenes(self, count: int, rng: torch.Generator) -> Scenes:
        def whole(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=rng)

        canvas = torch.zeros(count, CANVAS * CANVAS)
        crops = self.digits.flatten(0, 1).unfold(1, FRAGMENT, 1).unfold(2, FRAGMENT, 1)
        for _ in range(FRAGMENTS):
            piece = crops[whole(len(crops), count), whole(5, count), whole(5, count)]
            corner = whole(CANVAS - FRAGMENT + 1, 2, count)
            canvas.scatter_(1, square(corner[0], corner[1], FRAGMENT), piece.flatten(1))
        tables = [table[whole(len(table), count)] for table in self.layouts.values()]
        kind = whole(len(tables), count)
        place = torch.stack(tables)[kind, torch.arange(count)]  # [B, 3], -1 for no third digit
        between = torch.tensor(list(self.layouts))[kind]  # [B, 2], END after the last digit
        number = whole(10, 3, count)
        picture = self.digits[number, whole(self.digits.size(1), 3, count)].flatten(2)
        for k in range(3):
            here = place[:, k] >= 0
            corners = patches_at(place[:, k].clamp(min=0))
            old = canvas.gather(1, corners)
            canvas.scatter_(1, corners, torch.where(here[:, None], picture[k], old))
        words = torch.full((count, LONGEST), END)
        words[:, 0:5:2], words[:, 1:4:2] = number.t(), between
        words[place[:, 2] < 0, 4] = END
        return Scenes(canvas.view(-1, CANVAS, CANVAS), words, 4 + 2 * (place[:, 2] >= 0))


def layouts() -> dict[tuple[int, int], Tensor]:
    """What stands between the digits -> all triples of places for which it is true, [n, 3].

    Digits are named row by row; the next one is to the right in the same row, or lower.
    """
    found: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for count in (2, 3):
        for places in itertools.combinations(range(SIDE**2), count):
            words = [relation(a, b) for a, b in itertools.pairwise(places)]
            apart = itertools.combinations(places, 2)
            if END in words or not all(far(a, b) for a, b in apart):
                continue
            first, second = (*words, END)[:2]
            found.setdefault((first, second), []).append((*places, -1)[:3])
    return {words: torch.tensor(places) for words, places in found.items()}


def far(a: int, b: int) -> bool:
    """Whether digits at these places do not touch."""
    return max(abs(a // SIDE - b // SIDE), abs(a % SIDE - b % SIDE)) * STRIDE >= DIGIT


def relation(a: int, b: int) -> int:
    """The word between the digits at two places, END if none is clearly right."""
    down, right = b // SIDE - a // SIDE, b % SIDE - a % SIDE
    if down * STRIDE >= DIGIT:
        return ABOVE
    return LEFT if down == 0 and right * STRIDE >= DIGIT else END


def square(rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Where on the flat canvas the pixels of squares lie, given their corners: [B, side * side]."""
    across = torch.arange(side)
    lines = (rows[:, None] + across)[:, :, None] * CANVAS  # [B, side, 1]
    return (lines + (columns[:, None] + across)[:, None, :]).flatten(1)


def patches_at(place: Tensor) -> Tensor:
    """The pixels of the patch at each place [B], [B, 64]."""
    return square(place // SIDE * STRIDE, place % SIDE * STRIDE, DIGIT)


class Captioner(nn.Module):
    """Chooses a place, looks, says a word; `kind` is one of KINDS."""

    def __init__(self, kind: str, width: int = 64, embed: int = 16, seen: int = 64) -> None:
        super().__init__()
        self.kind = kind
        self.word = nn.Embedding(len(WORDS), embed)  # END is also what comes before the first
        self.eye = nn.Sequential(nn.Linear(GLIMPSE**2, seen), nn.ReLU())
        self.place = nn.Embedding(PLACES, seen)
        self.policy = sf.HardAttention(COARSE**2 + width + embed, 64, PLACES)
        self.cell = sf.LSTMCell(embed + seen, width, forget_bias=1.0)
        self.say = nn.Linear(width, len(WORDS))

    def forward(
        self, canvas: Tensor, words: Tensor | None, rng: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the words [B, T, words], logits of the places and the places, [B, T, ..].

        Given the right words it says the next one after each; without, its own. A generator draws
        the places; without one they are the likeliest.
        """
        batch = len(canvas)
        blurred = F.avg_pool2d(canvas[:, None], CANVAS // COARSE).flatten(1)
        windows = canvas.unfold(1, GLIMPSE, STRIDE).unfold(2, GLIMPSE, STRIDE)
        patches = windows.reshape(batch, PLACES, GLIMPSE**2)
        if self.kind == "soft attention":
            all_seen = self.eye(patches) + self.place.weight
        h = c = canvas.new_zeros(batch, self.cell.hidden_size)
        last = torch.full((batch,), END)
        steps = []
        for t in range(LONGEST):
            before = self.word(last)
            logits = self.policy(torch.cat((blurred, h, before), 1))
            if self.kind == "random places":
                place = torch.randint(PLACES, (batch,), generator=rng)
            elif rng is None:
                place = logits.detach().argmax(-1)
            else:
                place = sf.ops.categorical_sample(logits.detach(), generator=rng)[0]
            if self.kind == "soft attention":
                seen = (logits.softmax(-1)[:, None] @ all_seen).squeeze(1)
            else:
                seen = self.eye(patches[torch.arange(batch), place]) + self.place(place)
            h, c = self.cell(torch.cat((before, seen), 1), (h, c))
            scores = self.say(h)
            last = scores.argmax(-1) if words is None else words[:, t]
            steps.append((scores, logits, place))
        scores, logits, place = (torch.stack(each, 1) for each in zip(*steps, strict=True))
        return scores, logits, place

    def examine(self, painter: Painter, count: int = 1000) -> float:
        """The share of captions that are right in every word, in the network's own words."""
        rng = torch.Generator().manual_seed(EXAMINATION_SEED)
        canvas, words, lengths = painter.scenes(count, rng)
        with torch.no_grad():
            said = self(canvas, None, rng if self.kind == "random places" else None)[0].argmax(-1)
        beyond = torch.arange(LONGEST) >= lengths[:, None]
        return float(((said == words) | beyond).all(1).float().mean())


def train(
    painter: Painter, kind: str, steps: int, seed: int, bar: Progress, task: TaskID
) -> Captioner:
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = Captioner(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=max(steps, 20), pct_start=0.1
    )
    average = torch.zeros(LONGEST)  # of the returns of each step so far
    for step in range(steps):
        canvas, words, lengths = painter.scenes(BATCH, rng)
        scores, logits, place = model(canvas, words, rng)
        there = torch.arange(LONGEST) < lengths[:, None]
        errors = F.cross_entropy(scores.flatten(0, 1), words.flatten(), reduction="none")
        errors = errors.view_as(words) * there
        loss = errors.sum() / BATCH
        if kind == "REINFORCE":
            returns = -errors.detach()  # [B, T]
            means = (returns * there).sum(0) / there.sum(0)
            average = means if step == 0 else 0.9 * average + 0.1 * means
            curious = ENTROPY_BONUS * (1 - step / steps)  # at first it tries all places
            baseline = average.expand_as(returns)[there]
            gaze = logits[there], place[there], returns[there], baseline
            loss = loss + sf.ops.reinforce_loss(*gaze, entropy_weight=curious) / BATCH
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 24:
            right = ((scores.detach().argmax(-1) == words) & there).sum() / there.sum()
            bar.update(task, completed=step + 1, right=float(right))
    bar.update(task, completed=steps)
    return model


def picture(model: Captioner, painter: Painter, out: Path, count: int = 3) -> None:
    """The path of the gaze, word by word: what it has seen so far, and where it looks now."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    canvas, words, lengths = painter.scenes(64, torch.Generator().manual_seed(EXAMINATION_SEED + 1))
    chosen = (lengths == LONGEST).nonzero().flatten()[:count]
    with torch.no_grad():
        scores, logits, place = model(canvas, None, None)
    figure = Figure(figsize=(1.75 * (LONGEST + 1), 2.05 * count), layout="constrained")
    panels = figure.subplots(count, LONGEST + 1, squeeze=False)
    centre = GLIMPSE / 2 - 0.5
    for row, scene in zip(panels, chosen.tolist(), strict=True):
        rows, columns = place[scene] // LOOKS * STRIDE, place[scene] % LOOKS * STRIDE
        for t, axes in enumerate(row):
            axes.imshow(canvas[scene].numpy(), cmap="gray_r", vmin=0)
            axes.set_xticks([])
            axes.set_yticks([])
            if t == 0:
                axes.set_title("the scene", fontsize=10)
                continue
            said, right = int(scores[scene, t - 1].argmax()), int(words[scene, t - 1])
            axes.set_title(
                WORDS[said] + ("" if said == right else f" (is {WORDS[right]})"),
                fontsize=11,
                color="black" if said == right else "#b00020",
            )
            likely = logits[scene, t - 1].softmax(-1).view(LOOKS, LOOKS).numpy()
            extent = (GLIMPSE / 2 - STRIDE / 2 - 0.5, CANVAS - GLIMPSE / 2 + STRIDE / 2 - 0.5)
            axes.imshow(likely, cmap="Oranges", alpha=0.35, extent=(*extent, *extent[::-1]))
            axes.set_xlim(-0.5, CANVAS - 0.5)
            axes.set_ylim(CANVAS - 0.5, -0.5)
            axes.plot(columns[:t] + centre, rows[:t] + centre, "-", color="#2a6f97", lw=1.5)
            axes.plot(columns[:t] + centre, rows[:t] + centre, ".", color="#2a6f97", ms=6)
            corner = float(columns[t - 1]) - 0.5, float(rows[t - 1]) - 0.5
            axes.add_patch(Rectangle(corner, GLIMPSE, GLIMPSE, fill=False, ec="#e07a3f", lw=2.5))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Trains and examines all kinds for each seed; returns the shares of right captions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--json", type=Path, help="where to write the shares and the seconds")
    parser.add_argument("--out", type=Path, default=Path("docs/images/caption.png"))
    args = parser.parse_args(argv)
    if min(args.steps, args.seeds) < 1:
        parser.error("--steps and --seeds: expected at least 1")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more do not help at this size
    console = Console()
    training = Painter([style for style in range(STYLES) if style not in HELD_OUT])
    held_out = Painter(HELD_OUT)
    found: dict[str, list[float]] = {kind: [] for kind in args.kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in args.kinds}
    columns = TextColumn("{task.description:<24}"), BarColumn()
    right = TextColumn("words right {task.fields[right]:.0%}")
    model = None
    with Progress(*columns, right, TimeElapsedColumn(), console=console) as bar:
        for seed in range(args.seed, args.seed + args.seeds):
            for kind in args.kinds:
                task = bar.add_task(f"{kind}, seed {seed}", total=args.steps, right=0.0)
                start = time.process_time()
                learnt = train(training, kind, args.steps, seed, bar, task)
                seconds[kind].append(round(time.process_time() - start, 1))
                found[kind].append(round(learnt.examine(held_out), 4))
                if kind == "REINFORCE" and model is None:
                    model = learnt
    for kind, shares in found.items():
        each = ", ".join(f"{share:.1%}" for share in shares)
        console.print(
            f"{kind}: {statistics.mean(shares):.1%} of captions right ({each}), "
            f"{sum(seconds[kind]):.0f} s of processor time",
            highlight=False,
        )
    if args.json is not None:
        report = {"steps": args.steps, "first_seed": args.seed, "captions_right": found}
        text = json.dumps({**report, "processor_seconds": seconds}, indent=1)
        args.json.write_text(text + "\n")
    if model is not None:
        picture(model, held_out, args.out)
        console.print(f"picture: {args.out}", highlight=False)
    return found


if __name__ == "__main__":
    main()
