"""sb3-contrib's recurrent PPO computes and learns the same on our LSTM, in one call a sequence."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import seqmem_fast as sf
from seqmem_fast.integrations import sb3

gym: Any = pytest.importorskip("gymnasium")
contrib: Any = pytest.importorskip("sb3_contrib")
stable: Any = pytest.importorskip("stable_baselines3")

STEPS, ENVS, HIDDEN = 24, 2, 8


@pytest.fixture(autouse=True)
def logs_go_with_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each training makes a folder for logs among the temporary files, and leaves it there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Short(gym.Env):
    """Episodes of three to twelve steps; what is seen is drawn anew, what pays is to repeat it."""

    def __init__(self, observation: Any, action: Any) -> None:
        self.observation_space, self.action_space = observation, action

    def seen(self) -> Any:
        space, rng = self.observation_space, self.np_random
        if isinstance(space, gym.spaces.Dict):
            return {name: rng.normal(size=box.shape).astype("f4") for name, box in space.items()}
        if space.dtype == np.uint8:
            return rng.integers(256, size=space.shape, dtype=np.uint8)
        return rng.normal(size=space.shape).astype("f4")

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(3, 12))
        return self.seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        reward = float(np.sum(action)) + float(self.np_random.normal())
        return self.seen(), reward, self.left == 0, self.left < 0, {}


VECTOR = gym.spaces.Box(-9, 9, (3,), np.float32)
PICTURE = gym.spaces.Box(0, 255, (1, 36, 36), np.uint8)
BOTH = gym.spaces.Dict(a=VECTOR, b=gym.spaces.Box(-9, 9, (2,), np.float32))
DISCRETE, CONTINUOUS = gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (2,), np.float32)
POLICIES: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
    "mlp": ("MlpLstmPolicy", VECTOR, DISCRETE, {}),
    "mlp shared": (
        "MlpLstmPolicy",
        VECTOR,
        CONTINUOUS,
        {"shared_lstm": True, "enable_critic_lstm": False},
    ),
    "mlp two layers": (
        "MlpLstmPolicy",
        VECTOR,
        CONTINUOUS,
        {"n_lstm_layers": 2, "lstm_kwargs": {"bias": False}},
    ),
    "mlp own features": ("MlpLstmPolicy", VECTOR, DISCRETE, {"share_features_extractor": False}),
    "cnn no critic": ("CnnLstmPolicy", PICTURE, DISCRETE, {"enable_critic_lstm": False}),
    "multi": ("MultiInputLstmPolicy", BOTH, DISCRETE, {}),
    "multi shared": (
        "MultiInputLstmPolicy",
        BOTH,
        DISCRETE,
        {"shared_lstm": True, "enable_critic_lstm": False},
    ),
}


def made(name: str, **options: Any) -> Any:
    policy, observation, action, kwargs = POLICIES[name]
    env = stable.common.vec_env.DummyVecEnv([lambda: Short(observation, action)] * ENVS)
    settings = {"n_steps": STEPS, "batch_size": 20, "n_epochs": 1, "seed": 0, "device": "cpu"}
    kwargs = {"lstm_hidden_size": HIDDEN, "net_arch": [8], **kwargs}
    return contrib.RecurrentPPO(policy, env, policy_kwargs=kwargs, **(settings | options))


@pytest.fixture(scope="module", params=POLICIES)
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


def rollout(model: Any, rows: int, steps: int) -> tuple[Any, Tensor, Any, Tensor]:
    """Observations, actions, states and the steps at which episodes begin, mid-sequence too."""
    policy, rng = model.policy, torch.Generator().manual_seed(1)
    model.observation_space.seed(2)
    model.action_space.seed(3)
    found = [model.observation_space.sample() for _ in range(rows * steps)]
    seen, _ = policy.obs_to_tensor(
        {name: np.stack([each[name] for each in found]) for name in found[0]}
        if isinstance(found[0], dict)
        else np.stack(found)
    )
    actions = torch.tensor(np.stack([model.action_space.sample() for _ in range(rows * steps)]))
    shape = (policy.lstm_actor.num_layers, rows, HIDDEN)
    pi, vf = (tuple(torch.randn(shape, generator=rng) for _ in "hc") for _ in range(2))
    states = contrib.common.recurrent.type_aliases.RNNStates(pi, vf)
    return seen, actions, states, (torch.rand(rows * steps, generator=rng) < 0.3).float()


def both(model: Any, call: Callable[[], Any]) -> tuple[Any, Any]:
    """What sb3 gives, and what it gives accelerated."""
    plain = call()
    sb3.accelerate(model)
    ours = call()
    sb3.restore(model)
    return plain, ours


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows, steps", [(3, 7), (1, 9), (4, 1)])
def test_the_policy_computes_the_same(model: Any, rows: int, steps: int) -> None:
    seen, actions, states, starts = rollout(model, rows, steps)
    policy = model.policy

    def evaluated() -> list[Tensor]:
        policy.zero_grad()
        values, log_prob, entropy = policy.evaluate_actions(seen, actions, states, starts)
        (values.square().mean() + log_prob.mean() + 0.1 * entropy.mean()).backward()
        grads = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        return [values.detach(), log_prob.detach(), entropy.detach(), *grads]

    def acted() -> Any:
        with torch.no_grad():
            values = policy.predict_values(seen, states.vf, starts)
            return *policy(seen, states, starts, deterministic=True), values

    close(*both(model, evaluated))
    close(*both(model, acted))


def test_draws_are_those_of_sb3(model: Any) -> None:
    seen, _, states, starts = rollout(model, 5, 1)

    @torch.no_grad()
    def drawn() -> Any:
        torch.manual_seed(7)
        return [model.policy(seen, states, starts)[:3] for _ in range(8)]

    close(*both(model, drawn))
    categorical = hasattr(model.action_space, "n")
    sb3.accelerate(model)
    assert (sb3._CHOOSE in vars(model.policy.action_dist)) == categorical
    bad = seen if isinstance(seen, Tensor) else seen["a"]
    if categorical and bad.is_floating_point():
        bad.fill_(torch.nan)
        with torch.no_grad(), pytest.raises(RuntimeError):
            model.policy(seen, states, starts)
    sb3.restore(model)
    assert sb3._CHOOSE not in vars(model.policy.action_dist)


def test_predict(model: Any) -> None:
    model.observation_space.seed(4)
    seen = [model.observation_space.sample() for _ in range(6)]

    def acted() -> list[Any]:
        state, found = None, []
        for number, each in enumerate(seen):
            begins = np.array([number in (0, 3)])
            action, state = model.predict(each, state, begins, deterministic=True)
            found += [torch.tensor(action), *map(torch.tensor, state)]
        return found

    close(*both(model, acted))


def learnt(name: str, ours: str) -> tuple[dict[str, float], list[float], dict[str, Tensor]]:
    """The losses, the rewards and the weights after training with one seed."""
    model = made(name)
    if ours == "from the start":
        sb3.accelerate(model)
    rewards: list[float] = []
    for turn in range(2):
        if ours == "later" and turn == 1:
            sb3.accelerate(model)
        model.learn(STEPS * ENVS, log_interval=10**6)  # logs are kept, not written
        rewards += [float(each) for each in model.rollout_buffer.rewards.flatten()]
    losses = {k: v for k, v in model.logger.name_to_value.items() if k.startswith("train/")}
    return losses, rewards, model.policy.state_dict()


@pytest.mark.parametrize("name", ["mlp", "mlp two layers", "cnn no critic", "multi shared"])
def test_the_same_seed_learns_the_same(name: str) -> None:
    plain = learnt(name, "no")
    assert {"train/value_loss", "train/policy_gradient_loss"} <= plain[0].keys()
    for when in ("from the start", "later") if name == "mlp" else ("from the start",):
        ours = learnt(name, when)
        assert ours[0] == pytest.approx(plain[0], rel=1e-3, abs=1e-4)
        assert ours[1] == pytest.approx(plain[1], rel=1e-3, abs=1e-4)
        torch.testing.assert_close(ours[2], plain[2], rtol=1e-3, atol=1e-4)


def test_a_sequence_is_one_call_and_its_padding_is_not_computed() -> None:
    model = made("mlp")
    calls: list[tuple[int, ...]] = []
    hook = model.policy.lstm_actor.register_forward_hook(
        lambda module, args, kwargs, out: calls.append(
            (*args[0].shape[:2], int((out[0] != 0).any(-1).sum()))
        ),
        with_kwargs=True,
    )
    sb3.accelerate(model)
    model.learn(STEPS * ENVS)
    hook.remove()
    assert calls[:STEPS] == [(1, ENVS, ENVS)] * STEPS  # a rollout; then its training
    batches = [call for call in calls[STEPS:] if call[0] > 1]
    assert [kept for _, _, kept in batches] == [20, 20, 8] * model.n_epochs
    assert sum(steps * rows for steps, rows, _ in batches) > 60  # padded
    assert len(calls) == STEPS + len(batches)


@torch.no_grad()  # sb3 keeps results in its policy, and what has a graph cannot be copied
def test_saved_loaded_copied_and_pickled(tmp_path: Path) -> None:
    model = made("mlp")
    report = sb3.accelerate(model)
    assert [name for name, _ in report.swapped] == ["lstm_actor", "lstm_critic", sb3._PROCESS]
    assert not sb3.accelerate(model).swapped  # it is already
    seen, actions, states, starts = rollout(model, 2, 5)
    expected = model.policy.evaluate_actions(seen, actions, states, starts)
    model.learn(0)
    model.save(tmp_path / "model")
    loaded = contrib.RecurrentPPO.load(tmp_path / "model", device="cpu")
    assert sb3.restore(loaded) == 0
    assert len(sb3.accelerate(loaded).swapped) == 3
    copies = [
        loaded.policy,
        copy.deepcopy(model.policy),
        pickle.loads(pickle.dumps(model.policy)),
    ]
    for policy in copies:
        close(policy.evaluate_actions(seen, actions, states, starts), expected)
    assert copies[1]._process_sequence is copies[2]._process_sequence is sb3._process_sequence
    loaded.set_env(model.get_env())
    with torch.enable_grad():
        loaded.learn(STEPS * ENVS)
    assert sb3.restore(model) == 3
    assert not {sb3._PROCESS, sb3._SAMPLE} & {*vars(model.policy), *vars(model.rollout_buffer)}
    close(model.policy.evaluate_actions(seen, actions, states, starts), expected)


@pytest.mark.filterwarnings("ignore:.*jit|Converting|Iterating")
def test_what_is_left_to_sb3() -> None:
    model = made("mlp")
    seen, _, states, starts = rollout(model, 2, 3)
    expected = model.policy.predict_values(seen, states.vf, starts)

    class Values(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = model.policy

        def forward(self, seen: Tensor, h: Tensor, c: Tensor, starts: Tensor) -> Tensor:
            return self.policy.predict_values(seen, (h, c), starts)

    sb3.accelerate(model)
    traced = torch.jit.trace(Values(), (seen, *states.vf, starts), check_trace=False)
    close(traced(seen, *states.vf, starts), expected)
    sf.restore(model.policy)  # the LSTMs alone
    close(model.policy.predict_values(seen, states.vf, starts), expected)
    sb3.restore(model)

    def process(*args: Any) -> Any:
        return type(model.policy)._process_sequence(*args)

    model.policy._process_sequence = process
    [(name, _, reason)] = sb3.accelerate(model).kept
    assert name == sb3._PROCESS and "not the one of sb3-contrib" in reason
    assert sb3.restore(model) == 2 and model.policy._process_sequence is process

    plain = stable.PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
    for call in (sb3.accelerate, sb3.restore):
        with pytest.raises(TypeError, match=r"expected a model .* recurrent policy, got PPO"):
            call(plain)
