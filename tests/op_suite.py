"""The tests that every op inherits: subclass OpSuite, name the cases, say how to make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from seqmem_fast import NTM

Function = Callable[..., tuple[Tensor, ...]]
Threaded = list[tuple[Callable[..., Any], tuple[Tensor | None, ...]]]


class Tolerance(NamedTuple):
    """Bounds of |a - b| / |b| against float64 (norms over a whole tensor).

    The 16-bit types also pass up to ``eager`` times the error of the eager reference in that type;
    their own bounds are a unit or so in the last place, where who is nearer is luck.
    """

    output: float
    gradient: float
    eager: float = 0.0

    def bound(self, is_output: bool, eager_error: float = 0.0) -> float:
        return max(self.output if is_output else self.gradient, self.eager * eager_error)


TOLERANCES = {
    torch.float64: Tolerance(1e-13, 1e-12),
    torch.float32: Tolerance(1e-5, 1e-4),
    torch.bfloat16: Tolerance(2**-8, 2**-7, eager=1.05),
    torch.float16: Tolerance(2**-11, 2**-10, eager=1.05),
}
DTYPES = list(TOLERANCES)


class Case(NamedTuple):
    """One way to call an op; all tensors, differentiable or not, are positional."""

    op: Function
    reference: Function
    tensors: tuple[Tensor | None, ...]
    batch_in: tuple[int | None, ...]  # the batch dimension of each tensor, where it has one
    batch_out: tuple[int | None, ...]  # and of each output


def sample_of(reference: ModuleType, name: str, **options: Any) -> Any:
    """The reference's sample of that name."""
    return next(sample for sample in reference.sample_inputs(**options) if sample.name == name)


