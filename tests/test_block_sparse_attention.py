"""Block-sparse attention: the inherited suites, its dense twin, and edges of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hostile_suite import Bad, HostileSuite, Target
from op_suite import (
    Case,
    Function,
    OpSuite,
    Threaded,
    check_against_float64,
    check_nothing_left_over,
    check_same_bits_at_any_thread_count,
    compare,
    differentiable,
    values_and_gradients,
)
from peak_memory import growth_mib
from torch import Tensor

import seqmem_fast as sf
from seqmem_fast import ops
from seqmem_fast.reference import block_sparse_attention as reference
from seqmem_fast.reference.common import ALPHAS, Sample

SEED = torch.tensor([2**40 + 3])  # of dropout
NAMES = [sample.name for sample in reference.sample_inputs()]
OPTIONS: dict[str, Any] = {
    "is_causal": False,
    "key_end": None,
    "scale": None,
    "normalizer": "softmax",
    "alpha": 1.5,
    "dropout": 0.0,
    "seed": None,
}


def op_options(sample: Sample) -> list[Any]:
    """What the op in the dispatcher takes after the block's sizes."""
    *options, normalizer, alpha, dropout, seed = {**OPTIONS, **sample.kwargs}.values()
    return [*options, ALPHAS.get(normalizer, alpha), dropout, seed]


def case_of(sample: Sample) -> Case:
    """q, k, v and key_end by position; in some samples rows have lists of their own."""
    q, k, v, blocks, block = sample.args
    options = {**OPTIONS, **sample.kwargs}
    end = options.pop("key_end")

    def bind(function: Any) -> Function:
        def call(q: Tensor, k: Tensor, v: Tensor, end: Tensor | None) -> tuple[Tensor, ...]:
            return tuple(function(q, k, v, blocks, block, key_end=end, **options))

        return call

    both = bind(ops.block_sparse_attention), bind(reference.block_sparse_attention)
    rows = None if blocks.size(0) > 1 else 0
    return Case(
        *both, (q, k, v, end), (rows, rows, rows, None if end is None else rows), (rows,) * 2
    )


def plain_case(*sizes: int, dtype: torch.dtype = torch.float32, name: str = "shared") -> Case:
    """sizes = (B, Hk, Tq, Tk, D, Dv)."""
    samples = reference.sample_inputs(dtype=dtype, sizes=sizes)  # type: ignore[arg-type]
    return case_of(next(s for s in samples if s.name == name))


