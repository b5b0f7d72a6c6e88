"""Wrong arguments, tests that every op inherits: always the same clear exception, never a crash.

Subclass HostileSuite and list the targets: an op, a right call of it, and a table of changes that
make the call wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

MODES: dict[str, Callable[[], Any]] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


class Bad(NamedTuple):
    """One row of a table: what to change in the right arguments, and how the op refuses it."""

    name: str
    change: dict[str, Any]
    error: type[Exception]
    says: str  # a pattern that the message must contain
    needs_values: bool = False  # meta tensors have none
    in_python: bool = False  # refused before any op is called, where Dynamo has errors of its own


class Target(NamedTuple):
    """An op under attack."""

    op: str  # its name in the dispatcher
    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]  # right ones, of call; the first one is a tensor
    rows: Sequence[Bad]
    variants: Sequence[dict[str, Any]] = ({},)  # options under which all rows are refused alike
    compiled: Collection[str] | None = None  # names of the rows tried under torch.compile; all
    on_cpu: Collection[str] = ()  # arguments that stay on the CPU, whatever the others' device


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    return [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]


def on_meta(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.to("meta"), value)


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_() if t.is_floating_point() or t.is_complex() else t


def message_of(target: Target, bad: Bad, call: Callable[[], Any]) -> str:
    """The first line of what `call` raises, once it is as the row says."""
    with pytest.raises(bad.error) as caught:
        call()
    message = str(caught.value)
    assert re.match(rf"seqmem::{target.op}: expected .*got ", message, re.DOTALL), message
    assert re.search(bad.says, message), message
    return message.split("\n")[0]


EXOTIC: dict[str, Callable[[Tensor], Tensor]] = {
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "mkldnn": Tensor.to_mkldnn,
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[0]]),
}
ROWS_FOR: dict[str, Callable[[Target, Bad], bool]] = {  # the tests that leave some rows out
    "test_refused_on_meta": lambda target, bad: not bad.needs_values,
    "test_refused_compiled": lambda target, bad: (
        target.compiled is None or bad.name in target.compiled
    ),
}


class HostileSuite:
    targets: ClassVar[Sequence[Target]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        targets = metafunc.cls.targets
        if "bad" in metafunc.fixturenames:
            is_for = ROWS_FOR.get(metafunc.function.__name__, lambda target, bad: True)
            rows = [(t, bad) for t in targets for bad in t.rows if is_for(t, bad)]
            ids = [f"{target.op}-{bad.name}" for target, bad in rows]
            metafunc.parametrize(("target", "bad"), rows, ids=ids)
        else:
            metafunc.parametrize("target", targets, ids=[target.op for target in targets])

    def test_the_unchanged_arguments_are_right(self, target: Target) -> None:
        """Else the table would prove nothing."""
        for options in target.variants:
            outputs = tree_leaves(target.call(**target.arguments(), **options))
            assert all(torch.isfinite(o).all() for o in outputs if isinstance(o, Tensor))

    @pytest.mark.sanitize
    def test_refused_alike_in_every_grad_mode(self, target: Target, bad: Bad) -> None:
        given = {**target.arguments(), **bad.change}
        tracked = tree_map_only(Tensor, leaf, given)
        assert any(t.requires_grad for t in tensors_of(tracked)) or "integer" in bad.name
        messages = set()
        for options in target.variants:
            call = partial(target.call, **options)
            for mode in MODES.values():
                with mode():
                    messages.add(message_of(target, bad, partial(call, **given)))
            messages.add(message_of(target, bad, partial(call, **tracked)))
        assert len(messages) == 1
        if bad.needs_values:  # a transform shows none
            return

        # There plain PyTorch runs, which would broadcast or name no op.
        def transformed(one: Tensor) -> Tensor:
            target.call(**given)
            return one

        message_of(target, bad, lambda: torch.func.grad(transformed)(torch.ones(())))

    @pytest.mark.sanitize
    def test_refused_on_meta(self, target: Target, bad: Bad) -> None:
        given = {**target.arguments(), **bad.change}
        moved = {k: v if k in target.on_cpu else on_meta(v) for k, v in given.items()}
        message_of(target, bad, lambda: target.call(**moved))

    @pytest.mark.slow
    def test_refused_compiled(self, target: Target, bad: Bad) -> None:
        torch.compiler.reset()
        # Dynamo takes no sparse tensors.
        dense = all(t.layout == torch.strided for t in tensors_of(bad.change))
        whole = dense and not bad.in_python
        compiled = torch.compile(target.call, backend="eager", fullgraph=whole)
        given = {**target.arguments(), **bad.change}
        message_of(target, bad, lambda: compiled(**given))

    @pytest.mark.sanitize
    def test_devices_do_not_mix(self, target: Target) -> None:
        given = target.arguments()
        for name, value in given.items():
            if tensors_of({name: value}):
                with pytest.raises(TypeError, match=rf"seqmem::{target.op}: expected .*(meta|cpu)"):
                    target.call(**{**given, name: on_meta(value)})

    @pytest.mark.sanitize
    @pytest.mark.parametrize("layout", EXOTIC)
    def test_exotic_layouts_are_refused(self, target: Target, layout: str) -> None:
        given = target.arguments()
        for name, value in given.items():
            if not (isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1):
                continue
            says = f"seqmem::{target.op}: expected {name} to be a dense"
            with pytest.raises(TypeError, match=says):
                target.call(**{**given, name: EXOTIC[layout](value)})


def check_refused_by_module(call: Callable[[], Any], error: type[Exception], says: str) -> None:
    """A module refuses alike in every grad mode."""
    messages = set()
    for mode in MODES.values():
        with mode(), pytest.raises(error, match=r"^(seqmem::)?\w+: expected ") as caught:
            call()
        assert re.search(says, str(caught.value)), str(caught.value)
        messages.add(str(caught.value).split("\n")[0])
    assert len(messages) == 1
