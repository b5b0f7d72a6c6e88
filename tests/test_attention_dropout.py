"""Dropout, and a learned alpha, of the attentions that see some keys: what all of them promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import seqmem_fast as sf
from seqmem_fast import ops

MASK = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [1, 1, 1, 1]]).bool()
INDEX = torch.arange(60)[:, None] // 5 % 7 + 7 * torch.arange(8)
KINDS = ("window", "blocks", "indexed", "top_k")


def attend(kind: str, q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, ...]:
    """The output and dense weights [B, Hq, Tq, Tk], q [B, Hq, 60, D]."""
    given: dict[str, object] = {"scale": 0.1, **options}
    if kind == "blocks":
        block = 15, 15
        output, weights = ops.block_sparse_attention(q, k, v, MASK, block, **given)  # type: ignore[arg-type]
        assert weights is not None
        return output, ops.dense_weights(weights, MASK, block, 60, 60)
    dense = q.new_zeros(*q.shape[:3], 60)
    if kind == "window":
        output, weights, far = ops.window_attention(q, k, v, 59, 59, global_keys=3, **given)  # type: ignore[arg-type]
        assert weights is not None and far is not None
        column = torch.arange(60) - torch.arange(60)[:, None] + 59
        dense = weights.gather(3, column.expand(dense.shape))
        return output, torch.cat((far, dense[..., 3:]), 3)
    if kind == "indexed":
        output, weights = ops.indexed_attention(q, k, v, INDEX[None, None], **given)  # type: ignore[arg-type]
        index = INDEX.expand(*q.shape[:3], -1)
    else:
        output, weights, index = ops.top_k_attention(q, k, v, 30, **given)  # type: ignore[arg-type]
    assert weights is not None
    return output, dense.to(weights.dtype).scatter(3, index, weights)


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 60, 8), (2, 2, 60, 8), (2, 2, 60, 6)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
                 for shape in shapes)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_weights_come_back_and_are_what_met_the_values(kind: str) -> None:
    q, k, v = operands()
    _, whole = attend(kind, q, k, v)
    output, weights = attend(kind, q, k, v, dropout=0.25, seed=7)
    there, gone = whole > 0, (weights == 0) & (whole > 0)
    torch.testing.assert_close(weights, torch.where(gone, 0, whole / 0.75))
    torch.testing.assert_close(output, weights @ v.repeat_interleave(2, 1))
    share = gone.sum() / there.sum()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / int(there.sum())) ** 0.5
    # Neighbouring rows, heads and batches drop others: two meet as often as chance has it.
    for dim in range(3):
        both = there.narrow(dim, 1, there.size(dim) - 1) & there.narrow(dim, 0, there.size(dim) - 1)
        pairs = gone.narrow(dim, 1, gone.size(dim) - 1) & gone.narrow(dim, 0, gone.size(dim) - 1)
        assert abs(pairs[both].double().mean() - 0.0625) < 5 * (0.0586 / int(both.sum())) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_and_the_place_alone_decide(kind: str, restored_threads: None) -> None:
    q, k, v = operands(torch.float32)
    given = attend(kind, q, k, v, dropout=0.5, seed=torch.tensor([3]))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again = attend(kind, q, k, v, dropout=0.5, seed=3)
        assert all(map(torch.equal, again, given))
    other = attend(kind, q + 1, k, v * 2, dropout=0.5, seed=3)[1]
    if kind != "top_k":  # whose list has changed
        assert torch.equal(other == 0, given[1] == 0)
        half = attend(kind, q.half(), k.half(), v.half(), dropout=0.5, seed=3)[1]
        assert torch.equal(half == 0, given[1] == 0)
    for seed in (4, 3 + 2**32, -3):
        assert not torch.equal(attend(kind, q, k, v, dropout=0.5, seed=seed)[1], given[1])
    torch.manual_seed(1)
    drawn = attend(kind, q, k, v, dropout=0.5)
    assert not torch.equal(attend(kind, q, k, v, dropout=0.5)[1], drawn[1])
    torch.manual_seed(1)
    assert all(map(torch.equal, attend(kind, q, k, v, dropout=0.5), drawn))


@pytest.mark.parametrize("kind", KINDS)
def test_none_and_all(kind: str) -> None:
    q, k, v = (t.requires_grad_() for t in operands())
    expected, none = attend(kind, q, k, v), attend(kind, q, k, v, dropout=0.0, seed=5)
    assert all(map(torch.equal, none, expected))
    output, weights = attend(kind, q, k, v, dropout=1.0)
    assert not output.any() and not weights.any()
    assert not any(g.any() for g in torch.autograd.grad(output.sum() + weights.sum(), (q, k, v)))
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"expected dropout in 0\.\.1, got"):
            attend(kind, q, k, v, dropout=wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_transformed(kind: str) -> None:
    q, k, v = operands()

    def loss(q: Tensor) -> Tensor:
        output, weights = attend(kind, q, k, v, dropout=0.3, seed=11)
        return output.square().sum() + weights.square().sum()

    leaf = q.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(q), expected)
    if kind == "blocks":  # a list of blocks is made outside
        return
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_learned_alpha(kind: str) -> None:
    """One for each head, beside dense attention with the same."""
    q, k, v = operands()
    alpha = torch.tensor([1.1, 1.4, 1.5, 2.0], dtype=torch.float64)[:, None, None]
    options = {"normalizer": "entmax", "scale": 0.7}
    seen = attend(kind, q, k, v)[1] > 0
    leaves = [t.clone().requires_grad_() for t in (q, k, v, alpha)]
    found = attend(kind, *leaves[:3], alpha=leaves[3], **options)
    group = [t.repeat_interleave(2, 1) for t in leaves[1:3]]
    mask = torch.where(seen, 0.0, -torch.inf).double()
    expected = ops.attention(
        leaves[0], *group, mask, scale=0.7, normalizer="entmax", alpha=leaves[3]
    )
    seeds = [torch.randn_like(t) for t in expected]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(o, leaves, seeds) for o in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    few = [t[:1, :, :60, :2].clone().requires_grad_() for t in leaves[:3]]

    def of_alpha(alpha: Tensor) -> Tensor:
        return attend(kind, *few, alpha=alpha, **options, dropout=0.2, seed=1)[0][:, :, ::20]

    inside = torch.tensor([1.2, 1.35, 1.5, 1.8], dtype=torch.float64)[:, None, None]
    assert torch.autograd.gradcheck(of_alpha, inside.requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        low = attend(kind, *(t.float() for t in (q, k, v)), alpha=alpha.float(), **options)
    assert low[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="expected k of shape"):
        attend(kind, q, k[:1], v, alpha=alpha, **options)
    with pytest.raises(TypeError, match="expected alpha to be a number with normalizer softmax"):
        attend(kind, q, k, v, alpha=alpha)


MODULES = {
    "window": lambda **o: sf.WindowAttention(16, 4, 9, 5, global_tokens=2, **o),
    "blocks": lambda **o: sf.BlockSparseAttention(16, 4, (15, 15), **o),
    "top_k": lambda **o: sf.TopKAttention(16, 4, 12, **o),
}


@pytest.mark.parametrize("kind", MODULES)
def test_modules(kind: str) -> None:
    """Dropout in training alone, and an alpha that is a parameter."""
    torch.manual_seed(0)
    plain = MODULES[kind](batch_first=True)
    alpha = nn.Parameter(torch.full((4, 1, 1), 1.5))
    thin = MODULES[kind](batch_first=True, dropout=0.5)
    thin.load_state_dict(plain.state_dict())
    more = (MASK,) if kind == "blocks" else ()
    x = torch.randn(2, 60, 16)
    expected, trained = plain(x, x, x, *more)[0], thin(x, x, x, *more)[0]
    assert not torch.allclose(trained, expected, atol=1e-3)
    torch.testing.assert_close(thin.eval()(x, x, x, *more)[0], expected)
    torch.manual_seed(4)
    first = thin.train()(x, x, x, *more)[0]
    torch.manual_seed(4)
    assert torch.equal(thin(x, x, x, *more)[0], first)
    learned = MODULES[kind](batch_first=True, normalizer="entmax", alpha=alpha)
    learned(x, x, x, *more)[0].square().sum().backward()
    assert (
        alpha.grad is not None
        and alpha.grad.any()
        and dict(learned.named_parameters())["alpha"] is alpha
    )


def test_lists_are_no_tensors() -> None:
    q, k, v = operands()
    for name in ("key_start", "key_end"):
        with pytest.raises(TypeError, match=f"window_attention: expected {name} to be a tensor"):
            ops.window_attention(q, k, v, 3, 0, **{name: [9, 9]})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="top_k_attention: expected key_end to be a tensor"):
        ops.top_k_attention(q, k, v, 3, key_end=[9, 9])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="indexed_attention: expected index to be a tensor, got"):
        ops.indexed_attention(q, k, v, [[0]])  # type: ignore[arg-type]
