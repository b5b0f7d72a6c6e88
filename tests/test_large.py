"""Element 2^31 and beyond is found by the ops; the LSTM's own test stands beside its others.

Offsets are int64 throughout; were one cut to 32 bits, the last row would be read before the start.
``python tests/test_large.py`` also runs what is too slow for the suite: two minutes and 17 GiB.
The NTM's functionals are not here: their scratch would be 26 GB.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from seqmem_fast import LRUAState, NTMState, ops
from seqmem_fast.ops.hard_attention import sample_at
from seqmem_fast.reference.dnc import DNCState

ROWS, WIDTH = 2**25 + 1, 64
LAST = (torch.arange(WIDTH) % 2).bfloat16()  # the others are zero


QUICK: list[Callable[[Tensor], None]] = []
SLOW: list[Callable[[Tensor], None]] = []


def quick(check: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    QUICK.append(check)
    return check


def slow(check: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Too slow for the suite."""
    SLOW.append(check)
    return check


def small(*shape: int, value: float = 0.0) -> Tensor:
    return torch.full(shape, value, dtype=torch.bfloat16)


def near(a: Tensor, b: float | Tensor) -> None:
    torch.testing.assert_close(a.float(), torch.as_tensor(b).float(), rtol=0.02, atol=0)


@slow
def attention_of_many_queries(x: Tensor) -> None:
    key = torch.stack((small(WIDTH, value=1), small(WIDTH)))
    weights = ops.attention(x, key, key)[1]
    near(weights[-1], torch.tensor([4.0, 0.0]).softmax(0))
    assert (weights[:-1] == 0.5).all()


@slow
def attention_to_many_keys(x: Tensor) -> None:
    output, weights = ops.attention(small(1, WIDTH, value=3), x, x)
    share = math.exp(12) / (math.exp(12) + ROWS - 1)
    near(weights[0, -1], share)
    near(output[0], share * LAST)


@slow
def window_attention(x: Tensor) -> None:
    """The last query sees itself and the one before."""
    rows = x[None, None]
    output, weights, _ = ops.window_attention(rows, rows, rows, 1, 0)
    near(weights[0, 0, -1], torch.tensor([0.0, 4.0]).softmax(0))
    near(output[0, 0, -1], math.exp(4) / (math.exp(4) + 1) * LAST)
    assert (weights[0, 0, 1:-1] == 0.5).all()


