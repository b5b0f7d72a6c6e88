"""The attention op: the inherited suite, and edges of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_suite import TOLERANCES, Case, Function, OpSuite, check_against_float64

from seqmem_fast import ops
from seqmem_fast.reference import attention as reference

NAMES = [sample.name for sample in reference.sample_inputs()]


def case_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Case:
    """attention of positional tensors; batch rows only where all arguments have them."""

    def bind(function: Any) -> Function:
        return lambda *tensors: function(*tensors, **kwargs)

    query, mask = args[0], args[3]
    rows: list[tuple[int | None, ...]] = [(0, 0, 0, None), (0, 0)]
    if mask is not None and mask.size(0) == query.size(0):
        rows[0] = (0, 0, 0, 0)
    if query.dim() > 3:
        rows = [(None,) * 4, (None,) * 2]
    return Case(bind(ops.attention), bind(reference.attention), args, *rows)


class TestAttention(OpSuite):
    names = NAMES

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        sizes = (2, 3, 2, 2, 3) if tiny else (3, 5, 7, 4, 6)
        samples = reference.sample_inputs(dtype=dtype, sizes=sizes)
        sample = next(s for s in samples if s.name == name)
        return case_of(sample.args, sample.kwargs)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        sample = next(s for s in reference.sample_inputs(dtype=torch.float64) if s.name == name)
        options = (sample.kwargs.get("scale"), sample.kwargs.get("is_causal", False))
        leaves = tuple(
            t.clone().requires_grad_() if t is not None and t.is_floating_point() else t
            for t in sample.args
        )
        output, weights = torch.ops.seqmem.attention(*sample.args, *options)
        ones = torch.ones_like(output), torch.ones_like(weights)
        wanted = [True, True, True, leaves[3] is not None and leaves[3].is_floating_point()]
        return [
            (torch.ops.seqmem.attention.default, (*leaves, *options)),
            (
                torch.ops.seqmem.attention_backward.default,
                (*ones, *sample.args, weights, *options, wanted),
            ),
        ]


def plain_case(
    batch: int, queries: int, keys: int, width: int, value_width: int, dtype: torch.dtype, name: str
) -> Case:
    sizes = (batch, queries, keys, width, value_width)
    samples = reference.sample_inputs(dtype=dtype, sizes=sizes)
    return next(case_of(s.args, s.kwargs) for s in samples if s.name == name)


# Around the widths of vectors, tiles, panels and blocks of rows, and both sides of packing.
SIZES = [
    *((2, 9, keys, 5, 3) for keys in (1, 2, 7, 8, 9, 15, 31, 32, 33, 63, 65, 129)),
    *((2, queries, 10, 5, 8) for queries in (1, 2, 3, 4, 7, 8, 23, 24, 25, 49, 97)),
    *((1, 9, 11, width, width) for width in (1, 2, 3, 8, 17, 31, 32, 33, 65)),
    (2, 3, 40, 24, 16),
    (1, 300, 270, 16, 8),
    (1, 26, 2100, 8, 40),
    (3, 200, 150, 12, 20),
]


@pytest.mark.isa
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_sizes(sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    for name in ("masked", "added_mask", "causal"):
        check_against_float64(plain_case(*sizes, dtype, name), name)
