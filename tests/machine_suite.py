"""The tests that every machine's op inherits (machines.py): OpSuite's, those of sequences, and what
is wrong with arguments in the same way for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hostile_suite import Bad, Target
from machines import BATCH, SIZES, Machine, Sizes
from op_suite import Case, OpSuite, check_against_float64, error, split, values_and_gradients
from torch import Tensor
from torch.utils._pytree import tree_leaves

SHORT = (4, *SIZES[1:])  # the eager reference's time goes by its steps; resets are in the fourth
TINY = (2, 2, 2, 2, 5, 2)


class MachineSuite(OpSuite):
    machine: ClassVar[Machine]
    odd_sizes: ClassVar[Sequence[tuple[str, Sizes, dict[str, Any]]]]  # options of sample_inputs
    long: ClassVar[Sizes]
    defaults: ClassVar[dict[str, Any]] = {}  # options of every case

    def of(self, sample: Any) -> Case:
        return self.machine.case(sample, **self.defaults)

    def case(self, name: str, dtype: torch.dtype = torch.float64, tiny: bool = False) -> Case:
        return self.of(self.machine.sample(name, dtype, TINY if tiny else SIZES))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        suite = metafunc.cls
        if "other" in metafunc.fixturenames:
            others = [name for name in suite.machine.names if name not in suite.names]
            metafunc.parametrize("other", others)
        if "odd" in metafunc.fixturenames:
            metafunc.parametrize("odd", suite.odd_sizes, ids=str)

    def test_gradgradcheck(self, name: str) -> None:
        """Of one vector of all inputs to one of all outputs: a few directions, not every pair."""
        floats, call = split(self.case(name, tiny=True))
        sizes = [t.numel() for t in floats]

        def joined(values: Tensor) -> Tensor:
            parts = zip(values.split(sizes), floats, strict=True)
            return torch.cat([o.flatten() for o in call(*(v.view_as(t) for v, t in parts))])

        values = torch.cat([t.detach().flatten() for t in floats]).requires_grad_()
        assert torch.autograd.gradgradcheck(joined, (values,), fast_mode=True)

    def raw_calls(self, name: str) -> list[tuple[Any, tuple[Any, ...]]]:
        machine, calls = self.machine, torch.ops.seqmem
        tensors, options = machine.raw(machine.sample(name))
        forward = getattr(calls, machine.op).default
        backward = getattr(calls, f"{machine.op}_backward").default
        found = forward(*tensors, *options, True, True)
        # The elements beyond the slots and of rows that have ended have no meaning.
        saved = [torch.nan_to_num(t) for t in found[-2:]]
        kept = [found[0], *found[machine.kept : -2], *saved]
        grads = [torch.ones_like(t) for t in machine.learning_of(found)]
        return [
            (forward, (*machine.leaves(tensors), *options, False, False)),
            (backward, (*grads, *tensors, *kept, *options, [True] * 4)),
        ]

    @pytest.mark.isa
    @pytest.mark.sanitize
    def test_other_options_against_float64(self, other: str) -> None:
        for dtype in (torch.float32, torch.float64):
            check_against_float64(self.of(self.machine.sample(other, dtype, SHORT)), other)

    @pytest.mark.isa
    @pytest.mark.sanitize
    def test_odd_sizes(self, odd: tuple[str, Sizes, dict[str, Any]]) -> None:
        """Tails of vectors of every kind, several segments, a controller of one unit."""
        name, sizes, options = odd
        sample = self.machine.sample(name, sizes=sizes, **options)
        case = self.of(sample)
        for a, b in zip(
            values_and_gradients(case.op, case.tensors),
            values_and_gradients(case.reference, case.tensors),
            strict=True,
        ):
            assert error(a, b) <= 1e-10
        for a, b in zip(
            tree_leaves(self.machine.trace(*sample.args, **sample.kwargs)),
            tree_leaves(self.machine.exact(*sample.args, **sample.kwargs)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

    @pytest.mark.sanitize
    def test_chunks_equal_the_whole(self) -> None:
        input, *rest = self.machine.sample(sizes=(9, 3, 4, 6, 8, 5)).args
        whole, last = self.machine.run(input, *rest)
        first, middle = self.machine.run(input[:4], *rest)
        second, end = self.machine.run(input[4:], middle, *rest[1:])
        torch.testing.assert_close(torch.cat((first, second)), whole)
        torch.testing.assert_close(tuple(end), tuple(last))

    @pytest.mark.sanitize
    def test_no_steps_hand_the_state_through(self) -> None:
        input, state, *rest = self.machine.sample(dtype=torch.float32).args
        parts = [t.clone().requires_grad_() for t in self.machine.learning(state)]
        names = self.machine.learning(self.machine.state._fields)
        start = state._replace(**dict(zip(names, parts, strict=True)))
        features, final, trace = self.machine.trace(input[:0], start, *rest)
        width = state.hidden.size(-1) + state.reads[0].numel()
        assert features.shape == (0, 3, width)
        expected = self.machine.exact(input[:0], state, *rest)[2]
        for a, b in zip(tree_leaves(trace), tree_leaves(expected), strict=True):
            assert a.shape == b.shape and a.shape[:2] == (0, 3)
        assert all(torch.equal(a, b) for a, b in zip(final, state, strict=True))
        for part, end in zip(parts, self.machine.learning(final), strict=True):
            (grad,) = torch.autograd.grad(end.sum(), part, retain_graph=True)
            assert torch.equal(grad, torch.ones_like(part))

    @pytest.mark.sanitize
    def test_an_ended_row_keeps_its_state(self) -> None:
        """Also where a reset stands in its padding, and whatever the padding holds."""
        sample = self.machine.sample(self.machine.padded)
        input, state, *rest = sample.args
        lengths, reset = torch.tensor([0, 2, 5]), torch.ones(5, 3, dtype=torch.bool)
        reset[:2] = False
        input = input.clone()
        input[2:, 1] = float("nan")
        kwargs = {**sample.kwargs, "lengths": lengths, "reset": reset}
        features, final, trace = self.machine.trace(input, state, *rest, **kwargs)
        assert not features[:, 0].any()
        assert not any(a[2:, 1].any() for a in tree_leaves(trace))
        for part, first, dim in zip(final, state, BATCH, strict=False):
            assert torch.equal(part.select(dim, 0), first.select(dim, 0))
        case = self.of(sample._replace(args=(input, state, *rest), kwargs=kwargs))
        found = values_and_gradients(case.op, case.tensors)
        right = values_and_gradients(case.reference, case.tensors)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b)

    def test_long_sequences_train_in_little_memory(self) -> None:
        """Between checkpoints the largest part of the state is formed again: what is kept grows
        slower than its size times T."""
        sample = self.machine.sample(dtype=torch.float32, sizes=self.long)
        tensors, options = self.machine.raw(sample)
        op = getattr(torch.ops.seqmem, self.machine.op)
        *_, saved, checkpoints = op(*tensors, *options, True, True)
        segments = -(-self.long[0] // 32)  # of sqrt(T) steps
        kept = saved.numel() + segments * checkpoints[0].numel()
        assert kept < self.long[0] * max(t.numel() for t in sample.args[1]) / 8


def arguments(machine: Machine) -> dict[str, Any]:
    """Right ones, the state's parts apart, weight and bias of the head values last."""
    input, state, controller, weight, bias = machine.sample(dtype=torch.float32).args
    names = "interface" if machine.norm else "head"
    last = {f"{names}_weight": weight, f"{names}_bias": bias}
    return {"input": input, **state._asdict(), "controller": list(controller), **last}


