"""What the ops' wrappers share: second derivatives, and refusals while torch.compile traces.

Second derivatives: a backward op's own derivative is autograd through the same formula in plain
PyTorch, registered by :func:`differentiate`.

Refusals: Dynamo would wrap what an op's check raises into its own error type. So, while it traces,
an op's wrapper first runs the op by itself on the tracer's fake tensors, and where that refuses
raises an exception of both types, which Dynamo hands on as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

Gradients = tuple[Tensor | None, ...]


def differentiate(backward_op: str, vjp: Callable[..., Gradients]) -> None:
    """Make a backward op differentiable.

    Args:
        backward_op: its qualified name, ``"seqmem::lstm_backward"``.
        vjp: takes the backward op's arguments and returns what it returns (the elements, if that is
            one list), in differentiable PyTorch; None in the places that the op leaves empty.
    """
    torch.library.register_autograd(backward_op, _derivative(vjp), setup_context=_save)


def reference_vjp(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> Gradients:
    """The vector-Jacobian product of a reference, differentiable itself; for ``differentiate``.

    Args:
        function: called with ``inputs``; returns the op's outputs.
        inputs: the op's tensor arguments, None where absent.
        grads: of each output, None for zero.
        wanted: which inputs' gradients are asked for; the others come back as None.
    """
    with torch.enable_grad():
        leaves = [
            t if t is None or t.requires_grad or not t.is_floating_point() else t.requires_grad_()
            for t in (None if t is None else t.view_as(t) for t in inputs)
        ]
        pairs = [
            (output, grad)
            for output, grad in zip(function(*leaves), grads, strict=True)
            if grad is not None and output.requires_grad
        ]
        found: list[Tensor | None] = [None] * len(leaves)
        asked = {k: leaf for k, leaf in enumerate(leaves) if leaf is not None and wanted[k]}
        if pairs and asked:
            outputs, seeds = zip(*pairs, strict=True)
            values = torch.autograd.grad(
                outputs,
                list(asked.values()),
                seeds,
                create_graph=True,
                materialize_grads=True,
            )
            for k, value in zip(asked, values, strict=True):
                found[k] = value
    return tuple(found)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.sizes = [len(a) if _is_tensor_list(a) else None for a in inputs]
    flat = _flattened(inputs, ctx.sizes)
    ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in flat))
    ctx.constants = [None if isinstance(a, Tensor) else a for a in flat]


def _is_tensor_list(argument: Any) -> bool:
    return isinstance(argument, list) and all(isinstance(a, Tensor) for a in argument)


def _flattened(arguments: Sequence[Any], sizes: Sequence[int | None]) -> list[Any]:
    """Lists of tensors, the arguments with a size, spread out among the others."""
    pairs = zip(arguments, sizes, strict=True)
    return [a for item, size in pairs for a in ([item] if size is None else item)]


def _nested(flat: Sequence[Any], sizes: Sequence[int | None]) -> list[Any]:
    rest = iter(flat)
    return [next(rest) if size is None else [next(rest) for _ in range(size)] for size in sizes]


def _derivative(vjp: Callable[..., Gradients]) -> Callable[..., tuple[Any, ...]]:
    """The backward of a backward op: autograd through the same formula in plain PyTorch."""

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if len(grads) == 1 and isinstance(grads[0], list):  # the op returns one list of tensors
            (grads,) = grads
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # A view apart of each tensor: one argument may have been computed from another.
            args = [
                constant if tensor is None else tensor.view_as(tensor)
                for tensor, constant in zip(ctx.saved_tensors, ctx.constants, strict=True)
            ]
            results = vjp(*_nested(args, ctx.sizes))
            pairs = [
                (result, grad)
                for result, grad in zip(results, grads, strict=True)
                if result is not None and grad is not None and result.requires_grad
            ]
            needs = _flattened(ctx.needs_input_grad, ctx.sizes)
            wanted = [k for k, needed in enumerate(needs) if needed]
            found: list[Tensor | None] = [None] * len(args)
            if pairs:
                outputs, seeds = zip(*pairs, strict=True)
                values = torch.autograd.grad(
                    outputs, [args[k] for k in wanted], seeds, create_graph=again, allow_unused=True
                )
                for k, value in zip(wanted, values, strict=True):
                    found[k] = value
        return tuple(_nested(found, ctx.sizes))

    return backward


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
            values.append(local.as_python_constant() if constant else _fake(local.as_proxy()))
        try:
            with torch.no_grad():
                op(*values)
        except (ValueError, TypeError) as error:
            raise _refusal(error) from None

    return run


def _fake(proxy: Any) -> Any:
    """The fake tensor of a traced variable, or those of a list of them."""
    if isinstance(proxy, list | tuple):
        return [_fake(one) for one in proxy]
    return proxy.node.meta["example_value"]


def _refusal(error: Exception) -> Exception:
    from torch._dynamo.exc import TorchRuntimeError  # here: it loads the whole compiler

    kind = ValueError if isinstance(error, ValueError) else TypeError
    refusal: Exception = type(kind.__name__, (TorchRuntimeError, kind), {})(str(error))
    return refusal
