"""Where to look: a policy learns by REINFORCE to glimpse at the digit in a cluttered picture.

    python examples/glimpse.py [--seed 0] [--steps 1200] [--out docs/images/glimpse.png]

A handwritten digit (8 x 8, from scikit-learn) stands somewhere on a canvas of 24 x 24 among
fragments of other digits. A policy sees the canvas blurred to 8 x 8 and chooses one of 25 places;
a classifier sees nothing but the 8 x 8 patch at that place and names the digit. Choosing a place
is no differentiable step, so the policy learns from reward alone: 1 where the classifier is right,
less a moving average as the baseline (Williams 1992; Mnih et al. 2014, arXiv 1406.6247). The same
classifier trained on random glimpses shows what looking in the right place is worth. Everything
is done for three seeds in a row, and measured on digits that no training has seen.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import seqmem_fast as sf

CANVAS, DIGIT, STRIDE, COARSE = 24, 8, 4, 8
PLACES_A_SIDE = (CANVAS - DIGIT) // STRIDE + 1
PLACES = PLACES_A_SIDE**2
FRAGMENT, FRAGMENTS = 4, 8
TRAINING_DIGITS = 1400  # of 1,797; the others are for the examination
BATCH, LEARNING_RATE, ENTROPY_BONUS = 256, 5e-3, 0.1
SEEDS, EXAMINATION_SEED = 3, 10**6


@dataclass
class Digits:
    """Handwritten digits, and scenes drawn from them."""

    images: Tensor  # [n, 8, 8] in 0..1
    labels: Tensor  # [n]

    @classmethod
    def load(cls) -> tuple[Digits, Digits]:
        """Those to train on and those held out."""
        from sklearn.datasets import load_digits

        found = load_digits()
        order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(found.images / 16, dtype=torch.float32)[order]
        labels = torch.tensor(found.target)[order]
        cut = TRAINING_DIGITS
        return cls(images[:cut], labels[:cut]), cls(images[cut:], labels[cut:])

    def scenes(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Canvases [B, 24, 24], their labels [B], and the place of the digit [B]."""

        def whole(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=rng)

        canvas = torch.zeros(count, CANVAS * CANVAS)
        crops = self.images.unfold(1, FRAGMENT, 1).unfold(2, FRAGMENT, 1)  # [n, 5, 5, 4, 4]
        for _ in range(FRAGMENTS):
            piece = crops[whole(len(crops), count), whole(5, count), whole(5, count)]
            corner = whole(CANVAS - FRAGMENT + 1, 2, count)
            canvas.scatter_(1, square(corner[0], corner[1], FRAGMENT), piece.flatten(1))
        chosen, place = whole(len(self.images), count), whole(PLACES, count)
        rows, columns = place // PLACES_A_SIDE * STRIDE, place % PLACES_A_SIDE * STRIDE
        canvas.scatter_(1, square(rows, columns, DIGIT), self.images[chosen].flatten(1))
        return canvas.view(count, CANVAS, CANVAS), self.labels[chosen], place


