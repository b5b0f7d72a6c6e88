"""sf.LSTM's options that torch.nn's has not: forget_bias, locked_dropout, weight_dropout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

import seqmem_fast as sf

T, B, IN, H = 5, 3, 4, 6


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 3}])
def test_forget_bias(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    lstm = sf.LSTM(IN, H, forget_bias=1.0, **options)
    torch.manual_seed(0)
    plain = nn.LSTM(IN, H, **options)
    for _ in range(2):
        layers = [name.removeprefix("bias_ih") for name in lstm.state_dict() if "bias_ih" in name]
        assert len(layers) == (4 if options else 1)
        for layer in layers:
            total = getattr(lstm, f"bias_ih{layer}") + getattr(lstm, f"bias_hh{layer}")
            assert torch.equal(total[H : 2 * H], torch.ones(H))
        for name, parameter in plain.named_parameters():
            ours = lstm.get_parameter(name)
            rows = [*range(H), *range(2 * H, len(parameter))] if "bias" in name else slice(None)
            assert torch.equal(ours[rows], parameter[rows])
        torch.manual_seed(1)
        lstm.reset_parameters()
        torch.manual_seed(1)
        plain.reset_parameters()


def test_forget_bias_of_a_cell() -> None:
    torch.manual_seed(0)
    cell = sf.LSTMCell(IN, H, forget_bias=2.0)
    for _ in range(2):
        assert torch.equal((cell.bias_ih + cell.bias_hh)[H : 2 * H], torch.full((H,), 2.0))
        assert not torch.equal(cell.bias_ih[:H], cell.bias_ih[H : 2 * H])
        cell.reset_parameters()
    assert repr(cell) == "LSTMCell(4, 6, forget_bias=2.0)"
    theirs = nn.LSTMCell(IN, H)
    sf.accelerate(theirs, replace=True)
    assert repr(theirs) == "LSTMCell(4, 6)"
    with pytest.raises(ValueError, match=r"lstm_cell: expected bias with a forget_bias"):
        sf.LSTMCell(IN, H, bias=False, forget_bias=1.0)


def masks(p: float, *shapes: tuple[int, ...]) -> list[Tensor]:
    """What is drawn from the seed, in this order."""
    torch.manual_seed(5)
    return [F.dropout(torch.ones(shape, dtype=torch.float64), p) for shape in shapes]


def run(module: nn.Module, *args: Any, **options: Any) -> Any:
    torch.manual_seed(5)
    return module(*args, **options)


@pytest.mark.parametrize("batch_first", [False, True])
def test_locked_dropout(batch_first: bool) -> None:
    settings: dict[str, Any] = {"batch_first": batch_first, "dtype": torch.float64}
    lstm = sf.LSTM(IN, H, 2, dropout=0.5, locked_dropout=True, bidirectional=True, **settings)
    first = sf.LSTM(IN, H, bidirectional=True, **settings)
    second = sf.LSTM(2 * H, H, bidirectional=True, **settings)
    weights = lstm.state_dict()
    first.load_state_dict({k: v for k, v in weights.items() if "_l0" in k})
    second.load_state_dict({k.replace("_l1", "_l0"): v for k, v in weights.items() if "_l1" in k})
    x = torch.randn((B, T, IN) if batch_first else (T, B, IN), dtype=torch.float64)
    [mask] = masks(0.5, (B, 1, 2 * H) if batch_first else (1, B, 2 * H))
    assert 0 < int((mask == 0).sum()) < mask.numel()
    expected = second(first(x)[0] * mask)[0]
    torch.testing.assert_close(run(lstm, x)[0], expected)

    lengths = torch.tensor([5, 4, 2])
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first)
    padded = second(first(x, lengths=lengths)[0] * mask, lengths=lengths)[0]
    again = pack_padded_sequence(padded, lengths, batch_first=batch_first)
    torch.testing.assert_close(run(lstm, packed)[0].data, again.data)
    lstm.eval()
    torch.testing.assert_close(run(lstm, x)[0], second(first(x)[0])[0])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
def test_weight_dropout(options: dict[str, Any]) -> None:
    lstm = sf.LSTM(IN, H, weight_dropout=0.4, dtype=torch.float64, **options)
    plain = nn.LSTM(IN, H, dtype=torch.float64, **options)
    plain.load_state_dict(lstm.state_dict())
    x = torch.randn(T, B, IN, dtype=torch.float64)
    names = [name for name, _ in plain.named_parameters() if name.startswith("weight_hh")]
    drawn = masks(0.4, *[(4 * H, H)] * len(names))
    thinned = {n: plain.get_parameter(n) * m for n, m in zip(names, drawn, strict=True)}
    output, (h, c) = run(lstm, x)
    expected = functional_call(plain, thinned, (x,))
    torch.testing.assert_close((output, (h, c)), expected)
    output.square().sum().backward()
    expected[0].square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(lstm.get_parameter(name).grad, parameter.grad)
    assert not torch.equal(lstm(x)[0], lstm(x)[0])  # a mask a call
    lstm.eval()
    torch.testing.assert_close(lstm(x), plain(x))


def test_the_options_are_kept_and_said() -> None:
    lstm = sf.LSTM(IN, H, 2, dropout=0.1, forget_bias=1, locked_dropout=True, weight_dropout=0.5)
    expected = "LSTM(4, 6, num_layers=2, dropout=0.1, forget_bias=1, locked_dropout=True, "
    assert repr(lstm) == expected + "weight_dropout=0.5)"
    assert repr(copy.deepcopy(lstm)) == repr(lstm)
    assert repr(sf.LSTM(IN, H)) == "LSTM(4, 6)"
    lstm.load_state_dict(nn.LSTM(IN, H, 2, dropout=0.1).state_dict())
    theirs = nn.LSTM(IN, H, 2)
    sf.accelerate(theirs, replace=True)
    assert repr(theirs) == "LSTM(4, 6, num_layers=2)"
    theirs(torch.randn(T, B, IN))


def test_locked_dropout_is_no_probability() -> None:
    with pytest.raises(TypeError, match="seqmem::lstm: expected locked_dropout to be a bool, got"):
        sf.LSTM(IN, H, 2, locked_dropout=0.5)  # type: ignore[arg-type]


@pytest.mark.slow
def test_they_compile_in_one_graph() -> None:
    lstm = sf.LSTM(IN, H, 2, dropout=0.5, locked_dropout=True, weight_dropout=1.0)
    x = torch.randn(T, B, IN)
    output, _ = torch.compile(lstm, fullgraph=True, backend="aot_eager")(x)
    assert output.shape == (T, B, H)
    lstm.dropout = 0.0  # and weight_hh is all zeros: nothing is left to chance
    torch.testing.assert_close(torch.compile(lstm, fullgraph=True, backend="eager")(x), lstm(x))


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_wrong_options(value: float) -> None:
    with pytest.raises(ValueError, match=r"lstm: expected weight_dropout in 0\.\.1, got"):
        sf.LSTM(IN, H, weight_dropout=value)
    with pytest.raises(ValueError, match=r"expected bias with a forget_bias, got bias False"):
        sf.LSTM(IN, H, bias=False, forget_bias=1.0)
