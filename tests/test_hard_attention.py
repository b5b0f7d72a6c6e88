"""Hard attention's ops: the inherited suite, sampling's statistics, and edges of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hostile_suite import Bad, HostileSuite, Target
from op_suite import (
    Case,
    OpSuite,
    Threaded,
    cast,
    check_against_float64,
    check_same_bits_at_any_thread_count,
    differentiable,
    sample_of,
)
from torch import Tensor
from torch.distributions import Categorical

from seqmem_fast import ops
from seqmem_fast.ops import hard_attention as ours
from seqmem_fast.reference import hard_attention as reference

NAMES = [s.name for s in reference.sample_inputs() if s.function == "reinforce_loss"]


class InFloat32(OpSuite):
    """Under autocast these ops compute in float32, as torch's softmax and losses do."""

    def test_autocast(self, name: str) -> None:
        case = self.case(name, torch.bfloat16)
        halved, whole = (
            differentiable(case.tensors),
            differentiable(cast(case.tensors, torch.float32)),
        )
        with torch.autocast("cpu", torch.bfloat16):
            outputs = case.op(*halved)
        expected = case.op(*whole)
        for a, b in zip(outputs, expected, strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)
        torch.autograd.backward([o.sum() for o in outputs])
        torch.autograd.backward([o.sum() for o in expected])
        assert torch.equal(halved[0].grad, whole[0].grad.bfloat16())


def sample_case(rows: int, actions: int, dtype: torch.dtype) -> Case:
    """log_prob and entropy of the action that fixed uniform numbers lead to."""
    logits = next(iter(reference.sample_inputs(dtype=dtype, sizes=(rows, actions)))).args[0]
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def bind(function: Any) -> Callable[..., tuple[Tensor, ...]]:
        def call(z: Tensor) -> tuple[Tensor, ...]:
            type_ = torch.float64 if z.dtype == torch.float64 else torch.float32
            return tuple(function(z, uniform[: z.size(0)].to(type_))[1:])

        return call

    return Case(bind(ours.sample_at), bind(reference.sample_at), (logits,), (0,), (0, 0))


def threaded() -> Threaded:
    """Calls below and above the size at which one takes several threads."""

    def both(logits: Tensor) -> tuple[Tensor, ...]:
        """Both ops, with numbers that are no matter of chance."""
        rows = torch.arange(logits.size(0))
        action, log_prob, entropy = ours.sample_at(logits, (rows % 97) / 97)
        returns = (rows % 5).to(logits.dtype)
        return log_prob, entropy, ops.reinforce_loss(logits, action, returns)

    return [(both, (torch.randn(rows, 10),)) for rows in (3, 8_000)]


class TestCategoricalSample(InFloat32):
    names = ("rows",)

    def test_opcheck(self, name: str) -> None:
        """Without AOT's part, which sums in the first output's dtype, int64 here; test_compile
        goes that way as well."""
        parts = ("test_schema", "test_autograd_registration", "test_faketensor")
        for op, args in self.raw_calls(name):
            torch.library.opcheck(op, args, test_utils=parts)

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        return sample_case(*((2, 3) if tiny else (4, 7)), dtype)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        logits = self.case(name).tensors[0]
        uniform = torch.rand(4, dtype=torch.float64)
        action, log_prob, entropy = torch.ops.seqmem.categorical_sample(logits, uniform)
        seeds = torch.ones_like(log_prob), torch.ones_like(entropy)
        backward = torch.ops.seqmem.categorical_sample_backward.default
        return [
            (torch.ops.seqmem.categorical_sample.default, (logits.requires_grad_(), uniform)),
            (backward, (*seeds, logits.detach(), action)),
        ]


