"""Triton additive attention on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from ahead_of_time import Kernel
from triton_attention_check import TOLERANCES, check_launchers

import seqmem_fast
from seqmem_fast._triton import additive_attention as launchers
from seqmem_fast.reference import additive_attention as reference

assert seqmem_fast.__version__
SIZES = (2, 3, 5, 6, 4)  # B, Tq, Tk, A, Dv
SAMPLES = {s.name: s.args for s in reference.sample_inputs(sizes=SIZES)}
MORE = {s.name: s.args for s in reference.sample_inputs(sizes=(1, 18, 17, 9, 3))}
LAUNCHERS = launchers.additive_attention, launchers.additive_attention_backward
check = partial(check_launchers, LAUNCHERS, reference.additive_attention)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_option(name: str) -> None:
    check(SAMPLES[name], torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check(SAMPLES["masked"], dtype)


def test_more_than_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_ROWS", 4)
    monkeypatch.setattr(launchers, "_FEATURES", 8)
    check(MORE["added_mask"], torch.float32)


def test_one_query() -> None:
    for sample in reference.sample_inputs(sizes=(3, 1, 20, 70, 5)):
        check(sample.args, torch.float32)


def test_each_gradient_alone() -> None:
    check(SAMPLES["plain"], torch.float32, (True, False))
    check(SAMPLES["plain"], torch.float32, (False, True))


def test_nothing_leaves_its_row() -> None:
    q, *rest = SAMPLES["plain"]
    clean = launchers.additive_attention(q, *rest)
    q = q.clone()
    q[0, 1] = float("nan")
    for a, b in zip(launchers.additive_attention(q, *rest), clean, strict=True):
        assert a[0, 1].isnan().all()
        a[0, 1] = b[0, 1]
        assert torch.equal(a, b)


def test_nothing_to_do() -> None:
    q, k, v, w = torch.randn(2, 3, 4), torch.randn(2, 0, 4), torch.randn(2, 0, 5), torch.randn(4)
    output, weights = launchers.additive_attention(q, k, v, w, None)
    assert output.shape == (2, 3, 5) and not output.any() and weights.shape == (2, 3, 0)
    wanted = [True] * 4 + [False]
    grads = launchers.additive_attention_backward(output, None, q, k, v, w, None, weights, wanted)
    assert [tuple(g.shape) for g in grads] == [(2, 3, 4), (2, 0, 4), (2, 0, 5), (4,), (0,)]
    assert not grads[0].any() and not grads[3].any()
    with pytest.raises(ValueError, match="expected key of shape"):
        launchers.additive_attention(q, k[..., 1:], v, w, None)


# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(3, 5, 7, 6, 4), (2, 64, 160, 128, 64)]


def kernels() -> list[Kernel]:
    file = "additive_attention"
    rows = ("q_t", "k_t", "own_t", "other_t", "width", "keys")
    wide = {"scores_ptr": "*fp32", "grad_scores_ptr": "*fp32", "grad_v_ptr": "*fp32"}
    pointers = {"mask_ptr": "*u8", **wide}
    scores = {"m_j": 1, "BM": 16, "BN": 64, "BA": 4}
    one = {"m_j": 1, "BM": 1, "BN": 16, "BA": 64}
    back = {"BM": 16, "BO": 4, "BA": 32}
    return [
        Kernel(file, "additive_scores", "bf16", 4, scores, pointers, rows),
        Kernel(file, "additive_scores", "bf16", 4, one, pointers, rows, label="one query"),
        Kernel(file, "additive_backward", "bf16", 4, back, wide, rows),
    ]
