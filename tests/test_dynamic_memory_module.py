"""DynamicMemory and EpisodicMemory: the plain formula, call forms, hostile calls, training."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hostile_suite import check_refused_by_module
from torch import Tensor, nn

import seqmem_fast as sf


class SeedMemory(nn.Module):
    """What the plain formula gives, for equal widths of memory and query."""

    def __init__(self, slots: int, width: int) -> None:
        super().__init__()
        self.update_gate = nn.Sequential(nn.Linear(2 * width, width), nn.Sigmoid())
        self.write_net = nn.Sequential(nn.Linear(2 * width, width), nn.Tanh())
        self.memory = nn.Parameter(torch.randn(slots, width))

    def forward(self, query: Tensor, num_hops: int = 3) -> tuple[Tensor, list[Tensor]]:
        memory, history = self.memory.expand(len(query), -1, -1), []
        for _ in range(num_hops):
            history.append(torch.softmax(torch.einsum("bnm,bm->bn", memory, query), -1))
            read = torch.einsum("bn,bnm->bm", history[-1], memory)
            update = torch.cat((read, query), -1)
            gate, write = self.update_gate(update)[:, None], self.write_net(update)[:, None]
            memory = gate * write + (1 - gate) * memory
        return memory, history


def test_the_usual_example() -> None:
    module = sf.DynamicMemory(memory_size=8, memory_dim=16, hidden_dim=32)
    final, history = module(torch.randn(4, 32), num_hops=3)
    assert final.shape == (4, 8, 16)
    assert len(history) == 3
    assert history[0][0].shape == (8,)
    for weights in history:
        torch.testing.assert_close(weights.sum(-1), torch.ones(4))


def test_numbers_of_the_seed() -> None:
    seed = SeedMemory(11, 6)
    module = sf.DynamicMemory(11, 6, 6)
    module.load_state_dict(seed.state_dict())
    assert dict(module.named_parameters()).keys() == dict(seed.named_parameters()).keys()
    query = torch.randn(5, 6)
    for hops in (0, 1, 4):
        (final, history), (other, others) = module(query, hops), seed(query, hops)
        torch.testing.assert_close(final, other)
        assert len(history) == hops
        torch.testing.assert_close(history, others)
    module(query)[0].square().sum().backward()
    seed(query)[0].square().sum().backward()
    for (name, ours), theirs in zip(module.named_parameters(), seed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_parameters() -> None:
    names = set(sf.DynamicMemory(8, 16, 32).state_dict())
    assert names == {
        "memory",
        "update_gate.0.weight",
        "update_gate.0.bias",
        "write_net.0.weight",
        "write_net.0.bias",
        "query_projection.weight",
    }
    assert "query_projection.weight" not in sf.DynamicMemory(8, 16, 16).state_dict()


@pytest.mark.parametrize("return_memory", [True, False])
def test_a_single_query(return_memory: bool) -> None:
    module = sf.DynamicMemory(7, 5, 3)
    query = torch.randn(3)
    final, history = module(query, 2, return_memory=return_memory)
    batched, histories = module(query[None], 2)
    if return_memory:
        torch.testing.assert_close(final, batched[0])
    else:
        assert final is None
    torch.testing.assert_close(history, [weights[0] for weights in histories])


def test_copies_pickles_and_prints() -> None:
    module = sf.DynamicMemory(7, 5, 3)
    query = torch.randn(2, 3)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(query)[0], module(query)[0])
    assert repr(module).startswith("DynamicMemory(\n  7, 5, 3")
    assert "fact_dim=4" in repr(sf.EpisodicMemory(5, 3, 4))


def test_compiles_whole() -> None:
    module = sf.DynamicMemory(7, 5, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    query = torch.randn(2, 3)
    torch.testing.assert_close(compiled(query), module(query))


# ---- episodic ------------------------------------------------------------------------------------


def test_episodes_by_hand() -> None:
    """One hop after another in plain PyTorch."""
    module = sf.EpisodicMemory(6, 5, 4)
    facts, state = torch.randn(3, 7, 4), torch.randn(3, 5)
    answer, attention = module(facts, state, 2)
    memory = module.fact_projection(facts)
    for hop in range(2):
        scores = torch.einsum("bnm,bm->bn", memory, module.query_projection(state))
        weights = torch.softmax(scores, -1)
        torch.testing.assert_close(attention[hop], weights)
        episode = torch.einsum("bn,bnm->bm", weights, memory)
        update = torch.cat((episode, state), -1)
        gate, write = module.update_gate(update)[:, None], module.write_net(update)[:, None]
        memory = gate * write + (1 - gate) * memory
        state = module.state_update(episode, state)
    torch.testing.assert_close(answer, state)


@pytest.mark.parametrize("filler", [float("nan"), float("inf")])
def test_padding_is_never_seen(filler: float) -> None:
    module = sf.EpisodicMemory(6, 5)
    question = torch.randn(3, 5)
    lengths = torch.tensor([4, 0, 7])
    facts = torch.randn(3, 7, 6)
    for row, length in enumerate(lengths):
        facts[row, length:] = filler
    facts.requires_grad_()
    answer, attention = module(facts, question, 3, lengths=lengths)
    assert not attention[:, 1].any() and not attention[:, 0, 4:].any()
    alone, weights = module(facts[0, :4], question[0], 3)
    torch.testing.assert_close(answer[0], alone)
    torch.testing.assert_close(attention[:, 0, :4], weights)
    answer.sum().backward()
    assert not facts.grad[0, 4:].any() and not facts.grad[1].any()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_lengths_are_a_mask() -> None:
    module = sf.EpisodicMemory(6, 6)
    facts, question = torch.randn(2, 4, 6), torch.randn(2, 6)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    by_length = module(facts, question, lengths=torch.tensor([2, 3], dtype=torch.int32))
    torch.testing.assert_close(by_length, module(facts, question, mask=mask))
    order = torch.tensor([3, 1, 0, 2])  # a mask may lie anywhere
    moved = module(facts[:, order], question, mask=mask[:, order])
    torch.testing.assert_close(moved[0], by_length[0])


@pytest.mark.slow
def test_learns_to_look_up() -> None:
    """The fact whose key is the question's holds the answer."""
    keys = 8
    module = sf.EpisodicMemory(16, 16, 2 * keys)
    question_of, read_out = nn.Embedding(keys, 16), nn.Linear(16, keys)
    parameters = [*module.parameters(), *question_of.parameters(), *read_out.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.02)
    for _ in range(200):
        key = torch.stack([torch.randperm(keys)[:5] for _ in range(32)])
        value = torch.randint(keys, (32, 5))
        facts = torch.cat(
            (nn.functional.one_hot(key, keys), nn.functional.one_hot(value, keys)), -1
        )
        answer, _ = module(facts.float(), question_of(key[:, 2]), 1)
        logits = read_out(answer)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, value[:, 2]).backward()
        optimizer.step()
    assert float((logits.argmax(-1) == value[:, 2]).float().mean()) > 0.9


