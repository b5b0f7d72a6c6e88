"""Stable-Baselines3's recurrent PPO (package sb3-contrib) with each sequence as one call of our op.

Its policy runs an LSTM step by step, because episodes end within a batch, and its padding too; ours
takes the steps at which they begin as ``reset``, and ``lengths`` for the padding. Tried with
sb3-contrib 2.9::

    model = RecurrentPPO("MlpLstmPolicy", "CartPole-v1")
    seqmem_fast.integrations.sb3.accelerate(model)
    model.learn(100_000)

``model.save`` and ``RecurrentPPO.load`` are sb3's own, and know nothing of it: a loaded model runs
as sb3 made it until it is given to :func:`accelerate` as well.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from ..accelerate import Report, runs_ours
from ..accelerate import accelerate as accelerate_modules
from ..accelerate import restore as restore_modules

if TYPE_CHECKING:
    from sb3_contrib import RecurrentPPO

__all__ = ["accelerate", "restore"]

State = tuple[Tensor, Tensor]
_PROCESS = "_process_sequence"  # the policy's method that loops over the steps
_SAMPLE = "_get_samples"  # the buffer's method that pads a batch of sequences
_CHOOSE = "proba_distribution"  # the distribution's method that takes the logits of actions
_LENGTHS = "_seqmem_lengths"  # where the batch's episode_starts carries how long its sequences are


def accelerate(model: RecurrentPPO) -> Report:
    """The LSTMs of ``model.policy`` run our op, a sequence at a time; before or after ``learn``.

    All recurrent policies of sb3-contrib (Mlp, Cnn, MultiInput), whether the critic has an LSTM of
    its own, shares the actor's or has none. Actions, values, log-probabilities and gradients are
    those of sb3 to rounding. With a ``dropout`` between layers its masks are others: sb3 draws them
    step by step. What stands for padding in training, and never enters a loss, is not computed.
    While the policy acts, torch does not check the arguments of a categorical distribution: where a
    logit is NaN, drawing the action raises RuntimeError instead of ValueError.

    Left to sb3 are a ``_process_sequence`` that a subclass or the user wrote; LSTMs that
    :func:`seqmem_fast.accelerate` leaves; and what ``torch.jit.trace`` records.

    Args:
        model: a ``sb3_contrib.RecurrentPPO``.

    Returns:
        What was swapped, what was left and why.

    Raises:
        TypeError: the model's policy is not a recurrent one of sb3-contrib.
    """
    policy, buffer = _parts(model)
    report = accelerate_modules(policy)
    if _PROCESS in vars(policy) or getattr(type(policy), _PROCESS) is not _theirs():
        if vars(policy).get(_PROCESS) is not _process_sequence:
            report.kept.append((_PROCESS, type(policy).__name__, "not the one of sb3-contrib"))
        return report
    vars(policy)[_PROCESS] = _process_sequence
    if _SAMPLE not in vars(buffer):
        vars(buffer)[_SAMPLE] = partial(_get_samples, buffer)
    if type(policy.action_dist) is _their_categorical():
        vars(policy.action_dist)[_CHOOSE] = partial(_choose, policy.action_dist)
    report.swapped.append((_PROCESS, "one call in place of a loop over steps"))
    return report


def restore(model: RecurrentPPO) -> int:
    """Undo :func:`accelerate`; returns how many places changed."""
    policy, buffer = _parts(model)
    ours = vars(policy).get(_PROCESS) is _process_sequence
    if ours:
        del vars(policy)[_PROCESS]
    if getattr(vars(buffer).get(_SAMPLE), "func", None) is _get_samples:
        del vars(buffer)[_SAMPLE]
    if getattr(vars(policy.action_dist).get(_CHOOSE), "func", None) is _choose:
        del vars(policy.action_dist)[_CHOOSE]
    return restore_modules(policy) + ours


def _parts(model: Any) -> tuple[nn.Module, Any]:
    """The model's policy and its buffer."""
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

    policy = getattr(model, "policy", None)
    if not isinstance(policy, RecurrentActorCriticPolicy):
        raise TypeError(
            "seqmem::lstm: expected a model of sb3-contrib with a recurrent policy, "
            f"got {type(model).__name__} with a policy of type {type(policy).__name__}"
        )
    return policy, model.rollout_buffer


def _theirs() -> Any:
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

    return RecurrentActorCriticPolicy._process_sequence


def _their_categorical() -> Any:
    from stable_baselines3.common.distributions import CategoricalDistribution

    return CategoricalDistribution


class _Unchecked(Categorical):
    """torch's distribution for one draw a row: the same numbers by fewer calls."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits=logits, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        if sample_shape:
            return super().sample(sample_shape)
        return torch.multinomial(self.probs, 1, replacement=True).squeeze(-1)


def _choose(chooser: Any, action_logits: Tensor) -> Any:
    """As sb3's; a step of acting makes, draws from and asks its distribution once."""
    if torch.is_grad_enabled() or action_logits.dim() != 2:
        return type(chooser).proba_distribution(chooser, action_logits)
    chooser.distribution = _Unchecked(action_logits)
    return chooser


def _get_samples(buffer: Any, *args: Any, **kwargs: Any) -> Any:
    """A batch as the buffer makes it; what is padding in it goes with it to the policy."""
    samples = getattr(type(buffer), _SAMPLE)(buffer, *args, **kwargs)
    rows = samples.lstm_states.pi[0].size(1)
    lengths = (samples.mask > 0).view(rows, -1).sum(1)
    setattr(samples.episode_starts, _LENGTHS, lengths)
    return samples


def _process_sequence(
    features: Tensor, lstm_states: State, episode_starts: Tensor, lstm: nn.LSTM
) -> tuple[Tensor, State]:
    """As sb3's, which lays batches out as [sequences * steps, ...]."""
    rows = lstm_states[0].size(1)
    if not runs_ours(lstm) or lstm.batch_first:
        return _theirs()(features, lstm_states, episode_starts, lstm)
    begins = episode_starts != 0
    if features.size(0) == rows:  # one step, as in a rollout
        output, state = lstm(features[None], lstm_states, reset=begins.view(1, rows))
        return output[0], state
    sequences = features.reshape(rows, -1, lstm.input_size).transpose(0, 1)
    reset = begins.view(rows, -1).transpose(0, 1)
    lengths = getattr(episode_starts, _LENGTHS, None)
    output, state = lstm(sequences, lstm_states, reset=reset, lengths=lengths)
    return output.transpose(0, 1).flatten(0, 1), state
