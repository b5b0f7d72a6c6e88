"""Refusals while torch.compile traces: the same ValueError or TypeError as everywhere else.

Dynamo would wrap what an op's check raises into its own error type. So, while it traces, an op's
wrapper first runs the op by itself on the tracer's fake tensors, and where that refuses raises an
exception of both types, which Dynamo hands on as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload


def try_while_tracing(op: OpOverload, **locals_named: str) -> Callable[[Any], None]:
    """For ``comptime``: run ``op`` on the local variables of the function being traced.

    Args:
        op: a local variable named as each of its arguments must hold that argument.
        locals_named: argument="local", where the names differ.
    """
    names = [locals_named.get(argument.name, argument.name) for argument in op._schema.arguments]

    def run(context: Any) -> None:
        values: list[Any] = []
        for name in names:
            local = context.get_local(name)
            constant = local.is_python_constant()
            values.append(local.as_python_constant() if constant else local.as_fake())
        try:
            with torch.no_grad():
                op(*values)
        except (ValueError, TypeError) as error:
            raise _refusal(error) from None

    return run


def _refusal(error: Exception) -> Exception:
    from torch._dynamo.exc import TorchRuntimeError  # here: it loads the whole compiler

    kind = ValueError if isinstance(error, ValueError) else TypeError
    refusal: Exception = type(kind.__name__, (TorchRuntimeError, kind), {})(str(error))
    return refusal
