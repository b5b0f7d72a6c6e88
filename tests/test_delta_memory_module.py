"""The layer over the delta memory: streams, documents side by side, transformers' weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hostile_suite import check_refused_by_module

import seqmem_fast as sf

SIZES = {"dim": 12, "heads": 4, "head_dim": 5, "key_heads": 2, "value_dim": 3}


def layer(**more: Any) -> sf.DeltaMemory:
    torch.manual_seed(0)
    return sf.DeltaMemory(**{**SIZES, **more}, dtype=torch.float64)


def series(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(1)).double()


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("cuts", [(1, 2, 3), (9,)])
def test_a_stream_cut_anywhere_equals_the_whole(width: int, cuts: tuple[int, ...]) -> None:
    model, input = layer(conv_width=width), series(2, 14)
    expected, last = model(input)
    outputs, state = [], None
    for begin, end in zip((0, *cuts), (*cuts, 14), strict=True):
        output, state = model(input[:, begin:end], state)
        outputs.append(output)
    close(torch.cat(outputs, 1), expected)
    close(state, last)


def test_lengths_and_resets() -> None:
    """Rows that end, and sequences joined to one row, as calls of their own."""
    model, input = layer(), series(3, 11)
    lengths, reset = torch.tensor([2, 11, 7]), torch.zeros(3, 11, dtype=torch.bool)
    reset[0, 1] = reset[1, 0] = reset[2, 5] = True
    start = model(series(3, 4) + 1)[1]
    output, state = model(input, start, lengths=lengths, reset=reset)
    for row, (first, end) in enumerate(((1, 2), (0, 11), (5, 7))):
        whole = input[row : row + 1]
        tail, last = model(whole[:, first:end])
        close(output[row, first:end], tail[0])
        close([part[row] for part in state], [part[0] for part in last])
        before, _ = model(whole[:, :first], sf.DeltaMemoryState(*(p[row : row + 1] for p in start)))
        close(output[row, :first], before[0])
        assert output[row, end:].eq(0).all()
    plain, kept = model(input, start, lengths=torch.tensor([0, 11, 7]))
    close([part[0] for part in kept], [part[0] for part in start])
    close(plain[1:2], model(input[1:2], sf.DeltaMemoryState(*(p[1:2] for p in start)))[0])


def test_padding_is_not_read() -> None:
    model, input, lengths = layer(), series(2, 5), torch.tensor([5, 2])
    clean = model(input, lengths=lengths)
    dirty = input.clone()
    dirty[1, 2:] = torch.nan
    output, state = model(dirty, lengths=lengths)
    close(output, clean[0])
    close([*state.detach()], [*clean[1]])
    assert output[1, 2:].eq(0).all()
    output.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_every_parameter_learns() -> None:
    model = layer()
    output, state = model(series(2, 9))
    (output.square().sum() + state.memory.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    again = sf.DeltaMemory(**SIZES, dtype=torch.float64)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(series(2, 9))[0], output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_types(dtype: torch.dtype) -> None:
    model = layer()
    exact, memory = model(series(2, 9))
    output, state = model.to(dtype)(series(2, 9).to(dtype))
    assert output.dtype == dtype and state.memory.dtype == torch.float32
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert (output.double() - exact).norm() < bound * exact.norm()
    assert (state.memory.double() - memory.memory).norm() < bound * memory.memory.norm()


@pytest.mark.slow
def test_compiled_and_printed() -> None:
    model, input = layer(), series(2, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(input), model(input))
    assert repr(model).startswith("DeltaMemory(\n  12, 4, 5, key_heads=2, value_dim=3\n")
    assert layer(conv_width=2).extra_repr().endswith("conv_width=2")


def test_equals_transformers_layer() -> None:
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = qwen.Qwen3NextConfig(
        hidden_size=16,
        num_hidden_layers=1,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=6,
        layer_types=["linear_attention"],
    )
    torch.manual_seed(0)
    theirs = qwen.Qwen3NextGatedDeltaNet(config, 0)
    torch.nn.init.uniform_(theirs.dt_bias)
    ours = sf.DeltaMemory.from_transformers(theirs)
    input = torch.randn(2, 70, 16)
    expected, (output, _) = theirs(input), ours(input)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    seed = torch.randn_like(output)
    for result in (expected, output):
        result.backward(seed)
    named = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dim": 0}, "dim > 0, got 0"),
        ({"key_heads": 3}, "key_heads that divides 4 heads, got 3"),
        ({"conv_width": 0}, "conv_width > 0"),
    ],
)
def test_wrong_options_are_refused(change: dict[str, Any], says: str) -> None:
    check_refused_by_module(lambda: layer(**change), ValueError, says)


def test_wrong_arguments_are_refused() -> None:
    model, input = layer(), series(2, 6)
    conv, memory = model.init_state(2)
    state = sf.DeltaMemoryState
    for call, says in (
        (lambda: model(input[0]), r"input of shape \[B, T, 12\], got \[6, 12\]"),
        (lambda: model(input[..., :5]), r"got \[2, 6, 5\]"),
        (lambda: model(input, state(conv[:1], memory)), r"state.conv of shape \[2, 3, 32\]"),
        (lambda: model(input, state(conv, memory[:, :1])), r"state of shape \[2, 4, 5, 3\]"),
        (lambda: model(input, reset=torch.zeros(6, 2).bool()), r"reset of shape \[2, 6\]"),
        (lambda: model(input, lengths=torch.tensor([1, 7])), r"lengths in 0..6, got 7"),
    ):
        check_refused_by_module(call, ValueError, says)
    dtype = torch.float32 if input.dtype == torch.float64 else torch.float64
    says = "input of the parameters' dtype"
    check_refused_by_module(lambda: model(input.to(dtype)), TypeError, says)
