"""HardAttention and its training step: the plain loop, baselines, learning, hostile calls."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import seqmem_fast as sf


def plain_loss(model: nn.Module, states: list[Tensor], rewards: Any, actions: Any) -> Tensor:
    """What a plain REINFORCE loop sums, for given actions: one call of the model per state."""
    terms = []
    for state, reward, action in zip(states, rewards, actions, strict=True):
        policy = Categorical(torch.softmax(model(state), -1))
        terms.append(-policy.log_prob(action) * reward)
    return torch.stack(terms).sum()


def test_the_usual_example() -> None:
    model = sf.HardAttention(input_dim=64, hidden_dim=32, num_locations=10)
    assert set(model.state_dict()) == {
        f"policy_net.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    states = [torch.randn(64) for _ in range(5)]
    loss = sf.reinforce_train_step(model, optimizer, states, [1.0, 0.5, 0.8, 0.3, 0.9])
    assert isinstance(loss, float)
    action, log_prob = model.select_action(states[0])
    assert action.shape == () and action.dtype == torch.int64 and log_prob.shape == ()
    assert log_prob.requires_grad


def test_select_action() -> None:
    model = sf.HardAttention(6, 5, 4)
    states = torch.randn(3, 2, 6)
    action, log_prob = model.select_action(states, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_prob, Categorical(logits=model(states)).log_prob(action))


@pytest.mark.parametrize("as_list", [True, False])
def test_a_step_is_the_plain_loops(as_list: bool) -> None:
    """Same loss and same new weights, for the same actions."""
    model, other = sf.HardAttention(6, 5, 4), sf.HardAttention(6, 5, 4)
    other.load_state_dict(model.state_dict())
    batch, rewards = torch.randn(20, 6), torch.randn(20)
    states = list(batch)
    generator = torch.Generator().manual_seed(7)
    loss = sf.reinforce_train_step(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        states if as_list else batch,
        rewards.tolist() if as_list else rewards,
        generator=generator,
    )
    actions, _ = other.select_action(batch, generator=generator.manual_seed(7))
    expected = plain_loss(other, states, rewards, actions)
    expected.backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_baselines() -> None:
    """A step with a baseline is the plain loop's with the rewards lowered by it."""
    states, rewards = torch.randn(20, 6), torch.randn(20)
    average = sf.MovingAverageBaseline(0.5)
    average.update(torch.tensor([2.0]))
    for baseline, value in (
        (0.3, torch.tensor(0.3)),
        (torch.tensor(0.3), torch.tensor(0.3)),
        (states[:, 0], states[:, 0]),
        (average, torch.tensor(2.0)),
    ):
        model = sf.HardAttention(6, 5, 4)
        generator = torch.Generator().manual_seed(7)
        actions, _ = model.select_action(states, generator=generator)
        expected = plain_loss(model, list(states), rewards - value, actions)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        loss = sf.reinforce_train_step(
            model, optimizer, states, rewards, baseline=baseline, generator=generator.manual_seed(7)
        )
        assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert average.value == pytest.approx(0.5 * 2 + 0.5 * float(rewards.mean()))


def test_moving_average() -> None:
    average = sf.MovingAverageBaseline(0.9)
    assert average.value is None
    average.update(torch.tensor([1.0, 3.0]))
    assert average.value == 2
    average.update(torch.tensor([12.0]))
    assert average.value == pytest.approx(3)
    assert "value=3" in repr(average)


def test_entropy_bonus_keeps_the_policy_open() -> None:
    """Without rewards the bonus alone drives the policy towards the uniform one."""
    model = sf.HardAttention(4, 8, 5)
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    states = 3 * torch.randn(64, 4)

    @torch.no_grad()
    def entropy() -> float:
        return float(Categorical(logits=model(states)).entropy().mean())

    before = entropy()
    for _ in range(60):
        sf.reinforce_train_step(model, optimizer, states, torch.zeros(64), entropy_weight=1.0)
    assert before < entropy() and entropy() > 1.55  # log 5 is 1.609


def test_learns_where_to_look() -> None:
    """The reward is 1 at the location of the state's largest value."""
    model = sf.HardAttention(6, 32, 6)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    baseline = sf.MovingAverageBaseline()
    generator = torch.Generator()
    for step in range(250):
        states = torch.randn(64, 6)
        action, _ = model.select_action(states, generator=generator.manual_seed(step))
        rewards = (action == states.argmax(-1)).float()
        sf.reinforce_train_step(
            model,
            optimizer,
            states,
            rewards,
            baseline=baseline,
            generator=generator.manual_seed(step),
        )
    states = torch.randn(500, 6)
    assert float((model(states).argmax(-1) == states.argmax(-1)).float().mean()) > 0.7


def test_discounted_returns() -> None:
    rewards = [1.0, 2.0, 3.0, 4.0]
    expected = torch.tensor([1 + 0.5 * (2 + 0.5 * (3 + 0.5 * 4)), 2 + 0.5 * 5, 5, 4])
    torch.testing.assert_close(sf.discounted_returns(rewards, 0.5), expected)
    ends = torch.tensor([False, True, False, False])
    torch.testing.assert_close(
        sf.discounted_returns(torch.tensor(rewards), 0.5, ends=ends), torch.tensor([2.0, 2, 5, 4])
    )
    many = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    columns = [sf.discounted_returns(many[:, k], 0.9) for k in range(3)]
    torch.testing.assert_close(sf.discounted_returns(many, 0.9), torch.stack(columns, 1))
    assert torch.autograd.gradcheck(lambda r: sf.discounted_returns(r, 0.9), many)
    assert sf.discounted_returns([], 0.9).shape == (0,)


def step(states: Any, rewards: Any, **options: Any) -> float:
    model = sf.HardAttention(3, 4, 2)
    return sf.reinforce_train_step(
        model, torch.optim.SGD(model.parameters(), 0.1), states, rewards, **options
    )


z = torch.zeros
CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no states": (lambda: step([], []), ValueError, "at least one state"),
    "states of two shapes": (lambda: step([z(3), z(2)], [1, 1]), ValueError, "one shape"),
    "states are numbers": (lambda: step([1.0], [1.0]), TypeError, "states to be a tensor"),
    "rewards too few": (lambda: step(z(2, 3), [1.0]), ValueError, r"shape \[2\].*\[1\]"),
    "baseline size": (lambda: step(z(2, 3), [1.0, 1.0], baseline=z(3)), ValueError, "baseline"),
    "gamma": (lambda: sf.discounted_returns([1.0], 1.5), ValueError, "gamma"),
    "returns 0-D": (lambda: sf.discounted_returns(z(()), 0.9), ValueError, r"\[T, ...\]"),
    "ends dtype": (lambda: sf.discounted_returns(z(2), 0.9, ends=z(2)), TypeError, "bool"),
    "ends shape": (
        lambda: sf.discounted_returns(z(2), 0.9, ends=z(3).bool()),
        ValueError,
        r"\[2\], got \[3\]",
    ),
    "momentum": (lambda: sf.MovingAverageBaseline(1.0), ValueError, "momentum"),
    "no locations": (lambda: sf.HardAttention(3, 4, 0), ValueError, "num_locations > 0"),
    "half a location": (lambda: sf.HardAttention(3, 4, 0.5), TypeError, "num_locations"),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("name", CALLS)
def test_refuses(name: str) -> None:
    call, kind, says = CALLS[name]
    with pytest.raises(kind, match="expected") as caught:
        call()
    assert re.search(says, str(caught.value)), str(caught.value)