z = torch.zeros
MODULE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "query width": (lambda: sf.DynamicMemory(4, 3, 2)(z(5, 3)), ValueError, "query"),
    "query 3-D": (lambda: sf.DynamicMemory(4, 3, 2)(z(1, 5, 2)), ValueError, "query"),
    "query 0-D": (lambda: sf.DynamicMemory(4, 3, 2)(z(())), ValueError, "query"),
    "query a list": (lambda: sf.DynamicMemory(4, 3, 2)([1.0, 2.0]), TypeError, "query"),
    "query dtype": (lambda: sf.DynamicMemory(4, 3, 3)(z(5, 3).double()), TypeError, "memory"),
    "hops negative": (lambda: sf.DynamicMemory(4, 3, 2)(z(5, 2), -1), ValueError, "num_hops"),
    "facts width": (lambda: sf.EpisodicMemory(3, 2)(z(5, 4, 2), z(5, 2)), ValueError, "facts"),
    "facts a list": (lambda: sf.EpisodicMemory(3, 2)([], z(5, 2)), TypeError, "facts"),
    "question rows": (
        lambda: sf.EpisodicMemory(3, 2)(z(5, 4, 3), z(4, 2)),
        ValueError,
        r"\[4, 4, 3\], got \[5, 4, 3\]",
    ),
    "question 1-D": (lambda: sf.EpisodicMemory(3, 2)(z(5, 4, 3), z(2)), ValueError, "question"),
    "no hops": (lambda: sf.EpisodicMemory(3, 2)(z(5, 4, 3), z(5, 2), 0), ValueError, "num_hops"),
    "no slots": (lambda: sf.EpisodicMemory(3, 2)(z(5, 0, 3), z(5, 2)), ValueError, "slot"),
    "lengths size": (
        lambda: sf.EpisodicMemory(3, 2)(z(5, 4, 3), z(5, 2), lengths=torch.ones(4).long()),
        ValueError,
        "lengths",
    ),
    "lengths float": (
        lambda: sf.EpisodicMemory(3, 2)(z(5, 4, 3), z(5, 2), lengths=torch.ones(5)),
        TypeError,
        "lengths",
    ),
    "lengths too long": (
        lambda: sf.EpisodicMemory(3, 2)(z(1, 4, 3), z(1, 2), lengths=torch.tensor([5])),
        ValueError,
        "lengths in 0..4, got 5",
    ),
    "lengths and mask": (
        lambda: sf.EpisodicMemory(3, 2)(
            z(1, 4, 3), z(1, 2), lengths=torch.tensor([1]), mask=z(1, 4).bool()
        ),
        ValueError,
        "lengths or mask",
    ),
    "mask dtype": (
        lambda: sf.EpisodicMemory(3, 2)(z(1, 4, 3), z(1, 2), mask=z(1, 4)),
        TypeError,
        "mask",
    ),
    "mask shape": (
        lambda: sf.EpisodicMemory(3, 2)(z(1, 4, 3), z(1, 2), mask=z(1, 3).bool()),
        ValueError,
        "mask",
    ),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("name", MODULE)
def test_module_refuses(name: str) -> None:
    check_refused_by_module(*MODULE[name])


@pytest.mark.parametrize("sizes", [(0, 3, 2), (4, -1, 2), (4, 3, 0)], ids=str)
def test_sizes_are_positive(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="seqmem::dynamic_memory: expected"):
        sf.DynamicMemory(*sizes)
    with pytest.raises(TypeError, match="seqmem::dynamic_memory: expected hidden_dim to be an int"):
        sf.EpisodicMemory(3, 2.0)