def initial(machine: Machine, **change: Tensor) -> Any:
    """A state without a batch."""
    state = machine.sample(dtype=torch.float32).args[1]
    parts = (t.select(dim, 0) for t, dim in zip(state, BATCH, strict=False))
    return machine.state(*parts)._replace(**change)


def target(machine: Machine, rows: Sequence[Bad], *compiled: str) -> Target:
    """Of the hostile suite; compiled: rows to try there beside some that all machines share."""

    def call(input: Tensor, **rest: Any) -> Any:
        state = machine.state(*(rest.pop(name) for name in machine.state._fields))
        return machine.run(input, state, **rest)

    every = [*shared_rows(machine), *rows]
    names = ("input 2-D", "memory dtype", "weight_ih", "initial batched", *compiled)
    return Target(machine.op, call, partial(arguments, machine), every, compiled=names)


def shared_rows(machine: Machine) -> list[Bad]:
    """What is wrong alike for all machines."""
    z = torch.zeros
    T, B, width, C, N, M = SIZES
    given = arguments(machine)
    weight, bias = list(given)[-2:]
    rows, read = given[bias].numel(), given["reads"].size(1) * M
    start = initial(machine)
    mask = z(T, B).bool()

    def layer(index: int, value: Tensor) -> dict[str, Any]:
        tensors = list(given["controller"])
        tensors[index] = value
        return {"controller": tensors}

    first = rf"controller\[0\] of shape \[{4 * C}, {3 + read}\]"
    four = "4 controller tensors a layer"
    beside = f"initial of {len(start)} tensors beside reset"
    batched = {"reset": mask, "initial": initial(machine, memory=z(B, N, M))}
    half = {"initial": initial(machine, reads=start.reads.half())}
    return [
        Bad("input 2-D", {"input": z(T, width)}, ValueError, "input with 3 dimensions"),
        Bad("input width", {"input": z(T, B, 3)}, ValueError, first),
        Bad("input rows", {"input": z(T, 2, width)}, ValueError, "hidden of shape"),
        Bad("input integer", {"input": z(T, B, width).int()}, TypeError, "input of dtype"),
        Bad("input sparse", {"input": z(T, B, width).to_sparse()}, TypeError, "dense"),
        Bad("hidden layers", {"hidden": z(2, B, C)}, ValueError, r"\[1, 3, 6\], got \[2, 3, 6\]"),
        Bad("cell width", {"cell": z(1, B, 5)}, ValueError, "cell of shape"),
        Bad("memory 2-D", {"memory": z(N, M)}, ValueError, "memory with 3 dimensions"),
        Bad("memory without slots", {"memory": z(B, 0, M)}, ValueError, "memory with slots"),
        Bad("memory of width 0", {"memory": z(B, N, 0)}, ValueError, "memory with slots"),
        Bad("memory rows", {"memory": z(2, N, M)}, ValueError, "memory of shape"),
        Bad("memory dtype", {"memory": z(B, N, M).double()}, TypeError, "memory"),
        Bad("reads heads", {"reads": z(B, 3, M)}, ValueError, "reads of shape"),
        Bad("no controller", {"controller": []}, ValueError, f"{four}, got 0"),
        Bad("3 tensors", {"controller": [z(24, 9)] * 3}, ValueError, four),
        Bad("weight_ih", layer(0, z(4 * C, width)), ValueError, r"controller\[0\] of shape"),
        Bad("weight_hh", layer(1, z(4 * C, 5)), ValueError, r"controller\[1\] of shape"),
        Bad("bias_ih", layer(2, z(C)), ValueError, r"controller\[2\] of shape"),
        Bad("bias_hh dtype", layer(3, z(4 * C).half()), TypeError, r"controller\[3\]"),
        Bad(f"{weight} rows", {weight: z(rows - 1, C)}, ValueError, f"{weight} of shape"),
        Bad(f"{weight} empty", {weight: z(rows, 0)}, ValueError, f"{weight} with columns"),
        Bad(bias, {bias: z(rows - 1)}, ValueError, f"{bias} of shape"),
        Bad("controller type", {"controller_type": "gru"}, ValueError, "controller_type"),
        Bad("reset alone", {"reset": mask}, ValueError, beside),
        Bad("reset shape", {"reset": mask.t(), "initial": start}, ValueError, "reset of shape"),
        Bad("reset dtype", {"reset": z(T, B), "initial": start}, TypeError, "reset of dtype bool"),
        Bad("initial batched", batched, ValueError, "initial.memory of shape"),
        Bad("initial dtype", half, TypeError, "initial.reads"),
        Bad("lengths size", {"lengths": torch.ones(2).long()}, ValueError, "lengths of shape"),
        Bad("lengths float", {"lengths": torch.ones(3)}, TypeError, "lengths of dtype"),
        Bad("lengths negative", {"lengths": torch.tensor([1, -1, 2])}, ValueError, "got -1", True),
        Bad("lengths too long", {"lengths": torch.tensor([1, 6, 2])}, ValueError, "got 6", True),
    ]
