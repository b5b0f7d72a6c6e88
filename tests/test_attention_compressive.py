"""CompressiveMemory beside a row by row reference, CompressiveAttention beside a dense softmax."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqmem_fast as sf
from seqmem_fast.nn.attention_compressive import CompressiveState
from seqmem_fast.reference.attention_compressive import Row

WIDTH, KEPT, COMPRESSED, RATIO = 6, 5, 3, 4
SIZES = (KEPT, COMPRESSED, RATIO)
double = {"dtype": torch.float64}


def memory(function: str, **options: Any) -> sf.CompressiveMemory:
    torch.manual_seed(1)
    made = sf.CompressiveMemory(WIDTH, *SIZES, function=function, **options, **double)
    if made.conv is not None:
        nn.init.normal_(made.conv.weight)
        nn.init.normal_(made.conv.bias)
    return made


def attention(heads: int = 2, **options: Any) -> sf.CompressiveAttention:
    torch.manual_seed(2)
    return sf.CompressiveAttention(WIDTH, heads, *SIZES, **options, **double)


def remembered(made: sf.CompressiveMemory, state: CompressiveState, row: int) -> Tensor:
    slots, filled = made.read(state)
    assert not slots[row][~filled[row]].any()  # an empty slot is zero
    return slots[row][filled[row]]


def rows_after(
    made: sf.CompressiveMemory, stream: Tensor, reset: Tensor, lengths: Tensor
) -> list[Row]:
    """The reference, for a whole stream [B, T, E]."""
    rows = [Row() for _ in stream]
    for row, vectors, cuts, length in zip(rows, stream, reset, lengths, strict=True):
        for vector, cut in zip(vectors[:length], cuts[:length], strict=True):
            if cut:
                row.clear()
            row.step(vector, lambda group: made.compress(group[None, None])[0, 0], *SIZES)
    return rows


@pytest.mark.parametrize("function", ["mean", "max", "conv"])
@pytest.mark.parametrize("cuts", [[53], [1] * 53, [7, 0, 30, 2, 14], [4, 5, 44]], ids=str)
def test_any_cut_of_a_stream_gives_the_same_memories(function: str, cuts: list[int]) -> None:
    made, stream = memory(function), torch.randn(3, 53, WIDTH, **double)
    reset = torch.rand(3, 53) < torch.tensor([[0.0], [0.04], [0.2]])
    state = None
    for segment, cut in zip(stream.split(cuts, 1), reset.split(cuts, 1), strict=True):
        state, _ = made(segment, state, reset=cut)
    assert state is not None
    for index, row in enumerate(rows_after(made, stream, reset, torch.full((3,), 53))):
        found = remembered(made, state, index)
        torch.testing.assert_close(found, torch.stack(row.slots()), rtol=1e-12, atol=1e-12)


def test_lengths_end_a_row_of_a_segment() -> None:
    made, stream = memory("mean"), torch.randn(4, 40, WIDTH, **double)
    lengths = torch.tensor([[20, 20], [0, 13], [7, 0], [19, 1]])
    state = None
    for k in range(2):
        segment = stream[:, 20 * k : 20 * k + 20].clone()
        for row, length in enumerate(lengths[:, k]):
            segment[row, length:] = math.nan
        state, _ = made(segment, state, lengths=lengths[:, k])
    assert state is not None
    for row, (first, second) in enumerate(lengths.tolist()):
        joined = torch.cat((stream[row, :first], stream[row, 20 : 20 + second]))[None]
        (expected,) = rows_after(
            made,
            joined,
            torch.zeros(1, joined.size(1), dtype=torch.bool),
            lengths[row : row + 1].sum(1),
        )
        assert state.steps[row] == first + second
        torch.testing.assert_close(
            remembered(made, state, row), torch.stack(expected.slots()), rtol=1e-12, atol=1e-12
        )


def test_a_reset_of_a_row_is_one_at_its_first_step() -> None:
    made, before = memory("max"), torch.randn(2, 30, WIDTH, **double)
    segment = torch.randn(2, 12, WIDTH, **double)
    state, _ = made(before)
    reset = torch.tensor([True, False])
    steps = torch.zeros(2, 12, dtype=torch.bool)
    steps[:, 0] = reset
    for a, b in zip(
        made(segment, state, reset=reset)[0], made(segment, state, reset=steps)[0], strict=True
    ):
        assert torch.equal(a, b)


def test_most_used_keeps_what_was_attended_to() -> None:
    made, stream = memory("most_used"), torch.randn(1, KEPT + RATIO, WIDTH, **double)
    weights = torch.zeros(1, KEPT + RATIO, made.slots + KEPT + RATIO, **double)
    weights[0, :, made.slots + 2] = 1.0  # all look at step 2, which steps 2.. may see
    state, compression = made(stream, weights=weights)
    assert compression.valid.sum() == 1
    assert torch.equal(remembered(made, state, 0)[0], stream[0, 2])
    # One step at a time: what a vector got while it was in the memory counts still.
    state = None
    for t in range(KEPT + RATIO):
        weights = torch.zeros(1, 1, made.slots + 1, **double)
        if t > 1:
            weights[0, 0, made.slots - (t - 1)] = 1.0  # at step 1, wherever it is by now
        state, _ = made(stream[:, t : t + 1], state, weights=weights)
    assert torch.equal(remembered(made, state, 0)[0], stream[0, 1])


def test_most_used_counts_beyond_what_bfloat16_can() -> None:
    made, one = memory("most_used").bfloat16(), torch.zeros(1, 1, WIDTH, dtype=torch.bfloat16)
    weights = torch.full((1, 1, made.slots + 1), 0.25, dtype=torch.bfloat16)
    state, _ = made(one, weights=weights)
    many = torch.where(state.asked > 0, 256.0, 0.0)
    state, _ = made(one, state._replace(asked=many, received=many), weights=weights)
    assert state.asked.max() == 257 and state.received.max() == 256.25
    assert state.memory.dtype == torch.bfloat16


@pytest.mark.parametrize("function", ["mean", "conv", "most_used"])
def test_attention_is_a_softmax_over_what_is_remembered(function: str) -> None:
    made = attention(function=function)
    stream = torch.randn(2, 36, WIDTH, **double)
    reset = torch.zeros(2, 36, dtype=torch.bool)
    reset[1, 17] = True
    state, parts = None, [9, 9, 9, 9]
    for k, segment in enumerate(stream.split(parts, 1)):
        cut = reset[:, 9 * k : 9 * k + 9]
        before = state if state is not None else made.init_state(segment)
        output, state, weights = made(segment, state, reset=cut, average_attn_weights=False)
        assert weights is not None
        for row in range(2):
            past = remembered(made.memory, before, row)
            for t in range(9):
                if cut[row, : t + 1].any():
                    start = int(cut[row, : t + 1].nonzero().max())
                    seen = segment[row, start : t + 1]
                else:
                    seen = torch.cat((past, segment[row, : t + 1]))
                expected, probabilities = dense(made, segment[row, t], seen)
                torch.testing.assert_close(output[row, t], expected, rtol=1e-10, atol=1e-10)
                given = weights[row, :, t][weights[row, :, t] != 0]
                torch.testing.assert_close(given, probabilities.flatten(), rtol=1e-10, atol=1e-10)


def dense(made: sf.CompressiveAttention, query: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """One query [E] over vectors [S, E], by hand: its output [E] and weights [H, S]."""
    q_weight, k_weight, v_weight = made.in_proj_weight.chunk(3)
    assert made.in_proj_bias is not None
    q_bias, k_bias, v_bias = made.in_proj_bias.chunk(3)
    split = (made.num_heads, -1)
    q = (q_weight @ query + q_bias).view(split)
    k = (seen @ k_weight.T + k_bias).unflatten(1, split)
    v = (seen @ v_weight.T + v_bias).unflatten(1, split)
    weights = torch.einsum("he,she->hs", q, k).div(q.size(1) ** 0.5).softmax(1)
    return made.out_proj(torch.einsum("hs,she->he", weights, v).flatten()), weights


def test_padding_reaches_nothing() -> None:
    made, lengths = attention(), torch.tensor([9, 4])
    clean = torch.randn(2, 9, WIDTH, **double)
    spoilt = clean.clone()
    spoilt[1, 4:] = math.nan
    (a, state_a, _), (b, state_b, _) = (made(x, lengths=lengths) for x in (clean, spoilt))
    assert torch.equal(a, b) and not a[1, 4:].any()
    assert all(torch.equal(x, y) for x, y in zip(state_a, state_b, strict=True))


def test_no_gradient_reaches_an_earlier_segment() -> None:
    made = attention(function="conv", trained_by="task")
    first = torch.randn(1, 20, WIDTH, requires_grad=True, **double)
    _, state, _ = made(first)
    output, _, _ = made(torch.randn(1, 3, WIDTH, **double), state)
    assert made.memory.conv is not None
    of_first, of_conv = torch.autograd.grad(
        output.sum(), (first, made.memory.conv.weight), allow_unused=True
    )
    assert of_first is None
    assert of_conv.abs().sum() > 0


@pytest.mark.slow
def test_reconstruction_trains_the_convolution_alone() -> None:
    made = attention(function="conv")
    nn.init.normal_(made.memory.conv.weight)  # type: ignore[union-attr]
    x = torch.randn(2, 30, WIDTH, requires_grad=True, **double)
    _, state, _ = made(x)
    assert not state.compressed.requires_grad
    first = made.reconstruction_loss()
    found = torch.autograd.grad(first, (x, *made.parameters()), allow_unused=True)
    names = ["x", *(name for name, _ in made.named_parameters())]
    reached = {name for name, g in zip(names, found, strict=True) if g is not None and g.any()}
    assert reached == {"memory.conv.weight", "memory.conv.bias"}
    optimizer = torch.optim.Adam(made.memory.parameters(), 0.02)
    for _ in range(100):
        made(x.detach())
        loss = made.reconstruction_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * first


def test_reconstruction_of_equal_vectors_costs_nothing() -> None:
    made = attention()
    made(torch.randn(2, 1, WIDTH, **double).expand(2, 30, WIDTH))
    torch.testing.assert_close(made.reconstruction_loss(), torch.zeros((), **double))
    made(torch.randn(2, 4, WIDTH, **double))  # nothing leaves the memory
    assert made.reconstruction_loss() == 0


@pytest.mark.slow
@pytest.mark.parametrize("function", ["mean", "conv", "most_used"])
def test_compiles_in_one_graph(function: str) -> None:
    torch.compiler.reset()
    made = attention(function=function)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 11, WIDTH, **double)
    state = made(torch.randn(2, 20, WIDTH, **double))[1].detach()
    reset, lengths = torch.rand(2, 11) < 0.1, torch.tensor([11, 6])
    for a, b in zip(
        torch.utils._pytree.tree_leaves(made(x, state, reset=reset, lengths=lengths)),
        torch.utils._pytree.tree_leaves(compiled(x, state, reset=reset, lengths=lengths)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_copies_pickles_and_kept_states() -> None:
    made = attention(function="conv", trained_by="task")
    x = torch.randn(2, 30, WIDTH, **double)
    output, state, _ = made(x)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(copied(x)[0], output)
    file = io.BytesIO()
    torch.save(state.detach()._asdict(), file)
    file.seek(0)
    again = CompressiveState(**torch.load(file, weights_only=True))
    assert torch.equal(made(x, again)[0], made(x, state)[0])


def test_float32_bfloat16_and_dropout() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        made = sf.CompressiveAttention(8, 2, 4, 2, 3, dropout=0.5, dtype=dtype)
        output, state, weights = made(torch.randn(2, 20, 8, dtype=dtype), need_weights=False)
        assert weights is None and output.dtype == state.memory.dtype == dtype
        assert output.isfinite().all()
        assert torch.equal(made.eval()(output)[0], made(output)[0])


X = torch.zeros(2, 7, WIDTH, **double)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": X[0]}, ValueError, r"expected input of shape \[B, T, 6\], got \[7, 6\]"),
    ({"input": X[..., :5]}, ValueError, r"expected input of shape \[B, T, 6\], got \[2, 7, 5\]"),
    ({"lengths": torch.ones(3).long()}, ValueError, r"expected lengths of shape \[2\], got \[3\]"),
    ({"lengths": torch.ones(2)}, TypeError, "expected lengths of int64 or int32"),
    ({"lengths": torch.tensor([8, 1])}, ValueError, "expected lengths in 0..7, got 8"),
    ({"reset": torch.ones(2, 7)}, TypeError, "expected reset of torch.bool"),
    ({"reset": torch.ones(2, 6) > 0}, ValueError, r"expected reset of shape \[2\] or \[2, 7\]"),
    ({"state": attention().init_state(X[:1])}, ValueError, r"expected steps of shape \[2\]"),
    ({"state": attention().init_state(X.float())}, TypeError, "expected memory of torch.float64"),
    ({"input": X.float()}, TypeError, "expected input of the parameters' dtype torch.float64"),
]


@pytest.mark.parametrize("change, error, message", WRONG)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="seqmem::compressive_attention: " + message):
        attention()(**{"input": X, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"memory_size": 0}, "memory_size > 0, got 0"),
        ({"ratio": -1}, "ratio > 0, got -1"),
        ({"function": "sum"}, "function as one of"),
        ({"trained_by": "luck"}, "trained_by as one of"),
    ],
)
def test_refuses_sizes(change: dict[str, Any], message: str) -> None:
    given = {"dim": WIDTH, "memory_size": 2, "compressed_size": 2, **change}
    with pytest.raises(ValueError, match=f"seqmem::compressive_memory: expected {message}"):
        sf.CompressiveMemory(**given)
    with pytest.raises(ValueError, match="embed_dim > 0 that num_heads > 0 divides, got 6 and 4"):
        attention(heads=4)
    with pytest.raises(ValueError, match=r"expected weights of shape \[1, 3, 14\], got None"):
        memory("most_used")(X[:1, :3])
