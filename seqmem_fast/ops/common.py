"""What the ops' public functions share: how they call their op, and its second derivative.

:func:`fall_back` gives the op as a public function calls it. torch.func transforms (grad, vmap,
jacrev, ...) cannot see into C++ functions: inside one, plain PyTorch runs instead, as it does while
torch.onnx.export (with ``dynamo=True``) records a model, since ONNX has no op of ours. While Dynamo
traces, it would wrap what an op's check raises into its own error type: the op therefore runs once
by itself on the tracer's fake tensors, and where it refuses them, an exception of both types is
raised, which Dynamo hands on as it is.

:func:`differentiate_through` makes a backward op differentiable: its derivative is autograd through
the same formula in plain PyTorch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._ops import OpOverload

from ..reference.common import ALPHAS, thinned
from ..reference.common import MASKED as MASKED

Gradients = tuple[Tensor | None, ...]
Result = TypeVar("Result")

dynamo_traces = torch.compiler.is_dynamo_compiling
overridden = torch.overrides.has_torch_function_variadic
transform_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

# Every op, backward ops included -> the stem of its files, by which its GPU launcher is found.
STEMS: dict[str, str] = {}


def by_fields(function: Callable[..., Result]) -> Callable[..., Result]:
    """``function``, called as an op is: a parameter that is a NamedTuple stands for as many
    arguments, named as its fields."""
    names: list[str] = []
    parts: list[tuple[slice, Any]] = []
    kinds = get_type_hints(function)
    kinds.pop("return")
    for name, kind in kinds.items():
        begin = len(names)
        names += getattr(kind, "_fields", (name,))
        parts.append((slice(begin, len(names)), kind if hasattr(kind, "_fields") else None))
    if len(parts) == len(names):
        return function

    @wraps(function)
    def call(*arguments: Any) -> Result:
        given = ((arguments[at], kind) for at, kind in parts)
        return function(*(part[0] if kind is None else kind(*part) for part, kind in given))

    only = inspect.Parameter.POSITIONAL_ONLY
    signature = inspect.Signature([inspect.Parameter(name, only) for name in names])
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def exports_onnx() -> bool:
    """Whether torch.onnx.export records the calls that are made."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """What ``torch.autocast`` makes of a tensor; None where it is off or knows no such device."""
    device = t.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def fall_back(
    name: str, plain: Callable[..., Result], onnx: Callable[..., Result] | None = None
) -> Callable[..., Result]:
    """The op ``seqmem::<name>``, to be called with all its arguments by position.

    Args:
        name: of an op whose files have the stem of the module that defines ``plain``.
        plain: called in place of the op inside a ``torch.func`` transform; takes what the op takes
            and returns what the op returns.
        onnx: likewise, called while an ONNX model is recorded; ``plain`` where None.
    """
    op = _find(name, plain)
    eager = op._op  # without OpOverload's Python frame

    def call(*arguments: Any) -> Result:
        if transform_active():
            if not dynamo_traces():
                _check_outside(name, arguments)
            return plain(*arguments)
        if exports_onnx():
            return (onnx or plain)(*arguments)
        if dynamo_traces():
            from torch._dynamo.comptime import comptime

            traced = op
            comptime(_refuse_early)  # reads `traced` and `arguments` by name
            result: Result = traced(*arguments)
        else:
            result = eager(*arguments)
        return result

    return call


def _check_outside(name: str, arguments: Sequence[Any]) -> None:
    """The op's check, outside of the ``torch.func`` transforms in which ``arguments`` are seen.

    It sees what shapes and dtypes the transform shows, and those values that no transform wraps and
    that it reads on the CPU: lengths and batch_sizes. Devices are left to torch.
    """
    check = getattr(torch.ops.seqmem, f"check_{name}").default
    read = [argument.name in ("lengths", "batch_sizes") for argument in check._schema.arguments]

    def stand_in(a: Any, is_read: bool = False) -> Any:
        if isinstance(a, list | tuple):
            return [stand_in(one) for one in a]
        if not isinstance(a, Tensor):
            return a
        known = is_read and a.device.type == "cpu" and not is_functorch_wrapped_tensor(a)
        if known or a.layout != torch.strided or a.is_quantized or a.is_nested:
            return a
        cast = autocast_dtype(a) if a.is_floating_point() and a.dtype != torch.float64 else None
        return torch.empty(a.shape, dtype=cast or a.dtype, device="meta")

    pairs = list(zip(arguments, read, strict=True))
    with temporarily_clear_interpreter_stack():
        check(*(stand_in(a, is_read) for a, is_read in pairs))


def differentiate_through(
    name: str,
    plain: Callable[..., Any],
    *,
    gradients: int,
    wanted: Sequence[int] | None = None,
) -> None:
    """Make ``seqmem::<name>_backward`` differentiable.

    Args:
        name: of the forward op.
        plain: the forward in plain PyTorch. Its arguments are those of the backward op that have
            the same names, its results are what the op's incoming gradients belong to.
        gradients: how many incoming gradients come first among the backward op's arguments.
        wanted: for each outgoing gradient, its entry of ``output_mask``; one after the other where
            None.
    """
    schema = _find(f"{name}_backward", plain)._schema
    names = [argument.name for argument in schema.arguments]
    takes = [p for p in inspect.signature(plain).parameters if p in names]
    leaves = [takes.index(result.name.removeprefix("grad_")) for result in schema.returns]

    def vjp(*arguments: Any) -> Gradients:
        given = dict(zip(names, arguments, strict=True))
        values = [given[p] for p in takes]
        mask = given.get("output_mask", [True] * len(leaves))

        def function(*tensors: Tensor) -> Sequence[Tensor]:
            for k, tensor in zip(leaves, tensors, strict=True):
                values[k] = tensor
            results = plain(*values)
            return (results,) if isinstance(results, Tensor) else results

        asked = mask if wanted is None else [mask[k] for k in wanted]
        inputs = [values[k] for k in leaves]
        return reference_vjp(function, inputs, arguments[:gradients], asked)

    differentiate(f"{name}_backward", vjp)


def differentiate(backward_op: str, vjp: Callable[..., Gradients]) -> None:
    """Make a backward op differentiable through a vector-Jacobian product of its own.

    Args:
        backward_op: its name, ``"lstm_backward"``.
        vjp: takes the backward op's arguments and returns what it returns (the elements, if that is
            one list), in differentiable PyTorch; None in the places that the op leaves empty.
    """
    op = _find(backward_op, vjp)
    torch.library.register_autograd(op, _derivative(vjp), setup_context=_save)


def _find(name: str, function: Callable[..., Any]) -> OpOverload:
    """The op, whose stem is noted: that of the module that defines ``function``."""
    STEMS.setdefault(name, function.__module__.rpartition(".")[2])
    op: OpOverload = getattr(torch.ops.seqmem, name).default
    return op


def reference_vjp(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> Gradients:
    """The vector-Jacobian product of a reference, differentiable itself.

    Args:
        function: called with ``inputs``; returns the op's outputs.
        inputs: the op's tensor arguments, None where absent.
        grads: of each output, None for zero.
        wanted: which inputs' gradients are asked for; the others come back as None, as do those of
            inputs that have none, such as a mask.
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
        learning = {k: a for k, a in enumerate(leaves) if a is not None and a.requires_grad}
        asked = {k: leaf for k, leaf in learning.items() if wanted[k]}
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


