"""seqmem_fast.AdditiveAttention: the formula, its call forms, and what torch does with modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import seqmem_fast as sf

Q, K, A = 5, 6, 7


def module(dtype: torch.dtype = torch.float64) -> sf.AdditiveAttention:
    torch.manual_seed(1)
    return sf.AdditiveAttention(Q, K, A, dtype=dtype)


def inputs(*batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((*batch, 3, Q), (*batch, 4, K), (*batch, 4, 2))
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_it_is_bahdanaus_formula(batch: tuple[int, ...]) -> None:
    attention, (s, h, value) = module(), inputs(*batch)
    mask = torch.rand(*batch, 3, 4) < 0.7
    output, weights = attention(s, h, value, mask)
    e = torch.zeros(*batch, 3, 4, dtype=s.dtype)
    for i in range(3):
        for j in range(4):
            hidden = torch.tanh(
                s[..., i, :] @ attention.query_proj.weight.t()
                + h[..., j, :] @ attention.key_proj.weight.t()
            )
            e[..., i, j] = hidden @ attention.score_weight
    expected = e.masked_fill(~mask, -1e9).softmax(-1)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(output, expected @ value)


def test_keys_projected_once_give_the_same() -> None:
    attention, (s, h, value) = module(), inputs(2)
    whole = attention(s, h, value)
    keys = attention.project_keys(h)
    for i in range(3):
        step = attention(s[:, i : i + 1], keys, value, keys_projected=True)
        torch.testing.assert_close(step, tuple(t[:, i : i + 1] for t in whole))


def test_every_parameter_learns() -> None:
    attention, given = module(), inputs(2)
    output, weights = attention(*given)
    (output.square().sum() + weights.square().sum()).backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_parameters_and_their_bounds() -> None:
    attention = sf.AdditiveAttention(16, 25, 100)
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    assert shapes == {
        "score_weight": (100,),
        "query_proj.weight": (100, 16),
        "key_proj.weight": (100, 25),
    }
    for parameter, bound in zip(attention.parameters(), (0.1, 0.25, 0.2), strict=True):
        assert 0.8 * bound < float(parameter.detach().abs().max()) <= bound
    assert repr(attention).startswith("AdditiveAttention(\n  16, 25, 100\n")


def test_compiled_exported_copied_pickled_and_loaded() -> None:
    attention, given = module(), inputs(2)
    expected = attention(*given)
    other = sf.AdditiveAttention(Q, K, A, dtype=torch.float64)
    other.load_state_dict(attention.state_dict())
    for same in (
        torch.compile(attention, fullgraph=True, backend="aot_eager"),
        torch.export.export(attention, given).module(),
        copy.deepcopy(attention),
        pickle.loads(pickle.dumps(attention)),
        other,
    ):
        torch.testing.assert_close(same(*given), expected)


def test_autocast_and_vmap() -> None:
    attention, given = module(torch.float32), inputs(2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = attention(*given)
    assert output.dtype == weights.dtype == torch.bfloat16
    expected = attention(*given)
    torch.testing.assert_close(weights.float(), expected[1], atol=0.02, rtol=0.02)
    torch.testing.assert_close(torch.vmap(attention)(*given), expected)


def test_it_trains() -> None:
    """Learns to pick the key that equals the query."""
    torch.manual_seed(0)
    attention = sf.AdditiveAttention(4, 4, 32)
    optimizer = torch.optim.Adam(attention.parameters(), lr=0.02)
    keys = torch.eye(4)
    losses = []
    for _ in range(150):
        _, weights = attention(keys, keys, keys)
        loss = -weights.diagonal().log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 1.2 and losses[-1] < 0.1
