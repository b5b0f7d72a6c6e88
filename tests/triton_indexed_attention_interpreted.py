"""Triton indexed attention on CPU tensors; run by test_triton_ops.py in a process of its own.

Triton must see TRITON_INTERPRET=1 before it is first imported, so this is no file for the main run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead_of_time import Kernel
from triton_attention_check import assert_near

import seqmem_fast
from seqmem_fast._triton import indexed_attention as launchers
from seqmem_fast.reference import indexed_attention as reference
from seqmem_fast.reference.common import ALPHAS, Sample

assert seqmem_fast.__version__
SIZES = (2, 1, 6, 9, 5, 6)  # B, Hk, Tq, Tk, D, Dv
SAMPLES = {s.name: s for s in reference.sample_inputs(sizes=SIZES)}
# Sizes of samples whose kernels differ; nothing runs, so large is cheap.
COMPILED = [(2, 1, 40, 40, 20, 32)]
OPTIONS: dict[str, Any] = {
    "scale": None,
    "normalizer": "softmax",
    "alpha": 1.5,
    "dropout": 0.0,
    "seed": None,
}
ALL = (True, True)


def check(sample: Sample, dtype: torch.dtype, given: tuple[bool, ...] = ALL) -> None:
    """Forward and backward beside the reference in float64; given: which gradients come in."""
    *tensors, index = sample.args
    operands = [t.to(dtype) for t in tensors]
    scale, normalizer, alpha, *dropout = {**OPTIONS, **sample.kwargs}.values()
    rest = (index, scale, ALPHAS.get(normalizer, alpha), *dropout)
    exact = [t.double().requires_grad_() for t in operands]
    right_ones = launchers._plain(*exact, *rest)
    found = launchers.indexed_attention(*operands, *rest, True)
    seeds: list[Any] = []
    for ours, theirs, is_given in zip(found, right_ones, given, strict=True):
        assert_near(ours, theirs.detach(), dtype)
        seeds.append(torch.randn(theirs.shape).to(dtype) if is_given else None)
    pairs = zip(right_ones, seeds, strict=True)
    loss = sum((a * s.double()).sum() for a, s in pairs if s is not None)
    expected = torch.autograd.grad(loss, exact, materialize_grads=True)
    saved = right_ones[1].detach().to(dtype)
    backward = launchers.indexed_attention_backward
    grads = backward(*seeds, *operands, *rest, saved, [True] * 3)
    for ours, theirs in zip(grads, expected, strict=True):
        assert_near(ours, theirs, dtype, 10)


def long(sample: Sample) -> Sample:
    """With lists of more places than a kernel takes at once."""
    *tensors, index = sample.args
    return sample._replace(args=(*tensors, index.repeat(1, 1, 1, 8)[..., :35]))


@pytest.mark.parametrize("name", SAMPLES)
def test_every_option(name: str) -> None:
    check(SAMPLES[name], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_dtypes_and_long_lists(dtype: torch.dtype) -> None:
    check(long(SAMPLES["each"]), dtype)


def test_wide_heads_in_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "fits_heads", lambda *_: False)
    check(SAMPLES["each"], torch.float32)


def test_each_gradient_alone() -> None:
    check(SAMPLES["by_head"], torch.float32, (True, False))
    check(SAMPLES["by_head"], torch.float32, (False, True))


def test_without_weights_without_rows_and_wrong_shapes() -> None:
    q, k, v, index = SAMPLES["shared"].args
    run = launchers.indexed_attention
    output, _ = run(q, k, v, index, None, 1.0, 0.0, None, True)
    alone, none = run(q, k, v, index, None, 1.0, 0.0, None, False)
    assert torch.equal(alone, output) and none.numel() == 0
    for part in ((q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0]), (q[:0], k[:0], v[:0])):
        nothing = torch.full((1, 1, part[0].size(2), 3), -1)
        output, weights = run(*part, nothing, None, 1.0, 0.0, None, True)
        assert output.shape == (*part[0].shape[:3], v.shape[3]) and not output.any()
        grads = launchers.indexed_attention_backward(
            output, None, *part, nothing, None, 1.0, 0.0, None, weights, [True] * 3
        )
        assert [g.shape for g in grads] == [t.shape for t in part] and not grads[1].any()
    with pytest.raises(ValueError, match="expected k of shape"):
        run(q, k[:1], v, index, None, 1.0, 0.0, None, True)


def test_keys_that_do_not_exist_are_none() -> None:
    """As on a GPU, whose lists are not read by the checks."""
    run = launchers.indexed_attention.__wrapped__  # type: ignore[attr-defined]
    q, k, v, index = SAMPLES["shared"].args
    output, _ = run(q, k, v, index, None, 1.0, 0.0, None, True)
    more = torch.tensor([2**40, 9, -7]).expand(*index.shape[:3], -1)
    again, weights = run(q, k, v, torch.cat((index, more), -1), None, 1.0, 0.0, None, True)
    torch.testing.assert_close(again, output)
    assert not weights[..., -3:].any()


def test_the_highest_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_SCORES", 40)  # two queries at a time
    q, k, *_ = SAMPLES["by_head"].args
    for end in (None, torch.tensor([9, 4]), torch.randint(0, 10, (2, 6))):
        for causal in (False, True):
            found = launchers.top_k_keys(q, k, 4, causal, end, None)
            expected = reference.top_k_keys(q, k, 4, is_causal=causal, key_end=end)
            assert torch.equal(found, expected)
    assert launchers.top_k_keys(q[:, :, :0], k, 4, False, None, None).shape == (2, 2, 0, 4)


def kernels() -> list[Kernel]:
    file = "indexed_attention_kernels"
    rows = ("q_0", "q_1", "q_t", "k_0", "k_1", "k_t", "v_0", "v_1", "v_t", "width", "value_width")
    found = []
    for storage, warps in {"bf16": 4, "fp32": 8}.items():
        dropout = {"BELOW": 0, "FACTOR": 1.0} if warps == 4 else {"BELOW": 9, "FACTOR": 1.5}
        constants = {"BC": 32, "BD": 64, "BV": 64, "SCALE": 0.125, **dropout}
        for name in ("forward", "backward_rows", "backward_keys"):
            integers = ("index_ptr", "places_ptr", "begins_ptr", "seed_ptr")
            pointers = {**dict.fromkeys(integers, "*i64"), "slopes_ptr": "*fp32"}
            kernel = f"indexed_attention_{name}"
            found.append(Kernel(file, kernel, storage, warps, constants, pointers, rows))
    return found