def vjp_of_lists(
    function: Callable[..., Sequence[Tensor]],
    lists: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool | Sequence[bool]],
) -> Gradients:
    """As :func:`reference_vjp`, of a function of lists of tensors; wanted: of a whole list, or of
    each of its tensors."""
    sizes = [len(one) for one in lists]
    each = zip(wanted, sizes, strict=True)
    asked = [w for some, size in each for w in ([some] * size if isinstance(some, bool) else some)]

    def flat(*tensors: Tensor) -> Sequence[Tensor]:
        rest = iter(tensors)
        return function(*([next(rest) for _ in range(size)] for size in sizes))

    return reference_vjp(flat, [t for one in lists for t in one], grads, asked)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.sizes = [len(a) if _is_tensor_list(a) else None for a in inputs]
    flat = _flattened(inputs, ctx.sizes)
    ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in flat))
    ctx.constants = [None if isinstance(a, Tensor) else a for a in flat]


def _is_tensor_list(argument: Any) -> bool:
    return isinstance(argument, list) and all(isinstance(a, Tensor) for a in argument)


def _flattened(arguments: Sequence[Any], sizes: Sequence[int | None]) -> list[Any]:
    """The arguments in one list: those with a size are lists, whose elements are put in place."""
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
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Each tensor as a view of its own: one argument may have been computed from another.
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
                    outputs,
                    [args[k] for k in wanted],
                    seeds,
                    create_graph=create_graph,
                    allow_unused=True,
                )
                for k, value in zip(wanted, values, strict=True):
                    found[k] = value
        return tuple(_nested(found, ctx.sizes))

    return backward


def _refuse_early(context: Any) -> None:
    """For ``comptime`` in `fall_back`: run the op on the fake tensors that are being traced."""
    op = context.get_local("traced").as_python_constant()
    try:
        with torch.no_grad():
            op(*_fake(context.get_local("arguments").as_proxy()))
    except (ValueError, TypeError) as error:
        raise _refusal(error) from None


def _fake(proxy: Any) -> Any:
    """The fake tensor of a traced variable; those of a list of them; a constant as it is."""
    if isinstance(proxy, list | tuple):
        return [_fake(one) for one in proxy]
    return proxy.node.meta["example_value"] if isinstance(proxy, torch.fx.Proxy) else proxy


