"""The LSTM with zoneout and layer normalisation beside eager loops over its steps.

python -m benchmarks.bench_lstm_regularized [--threads 1] [--malloc D|M] [--rows TEXT]
"""

from __future__ import annotations

import random
import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import measure, rows
from seqmem_fast import ops
from seqmem_fast.reference.common import dropped

LETTERS = "T, B, I, H"
LOOP, PLAIN = "eager loop", "plain layer"
SHARE = 0.1  # of the units that zoneout keeps
MOST = (128, 64, 256, 256)  # of a random shape


def ours(
    x: Tensor, seed: Tensor, keep_h: Tensor, keep_c: Tensor, *weights: Tensor
) -> tuple[Tensor, ...]:
    """It draws the masks anew from the seed; the rivals are given them."""
    norms = ops.LSTMNorms(*weights[4:]) if len(weights) > 4 else None
    w_ih, w_hh, b_ih, b_hh = weights[:4]
    output, state, *_ = ops.lstm_regularized(
        x, None, w_ih, w_hh, b_ih, b_hh, norms, zoneout_h=SHARE, zoneout_c=SHARE, seed=seed
    )
    return output, *state


def plain(
    x: Tensor, seed: Tensor, keep_h: Tensor, keep_c: Tensor, *weights: Tensor
) -> tuple[Tensor, ...]:
    """What zoneout and norms add: our LSTM without them."""
    output, state = ops.lstm(x, None, *weights[:4])
    return output, *state


def loop(
    x: Tensor, seed: Tensor, keep_h: Tensor, keep_c: Tensor, *weights: Tensor
) -> tuple[Tensor, ...]:
    """By torch's own cell, as users write it; with norms by their formula."""
    h = c = x.new_zeros(x.size(1), weights[1].size(1))
    steps = []
    for t in range(x.size(0)):
        if len(weights) == 4:
            h_new, c_new = torch.lstm_cell(x[t], (h, c), *weights)
        else:
            h_new, c_new = normalized_cell(x[t], h, c, *weights)
        h, c = torch.where(keep_h[t], h, h_new), torch.where(keep_c[t], c, c_new)
        steps.append(h)
    return torch.stack(steps), h, c


def normalized_cell(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """One step with layer normalisation."""
    w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh, gain_c, shift_c = weights
    z = F.layer_norm(F.linear(x, w_ih), gain_ih.shape, gain_ih)
    z = z + F.layer_norm(F.linear(h, w_hh), gain_hh.shape, gain_hh) + b_ih + b_hh
    i, f, g, o = z.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(F.layer_norm(c, gain_c.shape, gain_c, shift_c)), c


def work(norm: bool, t: int, b: int, i: int, h: int) -> rows.Work:
    def sample(rng: torch.Generator) -> tuple[Any, ...]:
        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=rng)

        seed = torch.randint(2**63 - 1, (2,), generator=rng)
        keep = [dropped((t, b, h), SHARE, each) for each in seed.split(1)]
        weights = [normal(4 * h, i) / h**0.5, normal(4 * h, h) / h**0.5]
        weights += [normal(4 * h) for _ in range(4 if norm else 2)]
        weights += [normal(h) for _ in range(2 if norm else 0)]
        return normal(t, b, i), seed, *keep, *weights

    return rows.Work(sample, ours, {LOOP: loop, PLAIN: plain})


Goals = dict[str, tuple[float | None, float]]


def pair(norm: bool, *shape: int, goals: Goals | None = None) -> Any:
    """Both modes."""
    name = "LSTM layer norm, zoneout" if norm else "LSTM zoneout"
    text, make = ", ".join(map(str, shape)), partial(work, norm, *shape)
    return rows.pair("lstm_regularized", text, make, goals=goals or {}, name=name)


def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
    """With and without norms by turns."""
    return list(pair(place % 2 == 1, *(max(2, size) for size in rows.draw(rng, MOST))))


GOALS = {LOOP: (3.0, 3.0), PLAIN: (None, 0.87)}
ROWS = [row for norm in (False, True) for row in pair(norm, 100, 32, 256, 256, goals=GOALS)]
GPU_ROWS = [row for norm in (False, True) for row in pair(norm, 100, 32, 256, 256)]

test_row = measure.test_row

if __name__ == "__main__":
    sys.exit(measure.main("lstm_regularized", ROWS, LETTERS))