class OpSuite:
    names: ClassVar[Sequence[str]]

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        """The case of that name, the same at every call; tiny for numerical derivatives."""
        raise NotImplementedError

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        """(OpOverload, arguments) of the op and of its backward op."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", metafunc.cls.names)

    @pytest.mark.isa
    @pytest.mark.sanitize
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_against_float64(self, name: str, dtype: torch.dtype) -> None:
        check_against_float64(self.case(name, dtype))

    @pytest.mark.sanitize
    def test_grad_mode_does_not_change_outputs(self, name: str) -> None:
        case = self.case(name, torch.float32)
        expected = case.op(*differentiable(case.tensors))
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                for a, b in zip(case.op(*case.tensors), expected, strict=True):
                    assert error(a, b.detach()) <= TOLERANCES[torch.float32].output

    @pytest.mark.slow
    def test_gradcheck(self, name: str) -> None:
        floats, call = split(self.case(name, tiny=True))
        assert torch.autograd.gradcheck(call, floats)

    @pytest.mark.slow
    def test_gradgradcheck(self, name: str) -> None:
        floats, call = split(self.case(name, tiny=True))
        assert torch.autograd.gradgradcheck(call, floats, fast_mode=True)

    def test_third_derivative(self) -> None:
        """By the first tensor."""
        case = self.case(self.names[0], tiny=True)
        for a, b in zip(derivatives(case.op, case), derivatives(case.reference, case), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.sanitize
    def test_partial_gradients(self, name: str) -> None:
        """Each input alone asks for its gradient, from each output alone."""
        case = self.case(name)
        tensors = differentiable(case.tensors)
        expected = case.reference(*tensors)
        outputs = case.op(*tensors)
        inputs = [t for t in tensors if t is not None and t.requires_grad]
        for a, b in zip(outputs, expected, strict=True):
            seed = torch.randn_like(a)
            ours = torch.autograd.grad(a, inputs, seed, retain_graph=True, allow_unused=True)
            theirs = torch.autograd.grad(b, inputs, seed, retain_graph=True, allow_unused=True)
            for p, q in zip(ours, theirs, strict=True):
                zero_or_equal(p, q)
        whole = torch.autograd.grad([o.sum() for o in expected], inputs)
        for k, tensor in enumerate(case.tensors):
            if tensor is None or not tensor.is_floating_point():
                continue
            alone = [
                t if j != k else tensor.clone().requires_grad_() for j, t in enumerate(case.tensors)
            ]
            (grad,) = torch.autograd.grad([o.sum() for o in case.op(*alone)], [alone[k]])
            zero_or_equal(
                grad, whole[sum(t is not None and t.is_floating_point() for t in case.tensors[:k])]
            )

    @pytest.mark.sanitize
    def test_any_strides(self, name: str) -> None:
        case = self.case(name)
        spread = tuple(None if t is None else strided(t) for t in case.tensors)
        assert any(t is not None and not t.is_contiguous() for t in spread)
        compare(case.op, case.op, spread, case.tensors)

    def test_noncontiguous_and_expanded_gradients(self, name: str) -> None:
        case = self.case(name)
        ours, theirs = differentiable(case.tensors), differentiable(case.tensors)
        for tensors, op in ((ours, case.op), (theirs, case.reference)):
            outputs = op(*tensors)
            seeds = [torch.ones((), dtype=o.dtype).expand_as(o) for o in outputs[1:]]
            torch.autograd.backward(outputs, [strided(torch.ones_like(outputs[0])), *seeds])
        for a, b in zip(ours, theirs, strict=True):
            if a is not None and a.requires_grad:
                zero_or_equal(a.grad, b.grad)

    @pytest.mark.isa
    @pytest.mark.sanitize
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_bad_values_stay_in_their_row(self, name: str, bad: float) -> None:
        case = self.case(name)
        if all(dim is None for dim in case.batch_in):
            pytest.skip("rows of this case are not along one dimension")
        clean = case.op(*case.tensors)
        row, spoiled = 1, []
        for tensor, dim in zip(case.tensors, case.batch_in, strict=True):
            if tensor is None or dim is None or not tensor.is_floating_point():
                spoiled.append(tensor)
            else:
                spoiled.append(tensor.clone())
                spoiled[-1].select(dim, row).fill_(bad)
        tensors = differentiable(spoiled)
        outputs = case.op(*tensors)
        assert any(not torch.isfinite(o).all() for o in outputs)
        for a, b in zip(outputs, case.reference(*spoiled), strict=True):
            torch.testing.assert_close(a.detach(), b, equal_nan=True)
        for a, b, dim in zip(outputs, clean, case.batch_out, strict=True):
            if dim is not None:
                torch.testing.assert_close(
                    without(a, dim, row), without(b, dim, row), rtol=0, atol=0
                )
        torch.autograd.backward([o.sum() for o in outputs])
        for tensor, dim in zip(tensors, case.batch_in, strict=True):
            if tensor is not None and dim is not None and tensor.requires_grad:
                assert torch.isfinite(without(tensor.grad, dim, row)).all()

    @pytest.mark.isa
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("threads", [1, 2])
    def test_scratch_memory_does_not_show(
        self, name: str, dtype: torch.dtype, threads: int, restored_threads: None
    ) -> None:
        """The same bits after calls that leave NaN in the memory that a thread keeps."""
        torch.set_num_threads(threads)
        case = self.case(name, dtype)
        expected = values_and_gradients(case.op, case.tensors)
        spoilt = all_nan(case.tensors)
        for spoil in (lambda: values_and_gradients(case.op, spoilt), fill_scratch_with_nan):
            leaves = differentiable(case.tensors)
            spoil()
            outputs = case.op(*leaves)
            spoil()
            found = [*outputs, *gradients_of(outputs, leaves)]
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.sanitize
    def test_empty_batch(self, name: str) -> None:
        case = self.case(name)
        if all(dim is None for dim in case.batch_in):
            pytest.skip("rows of this case are not along one dimension")
        pairs = zip(case.tensors, case.batch_in, strict=True)
        empty = [t if t is None or dim is None else t.narrow(dim, 0, 0) for t, dim in pairs]
        tensors = differentiable(empty)
        outputs = case.op(*tensors)
        for output, like, dim in zip(outputs, case.op(*case.tensors), case.batch_out, strict=True):
            assert output.shape == (like if dim is None else like.narrow(dim, 0, 0)).shape
        torch.autograd.backward([o.sum() for o in outputs])
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                torch.testing.assert_close(tensor.grad, torch.zeros_like(tensor))

    @pytest.mark.isa
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_same_bits_at_any_thread_count(
        self, name: str, dtype: torch.dtype, restored_threads: None
    ) -> None:
        check_same_bits_at_any_thread_count(self.case(name, dtype))

    def test_tensors_changed_before_backward(self, name: str) -> None:
        """As with torch's own ops: an error, unless the gradients do not depend on the tensor."""
        case = self.case(name)
        expected = values_and_gradients(case.op, case.tensors)
        noticed = 0
        for k, tensor in enumerate((*case.tensors, *expected[: len(case.batch_out)])):
            if tensor is None:
                continue
            tensors = [None if t is None else t.clone() for t in case.tensors]
            leaves = differentiable(tensors)
            outputs = case.op(*leaves)
            with torch.no_grad():
                changed = (*leaves, *outputs)[k]
                changed.copy_(~tensor if tensor.dtype == torch.bool else tensor + 1)
            try:
                found = gradients_of(outputs, leaves)
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                noticed += 1
            else:
                for a, b in zip(found, expected[len(outputs) :], strict=True):
                    assert torch.equal(a, b)
        assert noticed

    @pytest.mark.slow
    def test_opcheck(self, name: str) -> None:
        for op, args in self.raw_calls(name):
            torch.library.opcheck(op, args)

    @pytest.mark.sanitize
    def test_wrong_arguments_of_a_backward_are_refused(self, name: str) -> None:
        """Exported programs and compiled graphs call it too: wrong memory must stay untouched."""
        for op, args in self.raw_calls(name):
            if not op._opname.endswith("_backward"):
                continue
            says = rf"^seqmem::{op._opname}: expected .*got "
            check = getattr(torch.ops.seqmem, f"check_{op._opname}")
            leaves, spec = tree_flatten(args)
            for k, right in enumerate(leaves):
                if not isinstance(right, Tensor):
                    continue
                deeper = right[(None,) * 6]  # more dimensions than any broadcast one has
                wrongs = (right.new_zeros(0), deeper, right.cfloat(), right.to_sparse())
                for wrong in (*wrongs, right.to("meta")):
                    spoilt = tree_unflatten([*leaves[:k], wrong, *leaves[k + 1 :]], spec)
                    for call in (op, check):
                        with pytest.raises((ValueError, TypeError), match=says):
                            call(*spoilt)

    @pytest.mark.slow
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, name: str, dynamic: bool) -> None:
        case = self.case(name)
        torch.compiler.reset()
        compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        compare(compiled, case.op, case.tensors, case.tensors)

    def test_export(self, name: str) -> None:
        case = self.case(name)

        class Wrapped(torch.nn.Module):
            def forward(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
                return case.op(*tensors)

        program = torch.export.export(Wrapped(), case.tensors)
        assert any("seqmem" in str(node.target) for node in program.graph.nodes)
        for a, b in zip(program.module()(*case.tensors), case.op(*case.tensors), strict=True):
            torch.testing.assert_close(a, b)

    def test_autocast(self, name: str) -> None:
        case = self.case(name, torch.float32)
        tensors = differentiable(case.tensors)
        halved = differentiable(cast(case.tensors, torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16):
            outputs = case.op(*tensors)
        expected = case.op(*halved)
        for a, b in zip(outputs, expected, strict=True):
            assert a.dtype == b.dtype == torch.bfloat16
            assert torch.equal(a, b)
        torch.autograd.backward([o.float().sum() for o in outputs])
        torch.autograd.backward([o.float().sum() for o in expected])
        for a, b in zip(tensors, halved, strict=True):
            if a is not None and a.requires_grad:
                assert a.grad is not None and a.grad.dtype == torch.float32
                assert torch.equal(a.grad, b.grad.float())

    def test_func_transforms(self, name: str) -> None:
        """torch.func beside autograd through the op itself: its kernels, forward and backward."""
        case = self.case(name, tiny=True)
        first, rest = case.tensors[0], case.tensors[1:]

        def loss(x: Tensor) -> Tensor:
            return sum((o.sin().sum() for o in case.op(x, *rest)), x.new_zeros(()))

        leaf = first.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(first), expected)
        output = case.op(leaf, *rest)[0]
        rows = [torch.autograd.grad(o, leaf, retain_graph=True)[0] for o in output.flatten()]
        jacobian = torch.func.jacrev(lambda x: case.op(x, *rest)[0])(first)
        expected = torch.stack(rows).view(*output.shape, *first.shape)
        torch.testing.assert_close(jacobian, expected)
        many = torch.stack((first, 2 * first))
        mapped = torch.vmap(lambda x: case.op(x, *rest))(many)
        for k in range(2):
            for a, b in zip(mapped, case.op(many[k], *rest), strict=True):
                torch.testing.assert_close(a[k], b)


def check_against_float64(case: Case, name: str = "") -> None:
    """Outputs and gradients within the table's bounds of the float64 reference."""
    dtype = next(t.dtype for t in case.tensors if t is not None)
    tolerance = TOLERANCES[dtype]
    exact = values_and_gradients(case.reference, cast(case.tensors, torch.float64))
    ours = values_and_gradients(case.op, case.tensors)
    eager = values_and_gradients(case.reference, case.tensors)
    outputs = len(case.op(*case.tensors))
    for k, (a, b, e) in enumerate(zip(ours, exact, eager, strict=True)):
        assert a.dtype == dtype and a.shape == b.shape
        bound = tolerance.bound(k < outputs, error(e, b))
        assert error(a, b) <= bound, f"{name} value {k}: error {error(a, b):.2e} over {bound:.2e}"


def check_same_bits_at_any_thread_count(case: Case) -> None:
    """For tests with the fixture `restored_threads`."""
    runs = []
    for threads in (1, 2, 3, 4, 2):
        torch.set_num_threads(threads)
        runs.append(values_and_gradients(case.op, case.tensors))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert torch.equal(a, b)


def derivatives(op: Function, case: Case) -> list[Tensor]:
    """The first three by the first tensor, each of a power of the one before."""
    x = case.tensors[0].clone().requires_grad_()
    results, value = [], op(x, *case.tensors[1:])[0].pow(3).sum()
    for _ in range(3):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        results.append(grad)
        value = grad.pow(2).sum()
    return results


def all_nan(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [
        torch.full_like(t, torch.nan) if t is not None and t.is_floating_point() else t
        for t in tensors
    ]


def fill_scratch_with_nan() -> None:
    """A megabyte at the start of this thread's scratch memory: an NTM's packed weights."""
    model = NTM(4, 4, 256, 8, 4)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    with torch.no_grad():
        model(torch.zeros(1, 1, 4))


def error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, and |a| where b is zero."""
    a, b = a.detach().double(), b.detach().double()
    scale = b.norm()
    return float((a - b).norm() / (scale if scale > 0 else 1))


def differentiable(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Leaves over the same memory, with the same strides, that ask for a gradient."""
    return [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]


def cast(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def strided(t: Tensor) -> Tensor:
    """The same values with gaps between them and, where possible, dimensions in another order."""
    wide = t.new_zeros([2 * n for n in t.shape[::-1]]).permute(*range(t.dim() - 1, -1, -1))
    return wide[tuple(slice(None, 2 * n, 2) for n in t.shape)].copy_(t)


def without(t: Tensor, dim: int, row: int) -> Tensor:
    return torch.cat((t.narrow(dim, 0, row), t.narrow(dim, row + 1, t.size(dim) - row - 1)), dim)


def split(case: Case) -> tuple[tuple[Tensor, ...], Callable[..., tuple[Tensor, ...]]]:
    """The differentiable tensors, and the op as a function of these alone."""
    where = [k for k, t in enumerate(case.tensors) if t is not None and t.is_floating_point()]
    floats = tuple(case.tensors[k].detach().clone().requires_grad_() for k in where)  # type: ignore[union-attr]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        tensors = list(case.tensors)
        for k, value in zip(where, values, strict=True):
            tensors[k] = value
        return case.op(*tensors)

    return floats, call


def values_and_gradients(op: Function, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Outputs, then the gradients of a loss that weighs every element differently."""
    leaves = differentiable(tensors)
    outputs = op(*leaves)
    return [o.detach() for o in outputs] + gradients_of(outputs, leaves)


def gradients_of(outputs: Sequence[Tensor], leaves: Sequence[Tensor | None]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.rand(o.shape, generator=generator, dtype=torch.float64) - 0.3 for o in outputs]
    inputs = [t for t in leaves if t is not None and t.requires_grad]
    return list(
        torch.autograd.grad(
            outputs, inputs, [s.to(o.dtype) for s, o in zip(seeds, outputs, strict=True)]
        )
    )


def compare(
    op: Function, other: Function, tensors: Sequence[Tensor | None], others: Sequence[Tensor | None]
) -> None:
    found = values_and_gradients(op, tensors)
    for a, b in zip(found, values_and_gradients(other, others), strict=True):
        torch.testing.assert_close(a, b)


def zero_or_equal(a: Tensor | None, b: Tensor | None) -> None:
    """Equal, where None stands for zeros."""
    if a is None or b is None:
        rest = b if a is None else a
        assert rest is None or not rest.any()
    else:
        torch.testing.assert_close(a, b)


def check_nothing_left_over(case: Case, larger: Case) -> None:
    """Scratch memory full of NaN, as calls with NaN leave it, does not show in the next one."""
    clean = values_and_gradients(case.op, case.tensors)
    for spoilt in (larger, case):
        left = values_and_gradients(spoilt.op, all_nan(spoilt.tensors))
        assert all(t.isnan().any() for t in left)
    again = values_and_gradients(case.op, case.tensors)
    for found, wanted in zip(again, clean, strict=True):
        assert found.isfinite().all() and torch.equal(found, wanted)
