"""The delta memory: the inherited suites, edges of its own, and transformers' implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hostile_suite import Bad, HostileSuite, Target
from op_suite import (
    TOLERANCES,
    Case,
    OpSuite,
    Threaded,
    cast,
    check_against_float64,
    check_same_bits_at_any_thread_count,
    differentiable,
    error,
    gradients_of,
    values_and_gradients,
)
from torch import Tensor

from seqmem_fast import ops
from seqmem_fast.reference import delta_memory as reference
from seqmem_fast.reference.common import Sample

Sizes = tuple[int, int, int, int, int]
NAMES = [sample.name for sample in reference.sample_inputs()]
OPTIONS = ("log_decay", "state", "lengths", "reset")


def bound(module: Any, sample: Sample) -> Callable[..., tuple[Tensor, ...]]:
    """Of q, k, v, beta and OPTIONS; the final state in q's dtype, as the suites want it."""
    constants = {k: v for k, v in sample.kwargs.items() if k not in OPTIONS}

    def call(q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        *operands, decay, state, lengths, reset = rest
        options = {"lengths": lengths, "reset": reset, **constants}
        output, final = module.delta_memory(q, *operands, decay, state, **options)
        return output, final.to(q.dtype)

    return call


def case_of(sample: Sample) -> Case:
    args = (*sample.args, None, None)[:6]
    tensors = (*args, sample.kwargs.get("lengths"), sample.kwargs.get("reset"))
    return Case(bound(ops, sample), bound(reference, sample), tensors, (0,) * 8, (0, 0))


def sample_of(name: str, sizes: Sizes = (3, 5, 2, 4, 3), dtype: Any = torch.float64) -> Sample:
    samples = reference.sample_inputs(dtype=dtype, sizes=sizes)
    return next(s for s in samples if s.name == name)


def sized(name: str, sizes: Sizes, dtype: torch.dtype = torch.float64) -> Case:
    return case_of(sample_of(name, sizes, dtype))


def threaded() -> Threaded:
    """Calls below and above the size at which one takes several threads."""
    cases = [sized("plain", one, torch.float32) for one in ((1, 3, 1, 5, 6), (2, 80, 2, 64, 40))]
    return [(case.op, case.tensors) for case in cases]


class TestDeltaMemory(OpSuite):
    names = NAMES

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        return sized(name, (2, 3, 1, 3, 2) if tiny else (3, 5, 2, 4, 3), dtype)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        case, sample = self.case(name), sample_of(name)
        *operands, lengths, reset = case.tensors
        constants = sample.kwargs.get("scale"), sample.kwargs.get("qk_l2norm", False)
        arguments = (*operands, *constants, lengths, reset)
        output, final, states = torch.ops.seqmem.delta_memory(*arguments, True)
        leaves = tuple(
            a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in arguments
        )
        grads = torch.ones_like(output), torch.ones_like(final)
        mask = [t is not None for t in operands]
        return [
            (torch.ops.seqmem.delta_memory.default, (*leaves, False)),
            (torch.ops.seqmem.delta_memory_backward.default, (*grads, *arguments, states, mask)),
        ]

    def test_autocast(self, name: str) -> None:
        """q, k and v in 16 bits, what the memory is made of in float32."""
        case = self.case(name, torch.float32)
        tensors, halved = differentiable(case.tensors), differentiable(case.tensors)
        with torch.autocast("cpu", torch.bfloat16):
            output, final = case.op(*tensors)
        assert output.dtype == torch.bfloat16 and final.dtype == torch.float32
        outputs = output, final.bfloat16()
        expected = case.op(*(t.bfloat16() for t in halved[:3]), *halved[3:])
        torch.autograd.backward([o.float().sum() for o in outputs])
        torch.autograd.backward([o.float().sum() for o in expected])
        for a, b in zip((*outputs, *tensors), (*expected, *halved), strict=True):
            if a is not None and a.is_floating_point():
                assert torch.equal(a, b)
                assert a.grad_fn is not None or torch.equal(a.grad, b.grad)


@pytest.mark.isa
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sizes(name: str, dtype: torch.dtype) -> None:
    """Around the widths of vectors and slices, and the lengths of runs and segments."""
    for sizes in ((1, 1, 1, 2, 1), (2, 17, 1, 8, 9), (1, 33, 3, 5, 33), (2, 16, 1, 33, 4)):
        check_against_float64(sized(name, sizes, dtype), str(sizes))
    if dtype == torch.float32:
        for sizes in ((1, 70, 1, 64, 64), (1, 70, 1, 129, 100)):
            check_against_float64(sized(name, sizes, dtype), str(sizes))


@pytest.mark.isa
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_at_any_thread_count(name: str, restored_threads: None) -> None:
    for sizes in ((1, 60, 1, 64, 160), (3, 40, 3, 40, 50)):
        check_same_bits_at_any_thread_count(sized(name, sizes, torch.float32))


@pytest.mark.isa
@pytest.mark.parametrize("name", ["gated", "by_feature"])
@pytest.mark.parametrize("cuts", [(1, 2), (16,), (7, 23, 40)])
def test_a_stream_cut_anywhere_equals_the_whole(name: str, cuts: tuple[int, ...]) -> None:
    sample = sample_of(name, (2, 41, 1, 9, 10))
    leaves = differentiable(sample.args)
    whole = ops.delta_memory(*leaves, **sample.kwargs)
    expected = [*whole, *gradients_of(whole, leaves)]
    *series, state = differentiable(sample.args)
    outputs, memory = [], state
    for begin, end in zip((0, *cuts), (*cuts, 41), strict=True):
        part = [x[:, begin:end] for x in series]
        output, memory = ops.delta_memory(*part, memory, **sample.kwargs)
        outputs.append(output)
    joined = (torch.cat(outputs, 1), memory)
    found = [*joined, *gradients_of(joined, [*series, state])]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.isa
def test_rows_without_steps_hand_their_memory_on() -> None:
    sample = sample_of("gated", dtype=torch.float32)
    *series, state = differentiable(sample.args)
    output, final = ops.delta_memory(*series, state, lengths=torch.tensor([0, 5, 0]))
    assert torch.equal(final[0], state[0]) and output[0].eq(0).all()
    final.square().sum().backward()
    assert torch.equal(state.grad[2], 2 * state.detach()[2]) and series[0].grad[0].eq(0).all()
    empty = [x[:, :0] for x in series]
    output, final = ops.delta_memory(*empty, state)
    assert output.shape == (3, 0, 2, 3) and torch.equal(final, state)
    assert ops.delta_memory(*empty)[1].eq(0).all()


@pytest.mark.isa
def test_what_stands_beyond_the_end_is_not_read() -> None:
    sample = sample_of("gated", dtype=torch.float32)
    lengths = torch.tensor([2, 5, 0])
    found = []
    for rest in (0.0, float("nan")):
        args = [x.clone() for x in sample.args]
        for x in args[:5]:
            for row, length in enumerate(lengths.tolist()):
                x[row, length:] = rest
        leaves = differentiable(args)
        outputs = ops.delta_memory(*leaves, **sample.kwargs, lengths=lengths)
        found.append([*outputs, *gradients_of(outputs, leaves)])
    assert all(map(torch.equal, *found))


@pytest.mark.isa
def test_reset_begins_anew() -> None:
    """As two calls, even after a memory that is infinite."""
    *series, state = sample_of("gated", (2, 40, 1, 9, 10)).args
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[:, 19] = True
    spoilt = [x.clone() for x in series]
    spoilt[2][:, 3] = torch.inf
    output, final = ops.delta_memory(*spoilt, state, reset=reset)
    rest, last = ops.delta_memory(*(x[:, 19:] for x in series))
    torch.testing.assert_close(output[:, 19:], rest, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(final, last, rtol=1e-12, atol=1e-13)
    leaves = differentiable([*series, state])
    (ops.delta_memory(*leaves, reset=reset)[1]).sum().backward()
    assert leaves[-1].grad.eq(0).all() and leaves[0].grad.eq(0).all()
    assert leaves[1].grad[:, :19].eq(0).all() and leaves[1].grad[:, 19:].any()


@pytest.mark.isa
@pytest.mark.parametrize("by_feature", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_extreme_gates_and_long_keys(dtype: torch.dtype, by_feature: bool) -> None:
    """beta 0 and 2, decays of 0 and 1 and nearly so, keys of norms 0 to 1.3: values, gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, 1, 8, dtype=torch.float64) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1) * torch.linspace(0, 1.3, 40)[:, None, None]
    beta = torch.tensor([0.0, 2.0, 1.0, 0.5]).double().repeat(2, 10)[..., None]
    extremes = torch.tensor([-torch.inf, 0.0, -1e-9, -100.0, -0.1, -0.1, -1e4]).double()
    decay = extremes[torch.arange(80) % 7].view(2, 40, 1)
    if by_feature:
        decay = decay[..., None] + torch.tensor([0.0, -0.5]).double().repeat(4)
        decay[:, 5::9, :, 2] = -torch.inf
    state = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    tensors = (q, k, v, beta, decay, state)
    sample = Sample("", tuple(cast(tensors, dtype)))
    exact = values_and_gradients(
        case_of(sample).reference, cast(case_of(sample).tensors, torch.float64)
    )
    found = values_and_gradients(case_of(sample).op, case_of(sample).tensors)
    for a, b in zip(found, exact, strict=True):
        assert a.isfinite().all() and error(a, b) < (1e-12 if dtype == torch.float64 else 1e-5)
    assert found[-2][decay == -torch.inf].eq(0).all()  # of the decay where it is -inf


@pytest.mark.parametrize("by_feature", [False, True])
def test_ten_thousand_steps(by_feature: bool) -> None:
    """Values and gradients of float32 beside those of float64."""
    torch.manual_seed(0)
    steps = 10_000
    q, k = (torch.randn(1, steps, 1, 8) for _ in range(2))
    v, beta = torch.randn(1, steps, 1, 4), torch.rand(1, steps, 1)
    decay = -torch.rand(1, steps, 1, *([8] if by_feature else [])) * 0.01
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = differentiable(cast((q, k, v, beta, decay), dtype))
        outputs = ops.delta_memory(*leaves, qk_l2norm=True)
        results.append([*outputs, *gradients_of(outputs, leaves)])
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 2e-6
        assert error(a[:, -100:], b[:, -100:]) < 2e-6


def test_wide_and_narrow_gates_beside_16_bits() -> None:
    sample = sample_of("gated", dtype=torch.bfloat16)
    q, k, v, beta, decay, state = sample.args
    wide = [x.float().requires_grad_() for x in (beta, decay, state)]
    output, final = ops.delta_memory(q, k, v, *wide)
    narrow = ops.delta_memory(q, k, v, beta, decay, state)
    assert output.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert torch.equal(output, narrow[0]) and torch.equal(final, narrow[1])
    final.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in wide)


def test_rows_of_a_wider_tensor_are_read_in_place() -> None:
    mixed = torch.randn(2, 9, 3 * 2 * 8)
    q, k, v = (x.view(2, 9, 2, 8) for x in mixed.chunk(3, -1))
    beta = torch.rand(2, 9, 2)
    found = ops.delta_memory(q, k, v, beta, qk_l2norm=True)
    copies = ops.delta_memory(q.contiguous(), k.contiguous(), v.contiguous(), beta, qk_l2norm=True)
    assert all(map(torch.equal, found, copies))


def test_equals_transformers() -> None:
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, beta, decay, state = sample_of("gated", (2, 70, 2, 16, 16), torch.float32).args
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    found = ops.delta_memory(q, k, v, beta, decay, state, qk_l2norm=True)
    for function in (qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule):
        theirs = function(q, k, v, g=decay, beta=beta, **options)
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)


# ---- wrong arguments

x = torch.zeros
WRONG = [
    Bad("q unbatched", {"q": x(5, 2, 4)}, ValueError, "q with 4 dimensions, got 3"),
    Bad("q integer", {"q": x(3, 5, 2, 4).long()}, TypeError, "q of dtype"),
    Bad("q sparse", {"q": x(3, 5, 2, 4).to_sparse()}, TypeError, "q to be a dense"),
    Bad("q no heads", {"q": x(3, 5, 0, 4)}, ValueError, "at least one head and one feature"),
    Bad("q no features", {"q": x(3, 5, 2, 0)}, ValueError, "at least one head and one feature"),
    Bad("k heads", {"k": x(3, 5, 4, 4)}, ValueError, r"k of shape \[3, 5, 2, 4\]"),
    Bad("k dtype", {"k": x(3, 5, 2, 4).double()}, TypeError, "k of q's dtype"),
    Bad("v dims", {"v": x(3, 5, 4)}, ValueError, "v with 4 dimensions"),
    Bad("v heads", {"v": x(3, 5, 3, 3)}, ValueError, "v with a multiple of q's 2 heads, got 3"),
    Bad("v steps", {"v": x(3, 4, 4, 3)}, ValueError, r"v of shape \[3, 5, 4, 3\]"),
    Bad("beta heads", {"beta": x(3, 5, 2)}, ValueError, r"beta of shape \[3, 5, 4\]"),
    Bad("beta dtype", {"beta": x(3, 5, 4).double()}, TypeError, "beta of q's dtype"),
    Bad("decay dims", {"log_decay": x(3, 5)}, ValueError, r"log_decay of shape \[3, 5, 4\]"),
    Bad("decay wide", {"log_decay": x(3, 5, 4, 3)}, ValueError, r"shape \[3, 5, 4, 4\]"),
    Bad("decay dtype", {"log_decay": x(3, 5, 4).half()}, TypeError, "log_decay of q's dtype"),
    Bad("state turned", {"state": x(3, 4, 3, 4)}, ValueError, r"state of shape \[3, 4, 4, 3\]"),
    Bad("state sparse", {"state": x(3, 4, 4, 3).to_sparse()}, TypeError, "state to be a dense"),
    Bad("lengths long", {"lengths": torch.tensor([1, 6, 0])}, ValueError, "in 0..5, got 6", True),
    Bad("lengths negative", {"lengths": torch.tensor([1, -1, 0])}, ValueError, "got -1", True),
    Bad("lengths floating", {"lengths": x(3)}, TypeError, "lengths of dtype int64 or int32"),
    Bad("reset turned", {"reset": x(5, 3).bool()}, ValueError, r"reset of shape \[3, 5\]"),
    Bad("reset floating", {"reset": x(3, 5)}, TypeError, "reset of dtype bool"),
]


def right() -> dict[str, Any]:
    args = dict(
        zip(("q", "k", "v", "beta", "log_decay", "state"), sample_of("ended").args, strict=True)
    )
    narrow = {name: value.float() for name, value in args.items()}
    return {**narrow, "lengths": torch.tensor([2, 5, 0]), "reset": x(3, 5).bool()}


class TestHostile(HostileSuite):
    targets = (Target("delta_memory", ops.delta_memory, right, WRONG, on_cpu=("lengths",)),)