def block_case(
    sizes: tuple[int, ...],
    block: tuple[int, int],
    dtype: torch.dtype,
    lists: tuple[int, ...] = (),
    share: float = 0.5,
    **options: Any,
) -> Case:
    """sizes = (B, Hq, Hk, Tq, Tk, D, Dv); lists: of the mask's dimensions before the grid's."""
    batch, heads, key_heads, queries, keys, width, values = sizes
    generator = torch.Generator().manual_seed(3)
    shapes = (heads, queries, width), (key_heads, keys, width), (key_heads, keys, values)
    operands = (torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes)
    grid = [-(-n // size) for n, size in zip((queries, keys), block, strict=True)]
    mask = torch.rand(*lists, *grid, generator=generator) < share
    return case_of(Sample("own", (*operands, ops.block_list(mask), block), options))


def threaded() -> Threaded:
    """Calls below and above the size at which one takes several threads."""
    cases = [plain_case(*sizes) for sizes in ((1, 1, 3, 9, 8, 8), (2, 2, 200, 200, 32, 32))]
    cases.append(block_case((2, 2, 1, 300, 300, 32, 32), (32, 40), torch.float32, is_causal=True))
    return [(case.op, case.tensors) for case in cases]


class TestBlockSparseAttention(OpSuite):
    names = NAMES

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        sizes = (2, 1, 3, 4, 2, 2) if tiny else (3, 2, 6, 7, 4, 5)
        return plain_case(*sizes, dtype=dtype, name=name)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        sample = next(s for s in reference.sample_inputs(dtype=torch.float64) if s.name == name)
        *tensors, block = sample.args
        inputs = (*tensors, *block, *op_options(sample))
        outputs = torch.ops.seqmem.block_sparse_attention(*inputs, True)
        seeds = tuple(map(torch.ones_like, outputs))
        leaves = tuple(differentiable(inputs[:3]))
        return [
            (torch.ops.seqmem.block_sparse_attention.default, (*leaves, *inputs[3:], True)),
            (
                torch.ops.seqmem.block_sparse_attention_backward.default,
                (*seeds, *inputs, outputs[1], [True] * 3),
            ),
        ]


# (B, Hq, Hk, Tq, Tk, D, Dv), block: around the widths of vectors, panels and tiles.
SIZES = [
    *(((1, 1, 1, 70, 70, 5, 3), (16, n)) for n in (1, 7, 8, 9, 31, 32, 33, 69, 70, 200)),
    *(((1, 1, 1, 70, 70, 5, 3), (n, 16)) for n in (1, 31, 32, 33, 64, 65, 69, 70, 200)),
    *(((2, 2, 1, n, n, 4, 4), (16, 16)) for n in (1, 2, 15, 16, 17, 33)),
    *(((1, 1, 1, 40, 40, width, width), (8, 8)) for width in (1, 7, 8, 9, 33, 65)),
    ((1, 2, 1, 300, 300, 8, 8), (64, 64)),
    ((1, 1, 1, 9, 500, 4, 4), (4, 20)),
    ((1, 1, 1, 500, 9, 4, 4), (20, 4)),
    ((1, 4, 2, 30, 30, 4, 0), (8, 8)),
]


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize(("sizes", "block"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sizes(sizes: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype) -> None:
    check_against_float64(block_case(sizes, block, dtype))


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("lists", [(), (4,), (2, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_lists_of_heads_and_rows(
    lists: tuple[int, ...], share: float, restored_threads: None
) -> None:
    end = torch.tensor([33, 90])
    options: dict[str, Any] = {"is_causal": True, "key_end": end}
    for dtype in (torch.float64, torch.float16):
        check_against_float64(
            block_case((2, 4, 2, 90, 100, 8, 8), (20, 24), dtype, lists, share, **options)
        )
    check_same_bits_at_any_thread_count(
        block_case((2, 4, 2, 90, 100, 8, 8), (20, 24), torch.float32, lists, share)
    )


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("alpha", [1.05, 1.3, "entmax15", "sparsemax"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_normalizers(alpha: float | str, dtype: torch.dtype, restored_threads: None) -> None:
    """Scores spread wide enough that many weights are zero; rows without keys among them."""
    named = isinstance(alpha, str)
    options = {"normalizer": alpha} if named else {"normalizer": "entmax", "alpha": alpha}
    options |= {"scale": 1.5}
    for end in (None, torch.tensor([0, 70])):
        case = block_case((2, 2, 1, 90, 90, 8, 8), (20, 12), dtype, (2,), **options, key_end=end)
        check_against_float64(case)
        check_same_bits_at_any_thread_count(case)


@pytest.mark.isa
@pytest.mark.parametrize("each", [False, True])
def test_ends_of_keys(each: bool) -> None:
    """Any integers; no keys and more than there are, too."""
    generator = torch.Generator().manual_seed(5)
    end = torch.randint(-20, 110, (4, 90) if each else (4,), generator=generator)
    for dtype in (torch.float64, torch.float32):
        options = {"key_end": end.int(), "is_causal": each}
        check_against_float64(block_case((4, 2, 1, 90, 90, 8, 8), (16, 12), dtype, **options))


def test_a_mask_is_its_list_and_the_weights_are_dense_attention() -> None:
    case = block_case((2, 4, 2, 50, 60, 8, 8), (16, 20), torch.float64)
    q, k, v, _ = case.tensors
    block = (16, 20)
    for lists in ((), (4,), (2, 4), (1, 4), (2, 1)):
        mask = torch.rand(*lists, 4, 3) < 0.6
        mask[..., 0] = True
        output, weights = ops.block_sparse_attention(q, k, v, mask, block)
        listed = ops.block_list(mask)
        again, _ = ops.block_sparse_attention(q, k, v, listed, block)
        assert torch.equal(output, again) and weights.shape[2] == listed.size(2)
        if lists == ():
            assert torch.equal(listed[0, 0], mask.nonzero())
        seen = mask.repeat_interleave(16, -2).repeat_interleave(20, -1)[..., :50, :]
        group = (x.repeat_interleave(2, 1) for x in (k, v))
        expected, dense = ops.attention(q, *group, seen)
        torch.testing.assert_close(output, expected)
        for given in (mask, listed):
            torch.testing.assert_close(ops.dense_weights(weights, given, block, 50, 60), dense)


def test_the_mask_is_checked() -> None:
    q, k, v = block_case((1, 2, 2, 50, 60, 8, 8), (16, 20), torch.float32).tensors[:3]
    with pytest.raises(ValueError, match=r"expected blocks of shape \[..., 4, 3\], got \[4, 4\]"):
        ops.block_sparse_attention(q, k, v, torch.ones(4, 4).bool(), (16, 20))
    with pytest.raises(ValueError, match=r"weights of shape \[B, Hq, 12, 16, 20\], got \[1, 2, 9"):
        weights = torch.zeros(1, 2, 9, 16, 20)
        ops.dense_weights(weights, torch.ones(4, 3).bool(), (16, 20), 50, 60)
    for wrong in (16, (16,), [16, 20, 4]):
        with pytest.raises(TypeError, match=r"block of two sizes, \(Bq, Bk\), got"):
            ops.block_sparse_attention(q, k, v, torch.ones(4, 3).bool(), wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="key_end to be a tensor, got list"):
        mask = torch.ones(4, 3).bool()
        ops.block_sparse_attention(q, k, v, mask, (16, 20), key_end=[9])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_mask with 2, 3 or 4 dimensions"):
        ops.block_list(torch.ones(4).bool())
    with pytest.raises(TypeError, match="block_mask of dtype bool"):
        ops.block_list(torch.ones(4, 4))


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_is_left_over_from_an_earlier_call(threads: int, restored_threads: None) -> None:
    torch.set_num_threads(threads)
    for sizes, block in (((2, 2, 1, 9, 8, 6, 3), (4, 3)), ((1, 2, 2, 130, 120, 9, 11), (33, 17))):
        larger = block_case((*sizes[:3], *(n + 60 for n in sizes[3:])), (40, 40), torch.float32)
        check_nothing_left_over(block_case(sizes, block, torch.float32), larger)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dropout(dtype: torch.dtype, restored_threads: None) -> None:
    options: dict[str, Any]
    for lists, options in (
        ((4,), {"is_causal": True, "key_end": torch.tensor([70, 0])}),
        ((), {"normalizer": "sparsemax"}),
    ):
        sizes = (2, 4, 2, 70, 75, 5, 3)
        case = block_case(sizes, (20, 17), dtype, lists, **options, dropout=0.3, seed=SEED)
        check_against_float64(case)
        check_same_bits_at_any_thread_count(case)


@pytest.mark.isa
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spoilt", ["q", "k", "v", "grad"])
def test_bad_values_reach_only_what_sees_them(spoilt: str, bad: float) -> None:
    """One bad row among good ones: what does not see it keeps its bits, in its own block too."""
    case = block_case((1, 1, 1, 80, 80, 9, 9), (16, 16), torch.float32, is_causal=True, share=1)
    seeds = [torch.randn_like(o) for o in case.op(*case.tensors)]

    def run(tensors: tuple[Tensor, ...], seeds: list[Tensor]) -> list[Tensor]:
        leaves = differentiable(tensors)
        outputs = case.op(*leaves)
        return [
            outputs[0].detach(),
            *torch.autograd.grad(outputs, leaves[:3], seeds),
        ]

    clean = run(case.tensors, seeds)
    tensors, bad_seeds = [t if t is None else t.clone() for t in case.tensors], list(seeds)
    if spoilt == "grad":
        bad_seeds[0] = seeds[0].clone()
        bad_seeds[0][0, 0, 40, 4] = bad
    else:
        tensors["qkv".index(spoilt)][0, 0, 40, 4] = bad
    found = run(tuple(tensors), bad_seeds)
    # Query 40 sees keys 0..40; key 40 is seen by queries 40..79, which see all keys.
    queries = slice(40, 41) if spoilt in ("q", "grad") else slice(40, 80)
    keys = slice(0, 41) if spoilt in ("q", "grad") else slice(0, 80)
    for a, b, limit in zip(found, clean, [queries] * 2 + [keys] * 2, strict=True):
        outside = torch.ones(80, dtype=torch.bool)
        outside[limit] = False
        assert torch.equal(a[..., outside, :], b[..., outside, :])
    assert any(not torch.isfinite(t).all() for t in found)


def test_padding_may_hold_anything() -> None:
    end = torch.tensor([50, 33])
    case = block_case((2, 2, 1, 50, 50, 8, 8), (16, 16), torch.float32, key_end=end)
    q, k, v, _ = case.tensors
    expected = values_and_gradients(case.op, (q, k, v, end))
    k, v = k.clone(), v.clone()
    k[1, :, 33:], v[1, :, 33:] = float("nan"), float("inf")
    for a, b in zip(values_and_gradients(case.op, (q, k, v, end)), expected, strict=True):
        assert torch.equal(a, b)


def test_rows_without_keys_are_zero_and_teach_nothing() -> None:
    q, k, v = block_case((1, 1, 1, 12, 12, 4, 4), (4, 4), torch.float32).tensors[:3]
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]]).bool()

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return ops.block_sparse_attention(*tensors, mask, (4, 4), key_end=torch.tensor([9]))  # type: ignore[return-value]

    output, weights, *grads = values_and_gradients(call, (q, k, v))
    assert not output[0, 0, 4:8].any() and output[0, 0, :4].any(-1).all()
    assert not grads[0][0, 0, 4:8].any() and not grads[2][0, 0, 9:].any()
    torch.testing.assert_close(weights[0, 0, :2].sum((0, -1)), torch.ones(4))
    torch.testing.assert_close(output[0, 0, 8:], v[0, 0, 8].expand(4, -1))


def test_without_weights() -> None:
    case = block_case((2, 2, 1, 40, 40, 8, 8), (8, 8), torch.float32)
    q, k, v = differentiable(case.tensors[:3])
    mask = torch.rand(5, 5) < 0.5
    expected, _ = ops.block_sparse_attention(q, k, v, mask, (8, 8))
    output, none = ops.block_sparse_attention(q, k, v, mask, (8, 8), return_weights=False)
    assert none is None and torch.equal(output, expected)
    ours, theirs = (torch.autograd.grad(o.sum(), (q, k, v)) for o in (output, expected))
    assert all(map(torch.equal, ours, theirs))
    with torch.no_grad():
        output, _ = ops.block_sparse_attention(q, k, v, mask, (8, 8), return_weights=False)
        _, weights = torch.ops.seqmem.block_sparse_attention(
            q, k, v, ops.block_list(mask), 8, 8, False, None, None, 1.0, 0.0, None, False
        )
    assert torch.equal(output, expected) and weights.numel() == 0


EMPTY = [(2, 2, 1, 0, 5, 4, 3), (2, 2, 1, 5, 0, 4, 3), (2, 0, 1, 5, 5, 4, 3), (0, 2, 1, 5, 5, 4, 3)]


@pytest.mark.sanitize
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty(sizes: tuple[int, ...]) -> None:
    case = block_case(sizes, (2, 3), torch.float64, share=1.0)
    compare(case.op, case.reference, case.tensors, case.tensors)
    output, _ = case.op(*case.tensors)
    assert output.shape == (*sizes[:2], sizes[3], sizes[6]) and not output.any()
    none = torch.full((1, 1, 3, 2), -1)
    for call in (ops, reference):
        output, weights = call.block_sparse_attention(*case.tensors[:3], none, (2, 3))  # type: ignore[attr-defined]
        assert weights.shape == (*sizes[:2], 3, 2, 3)
        assert not weights.any() and not output.any()


@pytest.mark.slow
def test_memory_grows_with_the_blocks_alone() -> None:
    """A training step at T = 16,384 and 2 heads: a score for each pair would take 2 GiB."""
    definitions = """
import torch
from seqmem_fast import ops

def step(steps):
    q, k, v = (torch.randn(1, 2, steps, 32).requires_grad_() for _ in range(3))
    blocks = torch.eye(steps // 8 if steps < 64 else steps // 64).bool()
    block = (8, 8) if steps < 64 else (64, 64)
    output, weights = ops.block_sparse_attention(q, k, v, blocks, block)
    (output.sum() + weights.square().sum()).backward()
"""
    # The weights, their square, gradients and slopes are 8 MiB each.
    assert growth_mib(definitions, "step(8)", "step(16384)") < 120


def test_module() -> None:
    torch.manual_seed(0)
    layer = sf.BlockSparseAttention(16, 4, (8, 8), batch_first=True, is_causal=True)
    x = torch.randn(2, 30, 16)
    mask = torch.ones(4, 4).bool().tril()
    output, weights = layer(x, x, x, mask, key_end=torch.tensor([30, 20]))
    assert weights.shape == (2, 4, 10, 8, 8)
    whole = sf.Attention(16, 4, batch_first=True)
    whole.load_state_dict(layer.state_dict())
    causal = torch.ones(30, 30).bool().triu(1)
    padding = torch.arange(30) >= torch.tensor([[30], [20]])
    expected, dense = whole(x, x, x, padding, attn_mask=causal, average_attn_weights=False)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(ops.dense_weights(weights, mask, (8, 8), 30, 30), dense)
    first = sf.BlockSparseAttention(16, 4, (8, 8), is_causal=True)
    first.load_state_dict(layer.state_dict())
    y = x.transpose(0, 1)
    other, none = first(y, y, y, mask, torch.tensor([30, 20]), need_weights=False)
    assert none is None
    torch.testing.assert_close(other.transpose(0, 1), output)
    with pytest.raises(ValueError, match="query with 3 dimensions"):
        layer(x[0], x[0], x[0], mask)
    assert "block=(8, 8), is_causal=True" in repr(layer)


# ---- wrong arguments

B, HQ, HK, TQ, TK, D, DV = 2, 4, 2, 3, 5, 6, 7
z = torch.zeros
LIST = torch.tensor([[0, 0], [0, 1], [1, 1]])[None, None]


def arguments() -> dict[str, Any]:
    return {
        "q": z(B, HQ, TQ, D),
        "k": z(B, HK, TK, D),
        "v": z(B, HK, TK, DV),
        "blocks": LIST.clone(),
        "block": (2, 3),
        "key_end": torch.full((B, TQ), TK, dtype=torch.int32),
    }


def listed(*pairs: tuple[int, int]) -> dict[str, Tensor]:
    return {"blocks": torch.tensor(pairs)[None, None]}


ROWS = [
    Bad("q 3-D", {"q": z(HQ, TQ, D)}, ValueError, "q with 4 dimensions"),
    Bad("q features", {"q": z(B, HQ, TQ, D + 1)}, ValueError, r"k of shape \[2, 2, 5, 7\]"),
    Bad("q no features", {"q": z(B, HQ, TQ, 0)}, ValueError, "at least one feature"),
    Bad("q heads", {"q": z(B, 3, TQ, D)}, ValueError, "a multiple of k's 2 heads, got 3"),
    Bad("q integer", {"q": z(B, HQ, TQ, D).int()}, TypeError, "q of dtype float32"),
    Bad("q double", {"q": z(B, HQ, TQ, D).double()}, TypeError, "k of q's dtype Double"),
    Bad("q sparse", {"q": z(B, HQ, TQ, D).to_sparse()}, TypeError, "q to be a dense"),
    Bad("k no heads", {"k": z(B, 0, TK, D)}, ValueError, "k with at least one head"),
    Bad("k half", {"k": z(B, HK, TK, D).half()}, TypeError, "k of q's dtype Float, got Half"),
    Bad("v keys", {"v": z(B, HK, TK + 1, DV)}, ValueError, r"v of shape \[2, 2, 5, 7\]"),
    Bad("v dtype", {"v": z(B, HK, TK, DV).bfloat16()}, TypeError, "v of q's dtype"),
    Bad("blocks 2-D", {"blocks": LIST[0, 0]}, ValueError, "blocks with 4 dimensions"),
    Bad("blocks triples", {"blocks": z(1, 1, 3, 3).long()}, ValueError, r"shape \[1, 1, 3, 2\]"),
    Bad("blocks rows", {"blocks": LIST.expand(3, 1, 3, 2)}, ValueError, r"shape \[2, 1, 3, 2\]"),
    Bad("blocks heads", {"blocks": LIST.expand(1, 2, 3, 2)}, ValueError, r"shape \[1, 4, 3, 2\]"),
    Bad("blocks int", {"blocks": LIST.int()}, TypeError, "blocks of dtype int64"),
    Bad("blocks float", {"blocks": LIST.float()}, TypeError, "blocks of dtype int64"),
    Bad("blocks sparse", {"blocks": LIST.to_sparse()}, TypeError, "blocks to be a dense"),
    Bad("no such row", listed((0, 0), (2, 0)), ValueError, r"exist.*got \(2, 0\) at place 1", True),
    Bad("no such column", listed((0, 2), (1, 0)), ValueError, r"got \(0, 2\) at place 0", True),
    Bad("negative", listed((0, 0), (1, -1)), ValueError, r"got \(1, -1\) at place 1", True),
    Bad("far", listed((0, 0), (1, 2**62)), ValueError, "got .1, 4611686018427387904. at", True),
    Bad("order", listed((1, 0), (0, 1)), ValueError, r"in order.*got \(0, 1\)", True),
    Bad("order in a row", listed((1, 1), (1, 0)), ValueError, r"in order.*got \(1, 0\)", True),
    Bad("twice", listed((0, 0), (0, 0)), ValueError, r"in order.*got \(0, 0\) at place 1", True),
    Bad("after none", listed((-1, -1), (0, 0)), ValueError, r"then none .*got \(0, 0\)", True),
    Bad("block", {"block": (2, 0)}, ValueError, "block of two sizes in 1..1048576, got 0"),
    Bad("block large", {"block": (2**40, 3)}, ValueError, "block of two sizes in 1"),
    Bad("alpha", {"normalizer": "entmax", "alpha": 1.0}, ValueError, "1 < alpha", in_python=True),
    Bad(
        "dropout", {"dropout": 1.5, "seed": z(1).long()}, ValueError, r"dropout in 0\.\.1, got 1.5"
    ),
    Bad("seed type", {"dropout": 0.5, "seed": z(1)}, TypeError, "seed of dtype int64"),
    Bad("seeds", {"dropout": 0.5, "seed": z(2).long()}, ValueError, r"seed of shape \[1\]"),
    Bad("end dtype", {"key_end": z(B)}, TypeError, "key_end of dtype int64 or int32"),
    Bad("end rows", {"key_end": z(B + 1).int()}, ValueError, r"key_end of shape \[2\]"),
    Bad("end queries", {"key_end": z(B, TK).int()}, ValueError, r"key_end of shape \[2, 3\]"),
]


def call(**given: Any) -> tuple[Tensor | None, ...]:
    return ops.block_sparse_attention(**given)


class TestWrongArguments(HostileSuite):
    targets = (
        Target(
            "block_sparse_attention",
            call,
            arguments,
            ROWS,
            ({}, {"return_weights": False}, {"is_causal": True}),
        ),
    )