@slow
def block_sparse_attention(x: Tensor) -> None:
    """Each query sees its own block of two; the last has one key alone."""
    rows = x[None, None]
    places = torch.arange(-(-ROWS // 2))
    blocks = torch.stack((places, places), 1)[None, None]
    output, weights = ops.block_sparse_attention(rows, rows, rows, blocks, (2, 2), is_causal=True)
    assert weights[0, 0, -1, 0].tolist() == [1, 0]
    near(output[0, 0, -1], LAST)
    assert (weights[0, 0, :-1, 1] == 0.5).all()


@slow
def indexed_attention(x: Tensor) -> None:
    """The last query names the last key and one before."""
    rows = x[None, None]
    index = torch.arange(ROWS)[None, None, :, None]
    output, weights = ops.indexed_attention(rows, rows, rows, torch.cat((index, index // 2), 3))
    near(weights[0, 0, -1], torch.tensor([4.0, 0.0]).softmax(0))
    near(output[0, 0, -1], math.exp(4) / (math.exp(4) + 1) * LAST)
    assert (weights[0, 0, :-1] == 0.5).all()


@slow
def additive_attention(x: Tensor) -> None:
    key = small(ROWS, 1)
    key[-1] = 30
    output, _ = ops.additive_attention(small(1, 1), key, x, small(1, value=16))
    share = math.exp(16) / (math.exp(16) + ROWS - 1)  # 2^25 numbers are summed up in float32
    torch.testing.assert_close(output[0].float(), share * LAST.float(), rtol=0.1, atol=0)


@quick
def dynamic_memory(x: Tensor) -> None:
    nets = (small(WIDTH, 2 * WIDTH), small(WIDTH)) * 2
    _, weights = ops.dynamic_memory(small(1, WIDTH, value=0.5), x, *nets, 1, return_memory=False)
    near(weights[0, 0, -1], math.exp(16) / (math.exp(16) + ROWS - 1))


@slow
def delta_memory(x: Tensor) -> None:
    """One step of each row, written and read under a key of one feature."""
    rows = x.view(ROWS, 1, 1, WIDTH)
    one = small(ROWS, 1, 1, 1, value=1)
    output, state = ops.delta_memory(one, one, rows, one[..., 0])
    assert torch.equal(output[-1, 0, 0], LAST) and not output[-2].any()
    assert torch.equal(state[-1, 0, 0], LAST.float())


@quick
def hard_attention(x: Tensor) -> None:
    uniform = torch.full((ROWS,), 0.99)
    many, one = sample_at(x, uniform), sample_at(x[-1:], uniform[-1:])
    for a, b in zip(many, one, strict=True):
        assert torch.equal(a[-1:], b)
    assert not torch.equal(many[1][-1], many[1][0])


@quick
def entmax(x: Tensor) -> None:
    many, one = ops.sparsemax(x), ops.sparsemax(x[-1:])
    assert torch.equal(many[-1:], one) and not torch.equal(many[-1], many[0])


def check_machine(x: Tensor, op: Callable[[Tensor, list[Tensor]], Tensor]) -> None:
    """The same weight for all columns, so that a step's input may be one number instead."""
    time = 3 * 11 * 251
    weight, rest = small(4, 1, value=0.01), (small(4, 1), small(4), small(4))

    def run(input: Tensor, columns: Tensor) -> Tensor:
        return op(input, [torch.cat((columns, weight), 1), *rest])

    wide = x.view(time, 1, -1)
    found = run(wide, weight.expand(4, wide.size(2)))
    steps = small(time, 1, 1)
    steps[-1] = LAST.sum()
    torch.testing.assert_close(found, run(steps, weight), rtol=0.02, atol=1e-6)
    assert not found[:-1, :, 0].any() and found[-1].all()


@slow
def ntm(x: Tensor) -> None:
    state = NTMState(small(1, 1, 1), small(1, 1, 1), small(1, 3, 1), small(1, 2, 3), small(1, 1, 1))
    head = small(2 * (1 + 6) + 2, 1, value=1), small(2 * (1 + 6) + 2)
    check_machine(x, lambda input, controller: ops.ntm(input, state, controller, *head)[0])


@slow
def lrua(x: Tensor) -> None:
    """With one head."""
    state = LRUAState(
        small(1, 1, 1), small(1, 1, 1), small(1, 3, 1), small(1, 3), small(1, 1, 3), small(1, 1, 1)
    )
    head = small(3, 1, value=1), small(3)
    check_machine(x, lambda input, controller: ops.lrua(input, state, controller, *head)[0])


@slow
def dnc(x: Tensor) -> None:
    """One write head and one read head, reading by content alone."""
    parts = [(1, 1, 1), (1, 1, 1), (1, 3, 1), (1, 3), (1, 0, 3, 3), (1, 0, 3), *[(1, 1, 3)] * 2]
    state = DNCState(*(small(*shape) for shape in parts), small(1, 1, 1))
    interface = small(9, 1, value=1), small(9)

    def op(input: Tensor, controller: list[Tensor]) -> Tensor:
        return ops.dnc(input, state, controller, *interface, links=False)[0]

    check_machine(x, op)


def run(checks: list[Callable[[Tensor], None]]) -> None:
    x = small(ROWS, WIDTH)
    x[-1] = LAST
    with torch.inference_mode():
        for check in checks:
            check(x)


@pytest.mark.slow
def test_more_than_2_31_elements() -> None:
    """The last row of 2^31 + 64 values of bfloat16, 4 GiB, made once for all ops."""
    run(QUICK)


if __name__ == "__main__":
    run(QUICK + SLOW)