def loss_case(name: str, rows: int, actions: int, dtype: torch.dtype) -> Case:
    """Of the logits; returns and baseline are constants."""
    sample = sample_of(reference, name, dtype=torch.float64, sizes=(rows, actions))
    logits, action, returns, *baseline = sample.args

    def bind(function: Any) -> Callable[..., tuple[Tensor, ...]]:
        def call(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
            constants = [
                (t if t.dim() == 0 else t[: z.size(0)]).to(dtype).to(z.dtype)
                for t in (returns, *baseline)
            ]
            return (function(z, a, *constants, **sample.kwargs),)

        return call

    per_row = 0 if sample.kwargs.get("reduction") == "none" else None
    return Case(
        bind(ops.reinforce_loss),
        bind(reference.reinforce_loss),
        (logits.to(dtype), action),
        (0, 0),
        (per_row,),
    )


class TestReinforceLoss(InFloat32):
    names = NAMES

    def test_noncontiguous_and_expanded_gradients(self, name: str) -> None:
        if name != "rows":
            pytest.skip("one number has no strides")
        super().test_noncontiguous_and_expanded_gradients(name)

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        return loss_case(name, *((2, 3) if tiny else (4, 7)), dtype)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        sample = sample_of(reference, name, dtype=torch.float64)
        logits, action, returns, *baseline = sample.args
        code = ("none", "mean", "sum").index(sample.kwargs.get("reduction", "sum"))
        constants = (baseline[0] if baseline else None, 0.3, code)
        op = torch.ops.seqmem.reinforce_loss
        loss = op(logits, action, returns, *constants)
        tensors = (logits.detach(), action, returns, *constants)
        return [
            (op.default, (logits.clone().requires_grad_(), *tensors[1:])),
            (torch.ops.seqmem.reinforce_loss_backward.default, (torch.ones_like(loss), *tensors)),
        ]


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sizes(dtype: torch.dtype) -> None:
    """Around the widths of vectors."""
    for actions in (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33, 100, 1000):
        check_against_float64(sample_case(5, actions, dtype), str(actions))
        if actions > 1:  # else the loss is zero, and its error is measured against itself
            check_against_float64(loss_case("rows", 5, actions, dtype), str(actions))


def test_leading_dimensions() -> None:
    logits = torch.randn(2, 3, 5)
    uniform = torch.rand(2, 3)
    action, log_prob, entropy = ours.sample_at(logits, uniform)
    assert action.shape == log_prob.shape == entropy.shape == (2, 3)
    policy = Categorical(logits=logits)
    torch.testing.assert_close(log_prob, policy.log_prob(action))
    torch.testing.assert_close(entropy, policy.entropy())
    for a, b in zip(ours.sample_at(logits[1, 2], uniform[1, 2]), (action, log_prob), strict=False):
        assert a.shape == () and torch.equal(a, b[1, 2])


def chi_square(action: Tensor, p: Tensor) -> float:
    counts = torch.bincount(action, minlength=p.numel()).double()
    assert not counts[p == 0].any()
    expected = (p * action.numel())[p > 0]
    return float(((counts[p > 0] - expected) ** 2 / expected).sum())


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_frequencies(dtype: torch.dtype) -> None:
    """Pearson's statistic, below its quantile of 99.9 %, for 10 and 40 actions."""
    for actions, free, quantile in ((10, 9, 27.9), (40, 38, 70.7)):
        logits = torch.randn(actions, dtype=dtype)
        if free < actions - 1:
            logits[7] = -torch.inf
        action, _, _ = ops.categorical_sample(logits.expand(60_000, -1))
        assert chi_square(action, torch.softmax(logits.double(), -1)) < quantile


def test_reproducible() -> None:
    logits = torch.randn(200, 10)
    torch.manual_seed(5)
    first = ops.categorical_sample(logits)[0]
    second = ops.categorical_sample(logits)[0]
    torch.manual_seed(5)
    assert torch.equal(ops.categorical_sample(logits)[0], first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    own = [ops.categorical_sample(logits, generator=torch.Generator().manual_seed(3)) for _ in "ab"]
    assert torch.equal(own[0][0], own[1][0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_never_an_action_of_probability_zero(dtype: torch.dtype) -> None:
    below_one = 1 - torch.finfo(dtype).eps / 2
    for actions in (3, 8, 9, 20, 70):
        for kept in range(0, actions, 3):
            logits = torch.full((3, actions), -torch.inf, dtype=dtype)
            logits[:, kept] = 2.0
            logits[:, kept // 2] = -300.0  # e^-302 underflows in float32
            uniform = torch.tensor([0.0, 0.5, below_one], dtype=dtype)
            action, log_prob, entropy = ours.sample_at(logits, uniform)
            p = torch.softmax(logits, -1).gather(1, action[:, None])
            assert (
                (p > 0).all() and torch.isfinite(log_prob).all() and torch.isfinite(entropy).all()
            )
    logits = torch.randn(1000, 50, dtype=dtype)
    for value in (0.0, below_one):
        action, log_prob, _ = ours.sample_at(logits, torch.full((1000,), value, dtype=dtype))
        assert (action == (0 if value == 0 else 49)).all() and torch.isfinite(log_prob).all()


@pytest.mark.isa
@pytest.mark.sanitize
def test_impossible_actions_have_finite_gradients() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf, 2.0, -torch.inf]])
    found = []
    for function in (ours.sample_at, reference.sample_at):
        z = logits.clone().requires_grad_()
        _, log_prob, entropy = function(z, torch.tensor([0.9, 0.9]))
        (log_prob.sum() + 2 * entropy.sum()).backward()
        assert torch.isfinite(z.grad).all()
        found.append(z.grad)
    torch.testing.assert_close(*found)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("actions", [1, 3, 8, 21])
def test_rows_that_are_no_distribution(actions: int) -> None:
    bad = torch.stack([torch.full((actions,), v) for v in (torch.nan, torch.inf, -torch.inf)])
    logits = torch.cat((bad, torch.zeros(1, actions)))
    action, log_prob, entropy = ours.sample_at(logits, torch.full((4,), 0.7))
    assert (0 <= action).all() and (action < actions).all()
    assert torch.isnan(log_prob[:3]).all() and torch.isnan(entropy[:3]).all()
    assert torch.isfinite(log_prob[3]) and torch.isfinite(entropy[3])


@pytest.mark.isa
def test_many_rows_same_bits_at_any_thread_count(restored_threads: None) -> None:
    check_same_bits_at_any_thread_count(loss_case("rows", 20_000, 10, torch.float32))
    check_same_bits_at_any_thread_count(sample_case(20_000, 10, torch.float32))


def test_loss_from_log_probabilities() -> None:
    logits = torch.randn(6, 5, requires_grad=True)
    returns, baseline = torch.randn(6), torch.randn(6)
    action, log_prob, _ = ops.categorical_sample(logits)
    for reduction in ("sum", "mean", "none"):
        a = ops.reinforce_loss(log_prob, None, returns, baseline, reduction=reduction)
        b = ops.reinforce_loss(logits, action, returns, baseline, reduction=reduction)
        torch.testing.assert_close(a, b)
        grads = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (a, b)]
        torch.testing.assert_close(*grads)


def test_returns_and_baseline_are_constants() -> None:
    logits, returns, baseline = (
        torch.randn(shape, requires_grad=True) for shape in ((6, 5), (6,), (6,))
    )
    action = torch.randint(5, (6,))
    ops.reinforce_loss(logits, action, returns, baseline).backward()
    assert returns.grad is None and baseline.grad is None
    advantage = (returns - baseline).detach()
    onehot = torch.nn.functional.one_hot(action, 5)
    torch.testing.assert_close(
        logits.grad, (logits.softmax(-1) - onehot).detach() * advantage[:, None]
    )


def test_one_baseline_for_all_rows() -> None:
    logits, action, returns = torch.randn(6, 5), torch.randint(5, (6,)), torch.randn(6)
    expected = ops.reinforce_loss(logits, action, returns, torch.full((6,), 0.3))
    for baseline in (0.3, torch.tensor(0.3)):
        torch.testing.assert_close(ops.reinforce_loss(logits, action, returns, baseline), expected)


# ---- wrong arguments

z = torch.zeros


LOGITS = [
    Bad("logits 0-D", {"logits": z(())}, ValueError, "logits with at least one action"),
    Bad("no actions", {"logits": z(4, 0)}, ValueError, r"at least one action .* got \[4, 0\]"),
    Bad("logits integer", {"logits": z(4, 5).long()}, TypeError, "logits of dtype"),
    Bad("logits complex", {"logits": z(4, 5).cfloat()}, TypeError, "logits of dtype"),
    Bad("logits float8", {"logits": z(4, 5).to(torch.float8_e5m2)}, TypeError, "logits of dtype"),
    Bad("logits sparse", {"logits": z(4, 5).to_sparse()}, TypeError, "logits to be a dense"),
]
SAMPLE = [
    *LOGITS,
    Bad("rows", {"logits": z(3, 5)}, ValueError, r"uniform of shape \[3\], got \[4\]"),
    Bad("uniform 2-D", {"uniform": z(4, 1)}, ValueError, r"uniform of shape \[4\], got \[4, 1\]"),
    Bad("uniform dtype", {"uniform": z(4).double()}, TypeError, "uniform of dtype"),
    Bad("uniform for bfloat16", {"uniform": z(4).bfloat16()}, TypeError, "uniform of dtype"),
    Bad("uniform sparse", {"uniform": z(4).to_sparse()}, TypeError, "uniform to be a dense"),
]
LOSS = [
    *LOGITS,
    Bad("rows", {"logits": z(3, 5)}, ValueError, r"action of shape \[3\], got \[4\]"),
    Bad("action 2-D", {"action": z(4, 1).long()}, ValueError, r"\[4\], got \[4, 1\]"),
    Bad("action float", {"action": z(4)}, TypeError, "action of dtype int64"),
    Bad("action int32", {"action": z(4).int()}, TypeError, "action of dtype int64"),
    Bad("action sparse", {"action": z(4).long().to_sparse()}, TypeError, "action to be a dense"),
    Bad("action low", {"action": torch.tensor([0, -1, 0, 0])}, ValueError, "0..4, got -1", True),
    Bad("action high", {"action": torch.tensor([0, 5, 0, 0])}, ValueError, "0..4, got 5", True),
    Bad("action huge", {"action": torch.tensor([0, 2**62, 0, 0])}, ValueError, "in 0..4", True),
    Bad("returns size", {"returns": z(3)}, ValueError, r"returns of shape \[4\], got \[3\]"),
    Bad("returns dtype", {"returns": z(4).double()}, TypeError, "returns of logits's dtype"),
    Bad("returns integer", {"returns": z(4).long()}, TypeError, "returns of logits's dtype"),
    Bad("baseline size", {"baseline": z(5)}, ValueError, r"baseline of shape \[4\], got \[5\]"),
    Bad("baseline dtype", {"baseline": z(4).half()}, TypeError, "baseline of logits's dtype"),
    Bad("baseline sparse", {"baseline": z(4).to_sparse()}, TypeError, "baseline to be a dense"),
    Bad(
        "reduction",
        {"reduction": "max"},
        ValueError,
        "reduction 'sum', 'mean' or 'none'",
        in_python=True,
    ),
    *(
        bad._replace(change={"action": None, **bad.change}, in_python=True)
        for bad in (
            Bad(
                "bonus of no action", {"logits": z(4), "entropy_weight": 0.1}, ValueError, "action"
            ),
            Bad("log_prob shape", {}, ValueError, r"returns of shape \[4, 5\], got \[4\]"),
            Bad("log_prob integer", {"logits": z(4).long()}, TypeError, "log-prob"),
            Bad("log_prob dtype", {"logits": z(4).double()}, TypeError, "returns of dtype torch.f"),
        )
    ),
]


def sample_arguments() -> dict[str, Any]:
    return {"logits": z(4, 5), "uniform": z(4)}


def loss_arguments() -> dict[str, Any]:
    return {
        "logits": z(4, 5),
        "action": torch.tensor([0, 1, 2, 4]),
        "returns": torch.ones(4),
        "baseline": z(4),
        "entropy_weight": 0.0,
        "reduction": "sum",
    }


class TestHostile(HostileSuite):
    targets = (
        Target("categorical_sample", ours.sample_at, sample_arguments, SAMPLE),
        Target("reinforce_loss", ops.reinforce_loss, loss_arguments, LOSS),
    )


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="seqmem::categorical_sample: expected logits to be"):
        ops.categorical_sample([0.1, 0.2])
    with pytest.raises((TypeError, RuntimeError)):
        ops.reinforce_loss(z(4, 5), [0, 1, 2, 3], torch.ones(4))
