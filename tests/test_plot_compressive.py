"""The picture of a compressive memory: whose weight lies on which step of the stream."""

from __future__ import annotations

import pytest
import torch

import seqmem_fast as sf
from seqmem_fast.plot.compressive import over_steps

SIZES = (4, 3, 2)  # memory, compressed, ratio: 8 slots


@pytest.mark.parametrize("steps", [0, 3, 4, 5, 6, 9, 10, 40])
def test_weights_lie_on_the_steps_that_slots_stand_for(steps: int) -> None:
    torch.manual_seed(0)
    made = sf.CompressiveAttention(2, 1, *SIZES)
    # Each step holds its number, and its compressed slot the mean of two of them.
    numbers = torch.arange(steps + 3.0).expand(2, -1).T[None]
    state = made.memory(numbers[:, :steps])[0]
    slots, filled = made.memory.read(state)
    weights = torch.cat((filled, torch.ones(1, 3)), 1)[0]
    spread, (first, whole, segment) = over_steps(weights, steps, *SIZES)
    reach = min(max(steps - 4, 0) // 2, 3) * 2 + max(steps - 4, 0) % 2 + min(steps, 4)
    assert (first, segment) == (0, reach)
    assert spread.shape == (reach + 3,)
    assert spread.sum() == weights.sum()
    # Weighting each slot by what it holds is weighting each step by its number.
    held = torch.cat((slots[0, :, 0], numbers[0, steps:, 0]))
    past = torch.arange(steps - reach, steps + 3.0)
    torch.testing.assert_close((weights * held).sum(), (spread * past).sum())
    assert whole == reach - max(steps - 4, 0) % 2 - min(steps, 4)


def test_picture() -> None:
    pytest.importorskip("matplotlib")
    made = sf.CompressiveAttention(8, 2, 6, 5, 4)
    _, state, _ = made(torch.randn(1, 40, 8))
    _, _, weights = made(torch.randn(1, 7, 8), state)
    assert weights is not None
    figure = sf.plot.compressive(weights[0], int(state.steps[0]), 6, 5, 4, title="remembered")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["compressed, 4 : 1", "whole", "segment"]
    (image,) = figure.axes[0].get_images()
    torch.testing.assert_close(
        torch.tensor(image.get_array()).sum(1), torch.ones(7), check_dtype=False
    )
    figure.canvas.draw()


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"expected weights \[T, slots \+ T\], got \[2, 3, 9\]"):
        sf.plot.compressive(torch.ones(2, 3, 9), 9, *SIZES)
    with pytest.raises(ValueError, match=r"expected weights \[.., 8 \+ T\] of that memory"):
        sf.plot.compressive(torch.ones(3, 5), 9, *SIZES)
