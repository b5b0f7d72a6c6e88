"""Block-sparse attention: the inherited suites, its dense twin, and edges of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hostile_suite import Bad, HostileSuite, Target
from op_suite import (
    Case,
    Function,
    Threaded,
    check_against_float64,
    check_same_bits_at_any_thread_count,
    values_and_gradients,
)
from peak_memory import growth_mib
from sparse_attention_suite import (
    EMPTY,
    TK,
    TQ,
    WRONG_ENDS,
    WRONG_OPERANDS_AND_RULES,
    B,
    SparseAttentionSuite,
    check_dense_twin,
    right_operands,
    z,
)
from sparse_attentions import BLOCK_SPARSE, operands
from torch import Tensor

import seqmem_fast as sf
from seqmem_fast import ops
from seqmem_fast.reference.common import Sample


def case_of(sample: Sample) -> Case:
    """q, k, v and key_end by position; in some samples rows have lists of their own."""
    q, k, v, blocks, block = sample.args
    options = BLOCK_SPARSE.options(sample)
    end = options.pop("key_end")

    def bind(function: Any) -> Function:
        def call(q: Tensor, k: Tensor, v: Tensor, end: Tensor | None) -> tuple[Tensor, ...]:
            return tuple(function(q, k, v, blocks, block, key_end=end, **options))

        return call

    rows = None if blocks.size(0) > 1 else 0
    batch_in = (rows, rows, rows, None if end is None else rows)
    both = bind(BLOCK_SPARSE.run), bind(BLOCK_SPARSE.exact)
    return Case(*both, (q, k, v, end), batch_in, (rows,) * 2)


def block_sample(
    sizes: tuple[int, ...],
    block: tuple[int, int],
    dtype: torch.dtype,
    lists: tuple[int, ...] = (),
    share: float = 0.5,
    **options: Any,
) -> Sample:
    """sizes = (B, Hq, Hk, Tq, Tk, D, Dv); lists: of the mask's dimensions before the grid's."""
    generator = torch.Generator().manual_seed(3)
    grid = [-(-n // size) for n, size in zip(sizes[3:5], block, strict=True)]
    mask = torch.rand(*lists, *grid, generator=generator) < share
    return Sample("own", (*operands(sizes, dtype), ops.block_list(mask), block), options)


def block_case(*args: Any, **options: Any) -> Case:
    return case_of(block_sample(*args, **options))


def threaded() -> Threaded:
    own = block_case((2, 2, 1, 300, 300, 32, 32), (32, 40), torch.float32, is_causal=True)
    return [(case.op, case.tensors) for case in BLOCK_SPARSE.threaded(case_of, "shared", own)]


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


class TestBlockSparseAttention(SparseAttentionSuite):
    op = BLOCK_SPARSE
    names = BLOCK_SPARSE.names
    sizes = SIZES
    by_query = 1
    bound = staticmethod(case_of)
    seeing = staticmethod(block_sample)

    def some(self, sizes: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Iterator[Sample]:
        yield block_sample(sizes, (33, 17), dtype, share=0.8, **options)
        yield block_sample(sizes, (4, 3), dtype, (sizes[0], 1), **options)
        lists = sizes[1:2] if sizes[1] else ()
        end = torch.tensor([70, 0])[: sizes[0]]
        yield block_sample(
            sizes, (20, 12), dtype, lists, 0.8, key_end=end, is_causal=True, **options
        )

    def neighbours(self) -> tuple[Sample, Sequence[int], Sequence[int], Sequence[int]]:
        """Of blocks of 16, a query sees its own and the one before, up to its own key."""
        mask = torch.ones(5, 5).bool().tril().triu(-1)
        args = (*operands((1, 1, 1, 80, 80, 9, 9), torch.float32), ops.block_list(mask), (16, 16))
        sample = Sample("own", args, {"is_causal": True})
        return sample, range(16, 41), range(40, 64), range(16, 64)

    def padded(self) -> Sample:
        end = torch.tensor([50, 33])
        return block_sample((2, 2, 1, 50, 50, 8, 8), (16, 16), torch.float32, key_end=end)


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
    with pytest.raises(
        ValueError, match=r"blocks of shape \[4, 3\], \[2, 4, 3\] or .*got \[4, 4\]"
    ):
        ops.block_sparse_attention(q, k, v, torch.ones(4, 4).bool(), (16, 20))
    with pytest.raises(ValueError, match=r"or \[1, 2, 4, 3\], got \[3, 4, 3\]"):
        ops.block_sparse_attention(q, k, v, torch.ones(3, 4, 3).bool(), (16, 20))
    with pytest.raises(ValueError, match=r"blocks of shape \[4, 4\], .*got \[4, 3\]"):
        twelve = torch.zeros(1, 2, 12, 16, 20)
        ops.dense_weights(twelve, torch.ones(4, 3).bool(), (16, 20), 50, 70)
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


@pytest.mark.sanitize
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_a_list_of_none(sizes: tuple[int, ...]) -> None:
    none = torch.full((1, 1, 3, 2), -1)
    for call in (BLOCK_SPARSE.run, BLOCK_SPARSE.exact):
        output, weights = call(*operands(sizes, torch.float64), none, (2, 3))
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
    dense = check_dense_twin(layer, x, [30, 20], output)
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

LIST = torch.tensor([[0, 0], [0, 1], [1, 1]])[None, None]


def arguments() -> dict[str, Any]:
    return {
        **right_operands(),
        "blocks": LIST.clone(),
        "block": (2, 3),
        "key_end": torch.full((B, TQ), TK, dtype=torch.int32),
    }


def listed(*pairs: tuple[int, int]) -> dict[str, Tensor]:
    return {"blocks": torch.tensor(pairs)[None, None]}


ROWS = [
    *WRONG_OPERANDS_AND_RULES,
    *WRONG_ENDS,
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
]


class TestWrongArguments(HostileSuite):
    targets = (
        Target(
            BLOCK_SPARSE.name,
            BLOCK_SPARSE.run,
            arguments,
            ROWS,
            ({}, {"return_weights": False}, {"is_causal": True}),
        ),
    )
