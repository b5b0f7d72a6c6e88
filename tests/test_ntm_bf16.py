"""NTMs in bf16 whose products run on tiles or dot products, real or emulated: accuracy, bits, rows.

test_isa.py runs these in builds that emulate them.
"""

from __future__ import annotations

import pytest
import torch
from machines import NTM
from op_suite import (
    Case,
    cast,
    check_nothing_left_over,
    check_same_bits_at_any_thread_count,
    error,
    values_and_gradients,
)

from seqmem_fast import _C

BF16 = torch.bfloat16
in_bf16 = pytest.mark.skipif(_C.bf16_in_use() == "float32", reason="no bf16 products here")

# (T, B, I, C, N, M): on both sides of a tile's 16 rows and units, of blocks of 32 and of panels of
# 64 values, and with more rows in a chunk than are summed at once.
SIZES = [
    *((3, batch, 5, 100, 8, 4) for batch in (8, 15, 16, 17, 33, 70)),
    *((3, 8, 5, units, 8, 4) for units in (112, 127, 128, 129, 260)),
    *((2, 9, width, 100, 8, 4) for width in (1, 31, 33, 90)),
    (2, 9, 4, 100, 30, 33),
    (37, 20, 3, 100, 8, 4),
]


ALL_OPTIONS = (4, 19, 5, 100, 9, 4)


def case_of(sizes: tuple[int, int, int, int, int, int], name: str = "plain") -> Case:
    return NTM.case(NTM.sample(name, BF16, sizes))


@in_bf16
@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("name", "sizes"),
    [*(("plain", sizes) for sizes in SIZES), *((name, ALL_OPTIONS) for name in NTM.names)],
    ids=str,
)
def test_as_exact_as_eager(name: str, sizes: tuple[int, int, int, int, int, int]) -> None:
    """Outputs, state, weightings and all gradients."""
    case = case_of(sizes, name)
    exact = values_and_gradients(case.reference, cast(case.tensors, torch.float64))
    eager = values_and_gradients(case.reference, case.tensors)
    ours = values_and_gradients(case.op, case.tensors)
    for k, (mine, theirs, right) in enumerate(zip(ours, eager, exact, strict=True)):
        assert mine.dtype == BF16
        assert error(mine, right) <= 1.3 * error(theirs, right) + 2e-3, f"value {k}"


@in_bf16
@pytest.mark.parametrize("name", ["plain", "all_padded", "feedforward"])
def test_same_bits_at_any_thread_count(name: str, restored_threads: None) -> None:
    check_same_bits_at_any_thread_count(case_of((20, 37, 5, 120, 9, 4), name))


@in_bf16
@pytest.mark.sanitize
def test_nothing_is_left_over() -> None:
    check_nothing_left_over(case_of((3, 20, 5, 100, 9, 4)), case_of((5, 40, 5, 130, 12, 7)))


@in_bf16
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_keeps_its_bad_values(bad: float) -> None:
    """What is not finite in one row's input does not reach another row's results."""
    case = case_of(ALL_OPTIONS)
    clean = case.op(*case.tensors)
    spoilt = [t if t is None else t.clone() for t in case.tensors]
    assert spoilt[0] is not None
    spoilt[0][1, 7] = bad
    for dim, mine, before in zip(case.batch_out, case.op(*spoilt), clean, strict=True):
        others = [row for row in range(ALL_OPTIONS[1]) if row != 7]
        index = torch.tensor(others)
        assert dim is not None
        assert torch.equal(mine.index_select(dim, index), before.index_select(dim, index))
    assert not case.op(*spoilt)[0][2:, 7].isfinite().all()
