"""The interpreted tests that every machine's Triton launchers inherit (machines.py)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from machines import Machine, Sizes
from torch import Tensor
from torch.utils._pytree import tree_map_only
from triton_attention_check import spread

from seqmem_fast._triton import machine as shared


def assert_near(ours: Tensor, right: Tensor, bound: float) -> None:
    assert ours.shape == right.shape
    error = (ours.detach().double() - right).norm() / right.norm().clamp_min(1e-6)
    assert error <= bound


def converted(a: Any, dtype: torch.dtype, leaf: bool = False) -> Any:
    def convert(t: Tensor) -> Tensor:
        return t.to(dtype, copy=True).requires_grad_(leaf) if t.is_floating_point() else t

    return tree_map_only(Tensor, convert, a)


class MachineInterpreted:
    machine: ClassVar[Machine]
    launchers: ClassVar[ModuleType]
    options: ClassVar[Sequence[str]]  # names of samples to try
    sizes: ClassVar[Sizes] = (2, 2, 2, 5, 6, 3)  # T, B, I, C, N, M
    dtypes: ClassVar[dict[torch.dtype, str]] = {  # names of samples to try in them
        torch.float64: "plain",
        torch.bfloat16: "plain",
    }
    tolerances: ClassVar[dict[torch.dtype, float]] = {
        torch.float64: 1e-11,
        torch.float32: 2e-5,
        torch.bfloat16: 0.3,
        torch.float16: 1e-3,
    }
    limits: ClassVar[ModuleType] = shared  # where _ELEMENTS stands
    long_dtype: ClassVar[torch.dtype] = torch.float32

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        suite = metafunc.cls
        if "option" in metafunc.fixturenames:
            metafunc.parametrize("option", suite.options)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", suite.dtypes, ids=str)

    def sample(self, name: str = "plain", sizes: Sizes | None = None) -> Any:
        return self.machine.sample(name, torch.float32, sizes or self.sizes)

    def forward(self, tensors: Sequence[Any], options: Sequence[Any], *flags: bool) -> Any:
        return getattr(self.launchers, self.machine.op)(*tensors, *options, *flags)

    def backward(self, grads: Any, tensors: Any, outs: Any, options: Any) -> Any:
        kept = outs[0], *outs[self.machine.kept :]
        launcher = getattr(self.launchers, f"{self.machine.op}_backward")
        return launcher(*grads, *tensors, *kept, *options, [True] * 4)

    def check(self, sample: Any, dtype: torch.dtype, backward: bool = True) -> None:
        machine = self.machine
        given = converted((sample.args, sample.kwargs), dtype)
        exact = converted(given, torch.float64, leaf=True)
        features, state, trace = machine.exact(*exact[0], **exact[1])
        traces = (trace,) if isinstance(trace, Tensor) else trace[: machine.traces.stop]
        right = (features, *state, *traces)

        tensors, options = machine.raw(sample._replace(args=given[0], kwargs=given[1]))
        lengths = given[1].get("lengths")
        if lengths is not None:  # what the padding holds does not matter
            for b, length in enumerate(lengths):
                tensors[0][length:, b] = float("nan")
        ours = self.forward(tensors, options, True, True)
        for a, b in zip(ours[: machine.outputs], right, strict=True):
            assert a.dtype == dtype
            assert_near(a, b.detach(), self.tolerances[dtype])
        if not backward:
            return
        learning = machine.learning_of(right)
        seeds = [torch.randn(b.shape).to(dtype) for b in learning]
        loss = sum((a * b).sum() for a, b in zip(learning, seeds, strict=True))
        leaves = self.leaves(sample._replace(args=exact[0], kwargs=exact[1]))
        expected = torch.autograd.grad(loss, leaves, allow_unused=True)
        grads = self.backward(seeds, tensors, ours, options)
        for grad, leaf, theirs in zip(grads, leaves, expected, strict=True):
            if grad.numel() or leaf.numel() == 0:
                assert grad.dtype == dtype
                wanted = torch.zeros_like(leaf) if theirs is None else theirs
                assert_near(grad, wanted, 10 * self.tolerances[dtype])
            else:
                assert machine.constant and theirs is None

    def leaves(self, sample: Any) -> list[Tensor]:
        """What the backward gives gradients of, in its order."""
        input, state, controller, *head = sample.args
        return [input, *state, *head, *sample.kwargs.get("initial", ()), *controller]

    def test_every_option(self, option: str) -> None:
        self.check(self.sample(option), torch.float32)

    def test_plain_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self.limits, "_ELEMENTS", 8)
        self.check(self.sample(self.machine.padded), torch.float64)
        self.check(self.sample(), torch.float16)  # rounded at the ends alone

    def test_dtypes(self, dtype: torch.dtype) -> None:
        self.check(self.sample(self.dtypes[dtype]), dtype)

    def test_segments(self) -> None:
        """More steps than one segment, what enters them from checkpoints; a row starts anew there,
        the other before."""
        steps = shared.SHORTEST_SEGMENT + 2
        sample = self.sample("reset", (steps, *self.sizes[1:]))
        reset = torch.zeros(steps, 2, dtype=torch.bool)
        reset[3, 0] = reset[shared.SHORTEST_SEGMENT, 1] = True
        given = {"reset": reset, "lengths": torch.tensor([steps, steps - 1])}
        self.check(sample._replace(kwargs={**sample.kwargs, **given}), self.long_dtype)

    def test_kept_or_not_rows_and_checks(self) -> None:
        sample, parts = self.sample(), 1 + len(self.machine.state._fields)
        x, first, *rest = sample.args

        def call(x: Tensor, state: Any, trace: bool, save: bool) -> Any:
            raw = self.machine.raw(sample._replace(args=(x, state, *rest)))
            return self.forward(*raw, trace, save)

        kept, dropped = call(x, first, False, True), call(x, first, False, False)
        assert all(torch.equal(a, b) for a, b in zip(kept[:parts], dropped[:parts], strict=True))
        assert [a.numel() for a in dropped[parts:]] == [0] * len(dropped[parts:])
        assert all(a.numel() == 0 for a in kept[parts : self.machine.kept])
        bad = x.clone()
        bad[1, 1] = float("nan")  # stays in its row
        for k, (a, b) in enumerate(zip(call(bad, first, True, True), kept, strict=True)):
            if k < self.machine.outputs and b.numel():
                rows = 0 if 3 <= k < parts else (slice(None), 0)
                assert torch.equal(a[rows], b[rows])
        empty = self.machine.state(*(a[:, :0] if k < 2 else a[:0] for k, a in enumerate(first)))
        width = kept[0].size(-1)
        assert call(x[:, :0], empty, True, True)[0].shape == (len(x), 0, width)
        none = call(x[:0], first, True, True)
        assert none[0].shape == (0, 2, width)
        assert all(torch.equal(a, b) for a, b in zip(none[1:parts], first, strict=True))
        with pytest.raises(ValueError, match="expected memory of shape"):
            call(x, first._replace(memory=first.memory[:1]), True, True)

    def test_offsets_past_32_bits(self) -> None:
        tensors, options = self.machine.raw(self.sample())
        outs = self.forward(tensors, options, True, True)
        grad = torch.randn_like(outs[0])
        missing = [None] * (len(self.machine.learning_of(outs)) - 1)
        near, far = (
            self.backward((a, *missing), tensors, outs, options) for a in (grad, spread(grad, 0))
        )
        assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))
