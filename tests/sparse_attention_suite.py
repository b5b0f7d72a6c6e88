"""The tests that the attentions of heads to some of the keys inherit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from hostile_suite import Bad
from op_suite import (
    Case,
    OpSuite,
    check_against_float64,
    check_nothing_left_over,
    check_same_bits_at_any_thread_count,
    compare,
    differentiable,
    values_and_gradients,
)
from sparse_attentions import SparseAttention
from torch import Tensor

import seqmem_fast as sf
from seqmem_fast.reference.common import Sample

# (B, Hq, Hk, Tq, Tk, D, Dv)
EMPTY = [(2, 2, 1, 0, 5, 4, 3), (2, 2, 1, 5, 0, 4, 3), (2, 0, 1, 5, 5, 4, 3), (0, 2, 1, 5, 5, 4, 3)]
SMALL = [(2, 2, 1, 9, 8, 6, 3), (1, 2, 2, 130, 120, 9, 11)]
SEED = torch.tensor([2**40 + 3])  # of dropout
BAD_ROW = 40  # the place of a query or a key


class SparseAttentionSuite(OpSuite):
    op: ClassVar[SparseAttention]
    sizes: ClassVar[Sequence[tuple[tuple[int, ...], Any]]]  # and which keys are seen
    by_query: ClassVar[int]  # how many outputs have queries in their last dimension but one

    def bound(self, sample: Sample) -> Case:
        """Its tensors by position: q, k and v come first."""
        raise NotImplementedError

    def seeing(
        self, sizes: tuple[int, ...], seen: Any, dtype: torch.dtype, **options: Any
    ) -> Sample:
        """sizes = (B, Hq, Hk, Tq, Tk, D, Dv); seen: one of those in `sizes`."""
        raise NotImplementedError

    def some(self, sizes: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Iterator[Sample]:
        """Calls at these sizes that see keys in different ways; of no keys too."""
        raise NotImplementedError

    def neighbours(self) -> tuple[Sample, Sequence[int], Sequence[int], Sequence[int]]:
        """A call of one row and head in float32. The keys that query BAD_ROW sees, the queries that
        see key BAD_ROW, and the keys that these see."""
        raise NotImplementedError

    def padded(self) -> Sample:
        """A call in float32 in whose second row nothing sees key 33 and those after it."""
        raise NotImplementedError

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        sizes = (2, 1, 3, 4, 2, 2) if tiny else (3, 2, 6, 7, 4, 5)
        return self.bound(self.op.sample(name, dtype=dtype, sizes=sizes))

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        inputs = self.op.dispatched(self.op.sample(name, dtype=torch.float64))
        raw = getattr(torch.ops.seqmem, self.op.name).default
        backward = getattr(torch.ops.seqmem, f"{self.op.name}_backward").default
        outputs = raw(*inputs, True)
        seeds = tuple(map(torch.ones_like, outputs))
        leaves = tuple(differentiable(inputs[:3]))
        return [
            (raw, (*leaves, *inputs[3:], True)),
            (backward, (*seeds, *inputs, *outputs[1:], [True] * 3)),
        ]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        if "seen" in metafunc.fixturenames:
            metafunc.parametrize(("sizes", "seen"), metafunc.cls.sizes, ids=str)

    @pytest.mark.isa
    @pytest.mark.sanitize
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_sizes(self, sizes: tuple[int, ...], seen: Any, dtype: torch.dtype) -> None:
        check_against_float64(self.bound(self.seeing(sizes, seen, dtype)))

    @pytest.mark.isa
    @pytest.mark.sanitize
    @pytest.mark.parametrize("alpha", [1.05, 1.3, "entmax15", "sparsemax"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_normalizers(
        self, alpha: float | str, dtype: torch.dtype, restored_threads: None
    ) -> None:
        """Scores spread wide enough that many weights are zero; rows without keys among them."""
        named = isinstance(alpha, str)
        rule = {"normalizer": alpha} if named else {"normalizer": "entmax", "alpha": alpha}
        for sample in self.some((2, 2, 1, 90, 90, 8, 8), dtype, scale=1.5, **rule):
            check_against_float64(self.bound(sample))
            check_same_bits_at_any_thread_count(self.bound(sample))

    @pytest.mark.isa
    @pytest.mark.sanitize
    @pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_dropout(self, normalizer: str, dtype: torch.dtype, restored_threads: None) -> None:
        rule = {"normalizer": normalizer, "dropout": 0.3, "seed": SEED}
        for sizes in ((2, 4, 2, 70, 75, 5, 3), (1, 2, 1, 129, 129, 8, 8)):
            for sample in self.some(sizes, dtype, **rule):
                check_against_float64(self.bound(sample))
                check_same_bits_at_any_thread_count(self.bound(sample))

    @pytest.mark.isa
    @pytest.mark.sanitize
    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_nothing_is_left_over_from_an_earlier_call(
        self, threads: int, restored_threads: None
    ) -> None:
        torch.set_num_threads(threads)
        for sizes in SMALL:
            more = (*sizes[:3], *(n + 60 for n in sizes[3:]))
            pairs = (self.some(s, torch.float32) for s in (sizes, more))
            for sample, larger in zip(*pairs, strict=True):
                check_nothing_left_over(self.bound(sample), self.bound(larger))

    @pytest.mark.isa
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("spoilt", ["q", "k", "v", "grad"])
    def test_bad_values_reach_only_what_sees_them(self, spoilt: str, bad: float) -> None:
        """One bad row among good ones of the same head: what does not see it keeps its bits."""
        sample, own, readers, read = self.neighbours()
        case = self.bound(sample)
        seeds = [torch.randn_like(o) for o in case.op(*case.tensors)]

        def run(tensors: Sequence[Tensor | None], seeds: Sequence[Tensor]) -> list[Tensor]:
            leaves = differentiable(tensors)
            outputs = case.op(*leaves)
            grads = torch.autograd.grad(outputs, leaves[:3], seeds)
            return [*(o.detach() for o in outputs[: self.by_query]), *grads]

        clean = run(case.tensors, seeds)
        tensors, seeds = [t if t is None else t.clone() for t in case.tensors], list(seeds)
        seeds[0] = seeds[0].clone()
        (seeds[0] if spoilt == "grad" else tensors["qkv".index(spoilt)])[0, 0, BAD_ROW, 4] = bad
        found = run(tensors, seeds)
        of_query = spoilt in ("q", "grad")
        queries, keys = ([BAD_ROW], own) if of_query else (readers, read)
        limits = [queries] * (self.by_query + 1) + [keys] * 2
        for a, b, limit in zip(found, clean, limits, strict=True):
            outside = torch.ones(a.size(-2), dtype=torch.bool)
            outside[limit] = False
            assert outside.any()
            assert torch.equal(a[..., outside, :], b[..., outside, :])
        assert any(not torch.isfinite(t).all() for t in found)

    def test_padding_may_hold_anything(self) -> None:
        case = self.bound(self.padded())
        q, k, v, *rest = case.tensors
        expected = values_and_gradients(case.op, case.tensors)
        k, v = k.clone(), v.clone()
        k[1, :, 33:], v[1, :, 33:] = float("nan"), float("inf")
        found = values_and_gradients(case.op, (q, k, v, *rest))
        for a, b in zip(found, expected, strict=True):
            assert a.isfinite().all() and torch.equal(a, b)

    def test_without_weights(self) -> None:
        for sample in self.some((2, 2, 1, 40, 40, 8, 8), torch.float32):
            leaves = differentiable(sample.args[:3])
            args = (*leaves, *sample.args[3:])
            expected, *_ = self.op.run(*args, **sample.kwargs)
            output, *none = self.op.run(*args, **sample.kwargs, return_weights=False)
            assert none and all(n is None for n in none) and torch.equal(output, expected)
            ours, theirs = (torch.autograd.grad(o.sum(), leaves) for o in (output, expected))
            assert all(map(torch.equal, ours, theirs))
            with torch.no_grad():
                output, *_ = self.op.run(*args, **sample.kwargs, return_weights=False)
                raw = getattr(torch.ops.seqmem, self.op.name)
                _, *empty = raw(*self.op.dispatched(sample), False)
            assert torch.equal(output, expected) and not any(w.numel() for w in empty)

    @pytest.mark.sanitize
    @pytest.mark.parametrize("shape", EMPTY, ids=str)
    def test_empty(self, shape: tuple[int, ...]) -> None:
        for sample in self.some(shape, torch.float64):
            case = self.bound(sample)
            compare(case.op, case.reference, case.tensors, case.tensors)
            output, *weights = case.op(*case.tensors)
            assert output.shape == (*shape[:2], shape[3], shape[6])
            assert not any(t.any() for t in (output, *weights))


def check_dense_twin(
    layer: sf.Attention, x: Tensor, lengths: Sequence[int], output: Tensor
) -> Tensor:
    """Of a causal self-attention to all keys, batch first: the weights of one with masks."""
    whole = sf.Attention(layer.embed_dim, layer.num_heads, batch_first=True)
    whole.load_state_dict(layer.state_dict())
    steps = x.size(1)
    causal = torch.ones(steps, steps).bool().triu(1)
    padding = torch.arange(steps) >= torch.tensor(lengths)[:, None]
    expected, weights = whole(x, x, x, padding, attn_mask=causal, average_attn_weights=False)
    torch.testing.assert_close(output, expected)
    assert weights is not None
    return weights


# ---- wrong arguments

B, HQ, HK, TQ, TK, D, DV = 2, 4, 2, 3, 5, 6, 7
z = torch.zeros


def right_operands() -> dict[str, Any]:
    return {"q": z(B, HQ, TQ, D), "k": z(B, HK, TK, D), "v": z(B, HK, TK, DV)}


WRONG_QUERIES_AND_KEYS = [
    Bad("q 3-D", {"q": z(HQ, TQ, D)}, ValueError, "q with 4 dimensions"),
    Bad("q features", {"q": z(B, HQ, TQ, D + 1)}, ValueError, r"k of shape \[2, 2, 5, 7\]"),
    Bad("q no features", {"q": z(B, HQ, TQ, 0)}, ValueError, "at least one feature"),
    Bad("q batch", {"q": z(B + 1, HQ, TQ, D)}, ValueError, r"k of shape \[3, 2, 5, 6\]"),
    Bad("q heads", {"q": z(B, 3, TQ, D)}, ValueError, "a multiple of k's 2 heads, got 3"),
    Bad("q integer", {"q": z(B, HQ, TQ, D).int()}, TypeError, "q of dtype float32"),
    Bad("q double", {"q": z(B, HQ, TQ, D).double()}, TypeError, "k of q's dtype Double"),
    Bad("q sparse", {"q": z(B, HQ, TQ, D).to_sparse()}, TypeError, "q to be a dense"),
    Bad("k 3-D", {"k": z(HK, TK, D)}, ValueError, "k with 4 dimensions"),
    Bad("k no heads", {"k": z(B, 0, TK, D)}, ValueError, "k with at least one head"),
    Bad("k half", {"k": z(B, HK, TK, D).half()}, TypeError, "k of q's dtype Float, got Half"),
    Bad("k sparse", {"k": z(B, HK, TK, D).to_sparse()}, TypeError, "k to be a dense"),
]
_DROPOUT = {"dropout": 1.5, "seed": z(1).long()}
WRONG_OPERANDS_AND_RULES = [
    *WRONG_QUERIES_AND_KEYS,
    Bad("v 2-D", {"v": z(TK, DV)}, ValueError, "v with 4 dimensions"),
    Bad("v keys", {"v": z(B, HK, TK + 1, DV)}, ValueError, r"v of shape \[2, 2, 5, 7\]"),
    Bad("v heads", {"v": z(B, HQ, TK, DV)}, ValueError, r"v of shape \[2, 2, 5, 7\]"),
    Bad("v dtype", {"v": z(B, HK, TK, DV).bfloat16()}, TypeError, "v of q's dtype"),
    Bad("alpha", {"normalizer": "entmax", "alpha": 1.0}, ValueError, "1 < alpha", in_python=True),
    Bad("dropout", _DROPOUT, ValueError, r"dropout in 0\.\.1, got 1.5"),
    Bad("seed type", {"dropout": 0.5, "seed": z(1)}, TypeError, "seed of dtype int64"),
    Bad("seeds", {"dropout": 0.5, "seed": z(2).long()}, ValueError, r"seed of shape \[1\]"),
    Bad("name", {"normalizer": "max"}, ValueError, "normalizer softmax, spars", in_python=True),
]
WRONG_ENDS = [
    Bad("end dtype", {"key_end": z(B)}, TypeError, "key_end of dtype int64 or int32"),
    Bad("end rows", {"key_end": z(B + 1).int()}, ValueError, r"key_end of shape \[2\]"),
    Bad("end queries", {"key_end": z(B, TK).int()}, ValueError, r"key_end of shape \[2, 3\]"),
    Bad("end sparse", {"key_end": z(B, TQ).int().to_sparse()}, TypeError, "key_end to be a dense"),
]
