"""LSTMs in bf16 on tiles or dot products, real or emulated: accuracy, bits, rows, dispatch.

test_isa.py runs these in builds that emulate them, with the bf16 cases of test_lstm.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from op_suite import check_same_bits_at_any_thread_count, error
from test_lstm import plain_case
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import seqmem_fast as sf
from seqmem_fast import _C

BF16 = torch.bfloat16
in_bf16 = pytest.mark.skipif(_C.bf16_in_use() == "float32", reason="no bf16 products here")


def run(module: nn.Module, dtype: torch.dtype, x: Tensor, *state: Tensor, **options: Any) -> Any:
    """Outputs and the gradients of a weighted sum of them, by input, state and parameters."""
    lengths = options.get("lengths")
    leaves = [t.to(dtype).requires_grad_() for t in (x, *state)]
    given: Any = leaves[0]
    if lengths is not None:
        given = pack_padded_sequence(given, lengths, enforce_sorted=False)
    output, final = module(given, tuple(leaves[1:]))
    outputs = [output if lengths is None else output.data, *final]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(o.shape, generator=generator).to(dtype) for o in outputs]
    wanted = [*leaves, *module.parameters()]
    return [*outputs, *torch.autograd.grad(outputs, wanted, seeds)]


# Both sides of a tile's 16 rows and units and 32 columns, of its pairs and of every schedule.
SIZES = [
    *((5, batch, 9, 20) for batch in (1, 2, 15, 16, 17, 31, 33, 70)),
    *((5, 3, 8, hidden) for hidden in (1, 15, 16, 17, 31, 33, 48, 65, 100)),
    *((4, 18, width, 24) for width in (1, 31, 32, 33, 64, 130)),
    *((time, 3, 16, 16) for time in (2, 33, 90)),
    (60, 4, 32, 64),
    (2, 1024, 5, 12),
    (40, 20, 40, 80),
    (6, 1, 260, 270),
]
OPTIONS: list[dict[str, Any]] = [
    {"bidirectional": True},
    {"num_layers": 2, "bias": False},
    {"num_layers": 2, "bidirectional": True, "proj_size": 12},
]


@in_bf16
@pytest.mark.parametrize(
    ("sizes", "options", "ragged"),
    [
        *((sizes, {}, False) for sizes in SIZES),
        *(((7, batch, 12, 40), o, True) for batch in (3, 20, 40) for o in ({}, *OPTIONS)),
    ],
    ids=str,
)
def test_as_exact_as_nn_lstm(
    sizes: tuple[int, int, int, int], options: dict[str, Any], ragged: bool
) -> None:
    time, batch, width, hidden = sizes
    lengths = torch.randint(1, time + 1, (batch,)) if ragged else None
    states = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    x = torch.randn(time, batch, width).to(BF16)
    h = torch.randn(states, batch, options.get("proj_size", hidden)).to(BF16)
    c = torch.randn(states, batch, hidden).to(BF16)
    ours = sf.LSTM(width, hidden, dtype=BF16, **options)
    results = {}
    for dtype in (torch.float64, BF16):
        theirs = nn.LSTM(width, hidden, dtype=dtype, **options)
        theirs.load_state_dict(ours.state_dict())
        results[dtype] = run(theirs, dtype, x, h, c, lengths=lengths)
    found = run(ours, BF16, x, h, c, lengths=lengths)
    for k, values in enumerate(zip(found, results[BF16], results[torch.float64], strict=True)):
        mine, eager, exact = values
        assert mine.dtype == BF16
        assert error(mine, exact) <= 1.3 * error(eager, exact) + 1e-3, f"value {k}"


@in_bf16
@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("batch", "width", "hidden"),
    # Few rows and many, one pass over the weights and several in both of their dimensions.
    [(4, 40, 50), (16, 40, 50), (37, 40, 50), (200, 40, 50), (37, 600, 150), (5, 33, 300)],
)
def test_cell_as_exact_as_nn_lstm_cell(batch: int, width: int, hidden: int) -> None:
    ours = sf.LSTMCell(width, hidden, dtype=BF16)
    tensors = [torch.randn(batch, n).to(BF16) for n in (width, hidden, hidden)]
    results = []
    for dtype in (torch.float64, BF16, BF16):
        cell = nn.LSTMCell(width, hidden, dtype=dtype) if len(results) < 2 else ours
        cell.load_state_dict(ours.state_dict())
        x, h, c = (t.to(dtype).requires_grad_() for t in tensors)
        outputs = cell(x, (h, c))
        wanted = [x, h, c, *cell.parameters()]
        results.append(
            [*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), wanted)]
        )
    for exact, eager, mine in zip(*results, strict=True):
        assert error(mine, exact) <= 1.3 * error(eager, exact) + 1e-3


@in_bf16
@pytest.mark.parametrize(
    "sizes",
    [(6, 37, 40, 80), (9, 20, 70, 128), (20, 1, 256, 256), (8, 3, 300, 260), (1, 40, 530, 140)],
    ids=str,
)
@pytest.mark.parametrize("reverse", [False, True])
def test_same_bits_however_the_work_is_shared(
    sizes: tuple[int, int, int, int], reverse: bool, restored_threads: None
) -> None:
    time, batch, *_ = sizes
    lengths = torch.randint(0, time + 1, (batch,))
    lengths[0] = time
    reset = torch.rand(time, batch) < 0.2
    check_same_bits_at_any_thread_count(plain_case(*sizes, BF16))
    check_same_bits_at_any_thread_count(
        plain_case(*sizes, BF16, lengths=lengths, reset=reset, reverse=reverse)
    )


@in_bf16
@pytest.mark.sanitize
@pytest.mark.parametrize("reverse", [False, True])
def test_a_row_has_the_same_bits_alone(reverse: bool) -> None:
    """Ragged lengths, and resets that cut a sequence in two."""
    case = plain_case(12, 21, 10, 40, BF16)
    x, h, c, *weights = case.tensors[:7]
    lengths = torch.randint(4, 13, (21,))
    reset = torch.zeros(12, 21, dtype=torch.bool)
    reset[0, ::3] = True
    reset[5, ::2] = True
    options: dict[str, Any] = {"reverse": reverse}
    output, (hy, cy), *_ = sf.ops.lstm_trace(
        x, (h, c), *weights, lengths=lengths, reset=reset, **options
    )
    for r in range(21):
        length = int(lengths[r])
        row = slice(r, r + 1)
        alone, (last_h, last_c), *_ = sf.ops.lstm_trace(
            x[:length, row], (h[row], c[row]), *weights, reset=reset[:length, row], **options
        )
        assert torch.equal(output[:length, row], alone)
        assert torch.equal(hy[row], last_h) and torch.equal(cy[row], last_c)
        if r % 2 == 0 and length > 5 and not reverse:
            second = sf.ops.lstm(x[5:length, row], None, *weights)[0] if length > 8 else None
            assert second is None or torch.equal(output[5:length, row], second)


@in_bf16
@pytest.mark.sanitize
@pytest.mark.parametrize("batch", [5, 20, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -3e38])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_bad_values_stay_in_their_row(batch: int, bad: float, where: int) -> None:
    """And where they are within the row shows as in the float32 arithmetic of the reference."""
    case = plain_case(6, batch, 9, 21, BF16)
    tensors = [t if t is None else t.clone() for t in case.tensors]
    clean = run_case(case, case.tensors)
    tensors[where][(2, 1, 3) if where == 0 else (1, 3)] = bad
    found = run_case(case, tensors)
    exact = case.reference(*(t if t is None else t.float() for t in tensors))
    for k, dim in enumerate((1, 0, 0, 1, 1)):
        assert torch.equal(found[k].isnan(), exact[k].isnan())
        assert torch.equal(others(found[k], dim), others(clean[k], dim))
    for k, dim in enumerate((1, 0, 0)):  # gradients of input and state
        assert torch.equal(others(found[5 + k], dim), others(clean[5 + k], dim))


def run_case(case: Any, tensors: Any) -> list[Tensor]:
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors[:3]]
    outputs = case.op(*leaves, *tensors[3:])
    return [*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), leaves)]


def others(t: Tensor, dim: int) -> Tensor:
    """All rows but the second."""
    return t.index_select(dim, torch.tensor([k for k in range(t.size(dim)) if k != 1]))


@in_bf16
@pytest.mark.sanitize
def test_all_sequences_empty() -> None:
    case = plain_case(4, 3, 5, 20, BF16, lengths=torch.zeros(3, dtype=torch.int64))
    leaves = [t.requires_grad_() for t in case.tensors[:7] if t is not None]
    output, hy, cy, *_ = case.op(*leaves, *case.tensors[7:])
    assert not output.any() and torch.equal(hy, leaves[1]) and torch.equal(cy, leaves[2])
    grads = torch.autograd.grad([output.sum() + hy.sum() + 2 * cy.sum()], leaves)
    assert grads[1].eq(1).all() and grads[2].eq(2).all()
    assert not any(g.any() for k, g in enumerate(grads) if k not in (1, 2))


BITS = """
import torch
import seqmem_fast as sf
from seqmem_fast import _C
torch.manual_seed(0)
x, lstm = torch.randn(5, 9, 20), sf.LSTM(20, 40)
with torch.autocast("cpu", torch.bfloat16):
    lstm(x)[0].float().sum().backward()