def square(rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Where on the flat canvas the pixels of squares lie, given their corners: [B, side * side]."""
    across = torch.arange(side)
    lines = (rows[:, None] + across)[:, :, None] * CANVAS  # [B, side, 1]
    return (lines + (columns[:, None] + across)[:, None, :]).flatten(1)


def blurred(canvas: Tensor) -> Tensor:
    """What the policy sees: the canvas at a third of its resolution, [B, 64]."""
    return F.adaptive_avg_pool2d(canvas[:, None], COARSE).flatten(1)


def glimpse(canvas: Tensor, place: Tensor) -> Tensor:
    """What the classifier sees: the patch at the chosen place, [B, 64]."""
    rows, columns = place // PLACES_A_SIDE * STRIDE, place % PLACES_A_SIDE * STRIDE
    return canvas.flatten(1).gather(1, square(rows, columns, DIGIT))


def classifier() -> nn.Module:
    """Names the digit in a patch."""
    hidden = 128
    return nn.Sequential(nn.Linear(DIGIT * DIGIT, hidden), nn.ReLU(), nn.Linear(hidden, 10))


class Looker(NamedTuple):
    """Who looks and who reads; without a policy the places are random."""

    policy: sf.HardAttention | None
    reader: nn.Module

    def examine(self, digits: Digits, count: int = 2000) -> float:
        """The share of held-out scenes named right, the policy taking its likeliest place."""
        rng = torch.Generator().manual_seed(EXAMINATION_SEED)
        canvas, label, _ = digits.scenes(count, rng)
        with torch.no_grad():
            if self.policy is None:
                place = torch.randint(PLACES, (count,), generator=rng)
            else:
                place = self.policy(blurred(canvas)).argmax(-1)
            right = self.reader(glimpse(canvas, place)).argmax(-1) == label
        return float(right.float().mean())


def train(
    digits: Digits, steps: int, seed: int, learn: bool, bar: Progress, task: TaskID
) -> Looker:
    """Policy and classifier together, or (learn=False) the classifier on random glimpses."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    policy = sf.HardAttention(COARSE * COARSE, 128, PLACES) if learn else None
    looker = Looker(policy, classifier())
    weights = [*looker.reader.parameters(), *(policy.parameters() if policy else ())]
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    baseline = sf.MovingAverageBaseline(0.95)
    for step in range(steps):
        canvas, label, _ = digits.scenes(BATCH, rng)
        if policy is None:
            place = torch.randint(PLACES, (BATCH,), generator=rng)
        else:
            logits = policy(blurred(canvas))
            place, _, _ = sf.ops.categorical_sample(logits.detach(), generator=rng)
        scores = looker.reader(glimpse(canvas, place))
        loss = F.cross_entropy(scores, label)
        reward = (scores.detach().argmax(-1) == label).float()
        if policy is not None:
            curious = ENTROPY_BONUS * (1 - step / steps)  # at first it tries all places
            loss = loss + sf.ops.reinforce_loss(
                logits, place, reward, baseline.value, entropy_weight=curious, reduction="mean"
            )
        baseline.update(reward)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update(task, advance=1, reward=baseline.value)
    return looker


def picture(looker: Looker, digits: Digits, out: Path, count: int = 6) -> None:
    """Scenes, what the policy sees of them, how likely each place is, and where it looks."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    if looker.policy is None:
        raise ValueError("random glimpses make no picture")
    canvas, label, _ = digits.scenes(count, torch.Generator().manual_seed(EXAMINATION_SEED + 1))
    with torch.no_grad():
        likely = looker.policy(blurred(canvas)).softmax(-1)
        place = likely.argmax(-1)
        named = looker.reader(glimpse(canvas, place)).argmax(-1)
    figure = Figure(figsize=(1.7 * count, 5.4), layout="constrained")
    panels = figure.subplots(3, count, squeeze=False)
    for column in range(count):
        shown = (
            canvas[column],
            blurred(canvas[column : column + 1]).view(COARSE, COARSE),
            likely[column].view(PLACES_A_SIDE, PLACES_A_SIDE),
        )
        for axes, values, colours in zip(
            panels[:, column], shown, ("gray_r", "gray_r", "magma"), strict=True
        ):
            axes.imshow(values.numpy(), cmap=colours, vmin=0)
            axes.set_xticks([])
            axes.set_yticks([])
        row, across = divmod(int(place[column]), PLACES_A_SIDE)
        corner = across * STRIDE - 0.5, row * STRIDE - 0.5
        frame = Rectangle(corner, DIGIT, DIGIT, fill=False, ec="#e07a3f", lw=2.5)
        panels[0, column].add_patch(frame)
        right = int(named[column]) == int(label[column])
        panels[0, column].set_title(
            f"reads {int(named[column])}" + ("" if right else f", is {int(label[column])}"),
            fontsize=10,
            color="black" if right else "#b00020",
        )
    for axes, text in zip(panels[:, 0], ("where it looks", "what it sees", "policy"), strict=True):
        axes.set_ylabel(text, fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Trains and examines both for each seed, draws the picture; returns the shares named right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="the first of three")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--out", type=Path, default=Path("docs/images/glimpse.png"))
    args = parser.parse_args(argv)
    console = Console()
    training, held_out = Digits.load()
    found: dict[str, list[float]] = {"random glimpses": [], "REINFORCE": []}
    columns = TextColumn("{task.description:<24}"), BarColumn()
    reward = TextColumn("right {task.fields[reward]:.0%}")
    with Progress(*columns, reward, TimeElapsedColumn(), console=console) as bar:
        for seed in range(args.seed, args.seed + SEEDS):
            for name, shares in found.items():
                task = bar.add_task(f"{name}, seed {seed}", total=args.steps, reward=0.0)
                learn = name == "REINFORCE"
                looker = train(training, args.steps, seed, learn, bar, task)
                shares.append(looker.examine(held_out))
    for name, shares in found.items():
        each = ", ".join(f"{share:.1%}" for share in shares)
        console.print(
            f"{name}: {statistics.mean(shares):.1%} of held-out digits named right ({each})",
            highlight=False,
        )
    picture(looker, held_out, args.out)
    console.print(f"picture: {args.out}", highlight=False)
    return found


if __name__ == "__main__":
    main()
