"""The products that ops compute, told to ``torch.utils.flop_counter`` where somebody imports it.

Importing it here would take longer than all else in the package.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

Shape = Sequence[int]
_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def count_products(name: str, products: Callable[..., int]) -> None:
    """Register the formula of ``seqmem::<name>`` and of its backward, if it has one: two for each.

    Args:
        name: of the forward op.
        products: the multiply-adds of its products of matrices, of which nothing is left out that
            sequence lengths or masks would spare. Takes arguments of the op by their names, tensors
            as shapes; those with a default need not be arguments of both ops.
    """
    takes = inspect.signature(products).parameters
    for op, flops in ((name, 2), (f"{name}_backward", 4)):
        if (packet := getattr(torch.ops.seqmem, op, None)) is None:
            continue  # without a derivative
        names = [argument.name for argument in packet.default._schema.arguments]

        def formula(*args: Any, _names: Any = names, _flops: int = flops, **kwargs: Any) -> int:
            given = {**dict(zip(_names, args, strict=False)), **kwargs}
            return _flops * products(**{key: given[key] for key in takes if key in given})

        _waiting.append((packet, formula))
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])


def of_weights(*shapes: Shape) -> int:
    """Of one row with each of these, biases left out."""
    return sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def _register(counter: ModuleType) -> None:
    while _waiting:
        packet, formula = _waiting.pop()
        counter.register_flop_formula(packet)(formula)


class _OnImport(MetaPathFinder):
    """Registers the formulas once the counter is imported; changes nothing else."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _OnImport())
