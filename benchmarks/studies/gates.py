"""Draws the gates of a trained character model reading a sentence.

    python -m benchmarks.studies.gates [--text TEXT] [--out docs/images/gates.png]

Uses the model `make bench` left behind, or trains one for a moment.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import seqmem_fast
from benchmarks.harness import machine, report
from benchmarks.studies import charlm
from seqmem_fast import plot

SENTENCE = 'The "with" statement is used to wrap the execution of a block'
CHECKPOINT = machine.RESULTS / "charlm.pt"


def train(path: Path, steps: int) -> None:
    """A model good enough to look into, kept at `path`."""
    corpus = charlm.Corpus.of(charlm.english())
    training = charlm.Training.start("picture", seqmem_fast.LSTM, corpus)
    for _ in track(range(steps), description="training"):
        training.step()
    charlm.save(path, training.model, corpus.alphabet)


@torch.no_grad()
def picture(model: charlm.CharLM, alphabet: str, text: str, **options: Any) -> Any:
    """The Figure of the model reading `text`."""
    tokens = charlm.encode(text, alphabet).unsqueeze(1)
    gates = model.lstm(model.embed(tokens), return_gates=True)[2]
    return plot.gates(gates, text=text, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Loads or trains the model and writes the picture."""
    parser = report.parser("benchmarks.studies.gates", __doc__)
    parser.add_argument("--text", default=SENTENCE)
    parser.add_argument("--units", type=int, nargs="+", help="which units; the liveliest if none")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=200, help="of training, if none is kept")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "docs" / "images" / "gates.png")
    args = parser.parse_args(argv)
    if not args.checkpoint.is_file():
        train(args.checkpoint, args.steps)
    model, alphabet = charlm.load(args.checkpoint)
    unknown = set(args.text) - set(alphabet)
    if unknown:
        parser.error(f"characters the model has never seen: {''.join(sorted(unknown))}")
    options = {"units": args.units} if args.units else {}
    figure = picture(model, alphabet, args.text, **options)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
