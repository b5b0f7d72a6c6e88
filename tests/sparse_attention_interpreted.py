"""The interpreted tests that attentions of heads to some of the keys inherit."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from ahead_of_time import Kernel
from sparse_attentions import SparseAttention
from torch import Tensor
from triton_attention_check import assert_near

from seqmem_fast._triton.normalizers import ANY, ENTMAX15, SOFTMAX
from seqmem_fast.reference.common import Sample

NORMALIZERS: dict[str, dict[str, Any]] = {
    "sparsemax": {"normalizer": "sparsemax"},
    "entmax15": {"normalizer": "entmax15"},
    "1.05": {"normalizer": "entmax", "alpha": 1.05},
    "1.7 and dropout": {
        "normalizer": "entmax",
        "alpha": 1.7,
        "dropout": 0.3,
        "seed": torch.tensor([2**33 + 1]),
    },
}


def normalized(sample: Sample, normalizer: str) -> Sample:
    """With scores that spread far enough for many weights to be zero."""
    return sample._replace(kwargs={**sample.kwargs, **NORMALIZERS[normalizer], "scale": 1.5})


def check_heads(
    launchers: ModuleType,
    op: SparseAttention,
    sample: Sample,
    dtype: torch.dtype,
    given: Sequence[bool] | None = None,
) -> None:
    """Forward and backward beside the reference in float64; given: which gradients come in, all if
    None."""
    inputs = op.dispatched(sample)
    operands, rest = [t.to(dtype) for t in inputs[:3]], inputs[3:]
    exact = [t.double().requires_grad_() for t in operands]
    right_ones = launchers._plain(*exact, *rest)
    found = vars(launchers)[op.name](*operands, *rest, True)
    seeds: list[Tensor | None] = []
    given = [True] * len(found) if given is None else given
    for ours, theirs, is_given in zip(found, right_ones, given, strict=True):
        assert_near(ours, theirs.detach(), dtype)
        seeds.append(torch.randn(theirs.shape).to(dtype) if is_given else None)
    pairs = zip(right_ones, seeds, strict=True)
    loss = sum((a * s.double()).sum() for a, s in pairs if s is not None)
    expected = torch.autograd.grad(loss, exact, materialize_grads=True)
    saved = [t.detach().to(dtype) for t in right_ones[1:]]
    backward = vars(launchers)[f"{op.name}_backward"]
    grads = backward(*seeds, *operands, *rest, *saved, [True] * 3)
    for ours, theirs in zip(grads, expected, strict=True):
        assert_near(ours, theirs, dtype, 10)


class SparseAttentionInterpreted:
    op: ClassVar[SparseAttention]
    launchers: ClassVar[ModuleType]
    samples: ClassVar[dict[str, Sample]]
    plain: ClassVar[str]  # a sample of few options, whose queries all see a key
    rich: ClassVar[Sequence[str]]  # and some of many
    outputs: ClassVar[int] = 2

    def nothing(self, queries: int) -> tuple[Any, ...]:
        """Which keys are seen by so many queries where there may be none."""
        raise NotImplementedError

    def check(self, sample: Sample, *options: Any) -> None:
        check_heads(self.launchers, self.op, sample, *options)

    def forward(self, sample: Sample, need_weights: bool = True) -> tuple[Tensor, ...]:
        launch = vars(self.launchers)[self.op.name]
        found: tuple[Tensor, ...] = launch(*self.op.dispatched(sample), need_weights)
        return found

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", metafunc.cls.samples)

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if "_BLOCK" in vars(self.launchers):
            monkeypatch.setattr(self.launchers, "_BLOCK", 16)

    def test_every_option(self, name: str) -> None:
        self.check(self.samples[name], torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        for name in self.rich:
            self.check(self.samples[name], dtype)

    @pytest.mark.parametrize(
        ("normalizer", "dtype"),
        [
            *((name, torch.float32) for name in NORMALIZERS),
            ("1.05", torch.float64),
            ("entmax15", torch.float64),
            ("1.05", torch.float16),
            ("sparsemax", torch.float16),
        ],
        ids=str,
    )
    def test_normalizers(self, normalizer: str, dtype: torch.dtype) -> None:
        self.check(normalized(self.samples[self.rich[0]], normalizer), dtype)

    @pytest.mark.parametrize("normalizer", NORMALIZERS)
    def test_bad_values_of_entmax_stay_in_their_row(self, normalizer: str) -> None:
        """NaN and infinity make the outputs of their own queries NaN; no other one changes."""
        q, *rest = self.samples[self.plain].args
        clean, bad = q.clone(), q.clone()
        clean[0, 0, 1:4] = 0
        bad[0, 0, 1], bad[0, 0, 2], bad[0, 0, 3] = torch.nan, torch.inf, -torch.inf
        samples = (normalized(Sample("", (t, *rest)), normalizer) for t in (clean, bad))
        expected, found = (self.forward(sample)[0] for sample in samples)
        assert found[0, 0, 1:4].isnan().all(-1).all()
        found[0, 0, 1:4] = expected[0, 0, 1:4]
        assert torch.equal(found, expected) and expected.any()

    def test_wide_heads_in_plain_pytorch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self.launchers, "fits_heads", lambda *_: False)
        for name in self.rich:
            self.check(self.samples[name], torch.float32)

    def test_each_gradient_alone(self) -> None:
        for k in range(self.outputs):
            given = tuple(k == n for n in range(self.outputs))
            self.check(self.samples[self.rich[0]], torch.float32, given)

    def test_without_weights_without_rows_and_wrong_shapes(self) -> None:
        backward = vars(self.launchers)[f"{self.op.name}_backward"]
        q, k, v, *seen = self.samples[self.plain].args
        output, *_ = self.forward(self.samples[self.plain])
        alone, *rest = self.forward(self.samples[self.plain], need_weights=False)
        assert torch.equal(alone, output) and rest and not any(t.numel() for t in rest)
        for part in ((q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0]), (q[:0], k[:0], v[:0])):
            empty = Sample("empty", (*part, *self.nothing(part[0].size(2))))
            output, *saved = self.forward(empty)
            assert output.shape == (*part[0].shape[:3], v.shape[3]) and not output.any()
            seeds = (output, *[None] * len(saved))
            grads = backward(*seeds, *self.op.dispatched(empty), *saved, [True] * 3)
            assert [g.shape for g in grads] == [t.shape for t in part] and not grads[1].any()
        with pytest.raises(ValueError, match="expected k of shape"):
            self.forward(Sample("wrong", (q, k[:1], v, *seen)))


def kernels_of(
    op: SparseAttention,
    integers: Sequence[str],
    launches: dict[str, dict[str, Any]],
    in_float32: dict[str, dict[str, Any]],
    with_entmax: dict[str, dict[str, Any]],
) -> list[Kernel]:
    """Each kernel in bfloat16 and, with dropout, in float32, with softmax and entmax; its constants
    (and "warps"), and what of these is other in float32 and with entmax."""
    rows = ("q_0", "q_1", "q_t", "k_0", "k_1", "k_t", "v_0", "v_1", "v_t", "width", "value_width")
    wide = dict.fromkeys(("delta_ptr", "slopes_ptr"), "*fp32")
    pointers = {**dict.fromkeys((*integers, "seed_ptr"), "*i64"), "alpha_ptr": "*fp64", **wide}
    usual = {"BD": 64, "BV": 64, "SCALE": 0.125}
    storages: dict[str, dict[str, Any]] = {
        "bf16": {"warps": 4, "BELOW": 0, "FACTOR": 1.0},
        "fp32": {"warps": 8, "BELOW": 9, "FACTOR": 1.5},
    }
    found = []
    for name, options in launches.items():
        for storage, more in storages.items():
            for kind in (SOFTMAX, ENTMAX15, ANY):
                given = {**usual, **more, **options, "KIND": kind.value}
                given |= in_float32.get(name, {}) if storage == "fp32" else {}
                given |= with_entmax.get(name, {}) if kind != SOFTMAX else {}
                warps, label = given.pop("warps"), f"{storage} kind {kind.value}"
                launch = (f"{op.name}_kernels", f"{op.name}_{name}", storage, warps, given)
                found.append(Kernel(*launch, pointers, rows, label=label))
    return found
