"""Draws what a compressive memory remembers of a melody.

    python -m benchmarks.studies.compressive [--out FILE]

Queries and keys are the inputs themselves, so a note looks where it sounded before. A note lasts
two to six steps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import seqmem_fast as sf
from benchmarks.harness import report

NOTES, WIDTH, SHARPNESS = 6, 32, 4.0
MEMORY, COMPRESSED, RATIO, SEGMENT = 24, 12, 4, 12


def echo() -> sf.CompressiveAttention:
    """One head whose scores are SHARPNESS times the inputs' dot products."""
    attention = sf.CompressiveAttention(WIDTH, 1, MEMORY, COMPRESSED, RATIO)
    with torch.no_grad():
        query, key, value = attention.in_proj_weight.chunk(3)
        for weight, scale in ((query, SHARPNESS * WIDTH**0.5), (key, 1.0), (value, 1.0)):
            weight.copy_(scale * torch.eye(WIDTH))
    return attention


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the picture."""
    parser = report.parser("benchmarks.studies.compressive", __doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/compressive.png"))
    args = parser.parse_args(argv)
    torch.manual_seed(3)
    notes = torch.nn.functional.normalize(torch.randn(NOTES, WIDTH), dim=1)
    steps = MEMORY + RATIO * COMPRESSED + 2
    played = torch.randint(NOTES, (steps,)).repeat_interleave(torch.randint(2, 7, (steps,)))
    melody = notes[played[: steps + SEGMENT]][None]
    attention = echo()
    with torch.no_grad():
        _, state, _ = attention(melody[:, :steps])
        _, _, weights = attention(melody[:, steps:], state)
    assert weights is not None
    figure = sf.plot.compressive(weights[0], steps, MEMORY, COMPRESSED, RATIO)
    figure.savefig(args.out, dpi=110)
    report.console().print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
