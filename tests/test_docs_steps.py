"""docs/steps.md: every snippet runs, and each loop gives what its call gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PAGE = Path(__file__).parents[1] / "docs" / "steps.md"
T, B, IN, H = 9, 3, 16, 32
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    if not PAGE.is_file():
        pytest.skip("the docs are not beside these tests")
    names: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(snippet, names)
    return names


def drawn() -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Inputs [T, B, I], a state and the steps at which episodes begin [T, B]."""
    rng = torch.Generator().manual_seed(0)
    x, h, c = (torch.randn(n, B, k, generator=rng) for n, k in ((T, IN), (1, H), (1, H)))
    return x.requires_grad_(), (h, c), torch.rand(T, B, generator=rng) < 0.3


def compare(page: dict[str, Any], name: str, call: Callable[[Any], Any], x: Tensor) -> None:
    """What `<name>_loop` and `<name>_call` give, and their gradients."""
    lstm, found = page["lstm"], []
    for kind in ("loop", "call"):
        lstm.zero_grad()
        x.grad = None
        result = call(page[f"{name}_{kind}"])
        results = [result] if isinstance(result, Tensor) else [result[0], *result[1]]
        (
            results[0] * torch.linspace(-1, 1, results[0].numel()).view_as(results[0])
        ).sum().backward()
        grads = [p.grad.clone() for p in lstm.parameters()]
        assert x.grad is not None
        found.append([*(each.detach() for each in results), x.grad, *grads])
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_rollout(page: dict[str, Any]) -> None:
    x, state, reset = drawn()
    flat, done = x.flatten(0, 1), reset.flatten().float()
    compare(page, "rollout", lambda f: f(flat.clone(), state, done), x)
    last = torch.cat([reset[1:], torch.zeros(1, B, dtype=torch.bool)])
    assert torch.equal(page["begins"](last, reset[0]), reset)


def test_every_state(page: dict[str, Any]) -> None:
    x, state, reset = drawn()
    h, c = page["states_call"](x, state, reset)
    torch.testing.assert_close((h, c), page["states_loop"](x, state, reset), **CLOSE)
    k = 4  # a sequence cut at step k goes on from the state after step k - 1
    ahead, _ = page["states_call"](x[k:], (h[k - 1 : k], c[k - 1 : k]), reset[k:])
    torch.testing.assert_close(ahead, h[k:], **CLOSE)


def test_burn_in(page: dict[str, Any]) -> None:
    x, state, reset = drawn()
    lengths = torch.tensor([T, 6, 2])
    compare(page, "learn", lambda f: f(x, state, reset, lengths, 4), x)


def test_padded_batch(page: dict[str, Any]) -> None:
    torch.manual_seed(0)
    memory = page["Memory"](IN, H)
    lengths = torch.tensor([T, 5, 1])
    state = {"h": torch.randn(B, H), "c": torch.randn(B, H)}
    x = torch.randn(B, T, IN)
    output, final = memory({"obs": x, "state_in": state, "seq_lens": lengths})
    for row, length in enumerate(lengths.tolist()):
        alone = {name: value[row : row + 1] for name, value in state.items()}
        expected, last = memory({"obs": x[row : row + 1, :length], "state_in": alone})
        torch.testing.assert_close(output[row, :length], expected[0], **CLOSE)
        assert not output[row, length:].any()
        for name in "hc":
            torch.testing.assert_close(final[name][row], last[name][0], **CLOSE)
