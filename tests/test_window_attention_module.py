"""The WindowAttention module: its dense twin, global tokens, padding, streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hostile_suite import check_refused_by_module
from torch import Tensor, nn

import seqmem_fast as sf

E, H = 12, 3


def module(left: int = 4, right: int = 0, **options: Any) -> sf.WindowAttention:
    torch.manual_seed(2)
    return sf.WindowAttention(E, H, left, right, dtype=torch.float64, **options)


def steps(*shape: int) -> Tensor:
    return torch.randn(*shape, E, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def dense(attention: sf.WindowAttention, x: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor]:
    """torch's module over the same parameters, [T, B, E]; left_out [T, T], true where not seen."""
    torchs = nn.MultiheadAttention(E, H, batch_first=attention.batch_first, dtype=x.dtype)
    torchs.load_state_dict(attention.state_dict())
    output, weights = torchs(x, x, x, attn_mask=left_out)
    return output, weights


@pytest.mark.parametrize("batch_first", [False, True])
def test_it_is_torchs_attention_under_a_band(batch_first: bool) -> None:
    attention = module(3, 2, batch_first=batch_first)
    x = steps(2, 9) if batch_first else steps(9, 2)
    ahead = torch.arange(9) - torch.arange(9)[:, None]
    expected, full = dense(attention, x, (ahead < -3) | (ahead > 2))
    output, weights = attention(x, x, x)
    torch.testing.assert_close(output, expected)
    band = weights.band
    assert band.shape == (2, 9, 6) and weights.global_keys is None
    for i in range(9):
        for c in range(6):
            j = i + c - 3
            wanted = full[:, i, j] if 0 <= j < 9 else torch.zeros(2)
            torch.testing.assert_close(band[:, i, c].double(), wanted.double())
    assert attention(x, x, x, need_weights=False)[1] is None


def test_global_tokens_see_and_are_seen() -> None:
    attention = module(1, 1, global_tokens=2)
    x = steps(9, 2)
    ahead = torch.arange(9) - torch.arange(9)[:, None]
    left_out = ahead.abs() > 1
    left_out[:, :2], left_out[:2] = False, False
    expected, full = dense(attention, x, left_out)
    output, weights = attention(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights.global_queries.mean(1), full[:, :2])
    torch.testing.assert_close(weights.global_keys.mean(1)[:, 2:], full[:, 2:, :2])
    assert weights.band.shape == (2, H, 9, 3)


def test_causal_global_keys_are_sinks() -> None:
    attention = module(2, 0, global_tokens=3)
    x = steps(9, 2)
    ahead = torch.arange(9) - torch.arange(9)[:, None]
    seen = (ahead <= 0) & ((ahead >= -2) | (torch.arange(9) < 3))
    output, weights = attention(x, x, x)
    torch.testing.assert_close(output, dense(attention, x, ~seen)[0])
    assert weights.global_queries is None


@pytest.mark.parametrize("options", [{}, {"global_tokens": 2}, {"dilation": 2, "left": 2}], ids=str)
@pytest.mark.parametrize("cuts", [(1, 2, 3), (5, 11), (0, 10, 11)])
def test_a_stream_equals_the_whole(options: dict[str, int], cuts: tuple[int, ...]) -> None:
    attention = module(**options)
    x = steps(13, 2)
    whole, _ = attention(x, x, x)
    state, parts = attention.init_state(2), []
    for begin, end in zip((0, *cuts), (*cuts, 13), strict=True):
        output, _, state = attention.stream(x[begin:end], state)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts), whole)
    kept = attention.left * attention.dilation + attention.global_tokens
    assert state.key.shape == (2, H, kept, E // H)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"right": 2, "global_tokens": 2}], ids=str)
def test_padding_is_not_read(side: str, options: dict[str, int]) -> None:
    attention = module(**options)
    x = steps(8, 2)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    there = slice(0, 5) if side == "right" else slice(3, 8)
    mask[1] = True
    mask[1, there] = False
    output, _ = attention(x, x, x, mask)
    spoilt = x.clone()
    spoilt[:, 1][mask[1]] = torch.nan
    again, _ = attention(x, spoilt, spoilt, mask)
    assert torch.equal(output, again)
    if side == "right":
        alone = x[there, 1:]
        torch.testing.assert_close(output[there, 1:], attention(alone, alone, alone)[0])


def test_other_normalizers() -> None:
    attention, x = module(4, 3, global_tokens=1, normalizer="sparsemax"), 3 * steps(9, 2)
    _, weights = attention(x, x, x, average_attn_weights=False)
    total = weights.band.sum(-1) + weights.global_keys.sum(-1)
    torch.testing.assert_close(total[:, :, 1:], torch.ones_like(total[:, :, 1:]))
    assert (weights.band == 0).float().mean() > 0.3 and (weights.global_queries == 0).any()


@pytest.mark.slow
def test_compiled_trained_and_loaded() -> None:
    attention = module(3, 1, global_tokens=1)
    x = steps(7, 2)
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    output, _ = compiled(x, x, x)
    torch.testing.assert_close(output, attention(x, x, x)[0])
    output.square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    sf.Attention(E, H, dtype=x.dtype).load_state_dict(attention.state_dict())
    assert repr(attention).startswith("WindowAttention(\n  12, 3, left=3, right=1, global_tokens=1")


def test_wrong_arguments() -> None:
    attention, x = module(3, 1), steps(5, 2)
    holes = torch.tensor([[False, True, False, False, False]] * 2)
    for call, error, says in (
        (lambda: attention(x[0], x, x), ValueError, "query with 3 dimensions"),
        (lambda: attention(x, x[:, :1], x), ValueError, "key of shape"),
        (lambda: attention(x, x, x, holes), ValueError, "at the ends of a row"),
        (lambda: attention(x, x, x, holes.int()), TypeError, "key_padding_mask of dtype bool"),
        (lambda: attention.stream(x, attention.init_state(2)), ValueError, "right = 0"),
        (lambda: module(3).stream(x[0], module(3).init_state(2)), ValueError, "with 3 dimensions"),
        (lambda: module(3).stream(x, module(3).init_state(1)), ValueError, "state.key of shape"),
        (lambda: attention(x.float(), x, x), TypeError, "query of the parameters' dtype"),
        (lambda: module(-2), ValueError, "left of at least -1, got -2"),
        (lambda: module(1, dilation=0), ValueError, "dilation of at least 1, got 0"),
    ):
        check_refused_by_module(call, error, says)