def _refusal(error: Exception) -> Exception:
    from torch._dynamo.exc import TorchRuntimeError  # here: it loads the whole compiler

    kind = ValueError if isinstance(error, ValueError) else TypeError
    refusal: Exception = type(kind.__name__, (TorchRuntimeError, kind), {})(str(error))
    return refusal


Normalizer = Callable[[Tensor], Tensor]


class Rule(NamedTuple):
    """How weights are made of scores."""

    alpha: Any  # as entmax, 1 for softmax; in plain PyTorch a tensor or a Normalizer, too
    dropout: float
    seed: Tensor | None


def plain_rule(given: Rule) -> dict[str, Any]:
    """The rule as a reference takes it that computes what the op does."""
    alpha, dropout, seed = given
    rule: dict[str, Any] = {"dropout": dropout, "seed": seed, "signed": True}
    if callable(alpha):
        return {"normalizer": alpha, **rule}
    softmax = not isinstance(alpha, Tensor) and alpha == 1
    return {"normalizer": "softmax" if softmax else "entmax", "alpha": alpha, **rule}


def attend_to_some(
    op: Callable[..., tuple[Tensor, ...]],
    plain: Callable[..., tuple[Tensor, ...]],
    operands: tuple[Tensor, Tensor, Tensor],
    pattern: tuple[Any, ...],
    normalizer: str,
    alpha: Tensor | float,
    dropout: float,
    seed: Tensor | int | None,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    """An attention of heads to some keys: its output, and the weights that met the values.

    Args:
        op: takes q, k, v, the pattern, alpha, dropout, seed and need_weights.
        plain: the same in plain PyTorch, without need_weights.
        operands: q, k and v.
        seed: drawn from torch's generator where None.
    """
    device = operands[0].device
    if not dropout:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=device)
    elif isinstance(seed, int):
        seed = torch.tensor([seed], device=device)
    if normalizer == "entmax" and isinstance(alpha, Tensor):
        found = _with_learned_alpha(op, plain, operands, pattern, alpha, dropout, seed)
    else:
        name = plain.__module__.rpartition(".")[2]
        power = alpha_of(name, normalizer, alpha)
        found = op(*operands, *pattern, power, dropout, seed, need_weights)
    if not dropout or not need_weights:
        return found
    return found[0], *(thinned(weights, dropout) for weights in found[1:])


def _with_learned_alpha(
    op: Callable[..., tuple[Tensor, ...]],
    plain: Callable[..., tuple[Tensor, ...]],
    operands: tuple[Tensor, Tensor, Tensor],
    pattern: tuple[Any, ...],
    alpha: Tensor,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    """Plain PyTorch, in float32 at least, with entmax as one op; the op only checks."""
    if transform_active() or exports_onnx():
        return plain(*operands, *pattern, alpha, dropout, seed)
    q, k, v = operands
    dtype = autocast_dtype(q)
    with torch.no_grad():
        op(q, k, v[..., :0], *pattern, 1.5, dropout, seed, False)
    wide = torch.promote_types(q.dtype, torch.float32)
    with nullcontext() if dtype is None else torch.autocast(q.device.type, enabled=False):

        def normalizer(scores: Tensor) -> Tensor:
            weights: Tensor = torch.ops.seqmem.entmax(scores, alpha.to(wide), 1.5, -1)
            return weights

        found = plain(*(t.to(wide) for t in operands), *pattern, normalizer, dropout, seed)
        return tuple(t.to(dtype or q.dtype) for t in found)


def require_tensors(op: str, **given: Tensor | None) -> None:
    """What the dispatcher would refuse in words of its own."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"seqmem::{op}: expected {name} to be a tensor, got {type(value).__name__}"
            )


def require_like(op: str, like: Tensor | None, **given: Tensor) -> None:
    """Tensors of the dtype of a module's parameters, of which `like` is one; under
    ``torch.autocast`` of any."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"seqmem::{op}: expected {name} to be a tensor, got {type(value).__name__}"
            )
        if like is not None and value.dtype != like.dtype and autocast_dtype(value) is None:
            raise TypeError(
                f"seqmem::{op}: expected {name} of the parameters' dtype {like.dtype}, "
                f"got {value.dtype}"
            )


def alpha_of(op: str, normalizer: str, alpha: Tensor | float) -> float:
    """The normalizer's alpha as entmax, 1 for softmax."""
    if isinstance(alpha, Tensor):
        raise TypeError(
            f"seqmem::{op}: expected alpha to be a number with normalizer {normalizer}, "
            "got a tensor"
        )
    if normalizer == "entmax":
        if not 1 < alpha <= 2:
            raise ValueError(f"seqmem::{op}: expected alpha with 1 < alpha <= 2, got {alpha}")
        return alpha
    if normalizer not in ALPHAS:
        raise ValueError(
            f"seqmem::{op}: expected normalizer softmax, sparsemax, entmax15 or entmax, "
            f"got {normalizer}"
        )
    return ALPHAS[normalizer]