cast = lstm.weight_hh_l0.grad.bfloat16()
lstm.to(torch.bfloat16).zero_grad()
lstm(x.to(torch.bfloat16))[0].float().sum().backward()
plain = lstm.weight_hh_l0.grad
print(_C.bf16_in_use(), cast.equal(plain), plain.view(torch.int16).tolist())
"""


def python(*arguments: str, **env: str) -> str:
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@in_bf16
@pytest.mark.slow
def test_autocast_and_modules_in_bf16_arrive_there() -> None:
    """Both give their bits, which differ from those of the float32 kernels."""
    if "baseline" not in _C.build_info()["isas"] or _C.cpu_capability() == "baseline":
        pytest.skip("no lesser kernels to compare with")
    bits = {
        name: python("-c", BITS, ATEN_CPU_CAPABILITY=name).split(maxsplit=2)
        for name in ("", "default")
    }
    assert bits[""][:2] == [_C.bf16_in_use(), "True"]
    assert bits["default"][:2] == ["float32", "True"]
    assert bits[""][2] != bits["default"][2]


@pytest.mark.slow
def test_info_tells_of_them() -> None:
    said = json.loads(python("-m", "seqmem_fast", "info", "--json"))["bf16 runs on"]
    used, _, compiled = said.partition("; compiled: ")
    built = _C.build_info()["bf16"]
    assert compiled == (", ".join(built) or "float32 alone")
    in_use = _C.bf16_in_use()
    assert used.lower().startswith(in_use.replace("_", "-"))
    assert in_use == "float32" or {in_use, f"{in_use}, emulated"} & set(built)
