"""Let the LSTM and attention modules of an existing model run our ops, and undo it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .nn import LSTM, Attention, LSTMCell

_OURS: dict[type, Any] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell, nn.MultiheadAttention: Attention}
_NAMES = ("LSTM", "LSTMCell", "GRU", "GRUCell", "RNN", "RNNCell", "MultiheadAttention")
_RUN = (  # what a call runs of torch's classes
    "forward", "check_forward_args", "check_input", "check_hidden_size", "permute_hidden",
    "get_expected_hidden_size", "get_expected_cell_size", "merge_masks",
)  # fmt: skip
_DEVICES = ("cpu", "cuda", "meta")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_TORCH_CLASS = "_torch_class"  # where a replaced module keeps the class that it had
_SELF = "(the model itself)"


@dataclass(repr=False)
class Report:
    """What :func:`accelerate` swapped, and what it left alone and why; print it."""

    swapped: list[tuple[str, str]] = field(default_factory=list)  # (name in the model, what)
    kept: list[tuple[str, str, str]] = field(default_factory=list)  # (name, class, reason)

    def __repr__(self) -> str:
        lines = [f"swapped {len(self.swapped)}, left {len(self.kept)}"]
        lines += [f"  swapped {name or _SELF}: {what}" for name, what in self.swapped]
        lines += [f"  left {name or _SELF}: {cls}: {why}" for name, cls, why in self.kept]
        return "\n".join(lines)


def accelerate(model: nn.Module, *, replace: bool = False) -> Report:
    """Make every nn.LSTM, nn.LSTMCell and nn.MultiheadAttention of ``model`` run our op, in place.

    Each module stays the object that it is, with its class, parameters, children, hooks and
    parametrizations; its ``forward`` alone is swapped, on the instance. Copies and pickles of the
    model stay accelerated. What our op refuses (nested tensors, devices without a kernel, wrong
    arguments) torch's own forward computes or refuses, as it does all calls of
    ``torch.jit.trace`` and of ``torch.onnx.export(..., dynamo=False)``; ``torch.jit.script``
    restores what it scripts. Under ``torch.compile`` an nn.LSTM breaks the graph as ever, unless
    ``torch._dynamo.config.allow_rnn`` is set.

    Left alone are modules with a forward of their own, or with other methods that it calls
    (subclasses, patched, quantized and scripted ones), those whose device or dtype has no kernel,
    and the attention inside torch's transformer layers, which ask for no weights.

    Two things differ from torch.nn. An LSTM's output is kept for its backward, so that a change in
    place (``nn.Dropout(inplace=True)`` on it) is refused there, as torch refuses it for float32 and
    bfloat16 alone. Attention's corners are those that :class:`seqmem_fast.Attention` documents.

    Args:
        model: the model, or one such module.
        replace: turn the modules into :class:`seqmem_fast.LSTM`, :class:`seqmem_fast.LSTMCell` and
            :class:`seqmem_fast.Attention`, which torch.compile takes in one graph. They stay the
            same objects, with another class.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: expected a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    layers = [m for m in model.modules() if isinstance(m, _LAYERS)]
    inside = {m for layer in layers for m in layer.children()}
    for name, module in list(model.named_modules()):
        if _is_swapped(module):
            if not replace:
                continue
            _restore(module)
        cls: Any = parametrize.type_before_parametrizations(module)
        theirs, ours = _classes(module)
        reason = _reason_to_keep(module, cls, theirs, replace)
        if ours and not reason and module in inside:
            reason = "its layer asks for no weights, where torch's own kernel is the right one"
        if reason:
            report.kept.append((name, cls.__name__, reason))
        elif ours:
            if replace:
                vars(module)[_TORCH_CLASS] = cls
                _change_class(module, ours)
            else:
                _swap(module)
            report.swapped.append((name, f"{cls.__name__}({ours.extra_repr(module)})"))
    return report


def restore(model: nn.Module) -> int:
    """Undo :func:`accelerate`; returns how many modules changed."""
    swapped = [m for m in model.modules() if _is_swapped(m) or _TORCH_CLASS in vars(m)]
    return len([_restore(module) for module in swapped])


def _classes(module: nn.Module) -> tuple[Any, Any]:
    """Torch's class and ours; None of a module that is neither."""
    return next((pair for pair in _OURS.items() if isinstance(module, pair[0])), (None, None))


def _reason_to_keep(module: nn.Module, cls: Any, theirs: Any, replace: bool) -> str:
    """Why a module stays, or nothing: it can be swapped, or has nothing to do with us."""
    if theirs is None:
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and cls not in _OURS.values():
            return "not an LSTM"
        if isinstance(module, torch.jit.ScriptModule) and module.original_name in _NAMES:
            return "scripted: its code is fixed"
        if cls.__name__ in _NAMES and cls.__module__.startswith(("torch.ao.", "torchao.")):
            return "quantized: there is no quantized kernel"
        return ""
    if "forward" in vars(module):
        return "its forward was patched on the instance"
    differs = any(getattr(cls, f, None) is not getattr(theirs, f, None) for f in _RUN)
    if differs or (replace and cls is not theirs):
        return "a subclass, which may compute something else"
    weight = next(module.parameters(), None)
    if weight is not None and weight.dtype not in _DTYPES:
        return f"there is no kernel for {weight.dtype}"
    if weight is not None and weight.device.type not in _DEVICES:
        return f"there is no kernel for devices of type {weight.device.type}"
    return ""


def runs_ours(module: nn.Module) -> bool:
    """Whether a call of the module with ``lengths`` or ``reset`` is one of our op."""
    ours = _is_swapped(module) or isinstance(module, tuple(_OURS.values()))
    return ours and not torch._C._get_tracing_state()


def _forward(ours: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    """What a swapped module runs."""
    if not torch._C._get_tracing_state():
        try:
            return ours.forward(module, *args, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            nested = any(getattr(a, "is_nested", False) for a in (*args, *kwargs.values()))
            refused = nested or isinstance(error, (TypeError, ValueError, NotImplementedError))
            if not refused or not kwargs.keys().isdisjoint(("lengths", "reset", "return_gates")):
                raise
    return type(module).forward(module, *args, **kwargs)


def _swap(module: nn.Module) -> nn.Module:
    vars(module)["forward"] = partial(_forward, _classes(module)[1], module)
    vars(module).update({name: partial(f, module) for name, f in _COPYING.items()})
    return module


def _is_swapped(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "func", None) is _forward


def _reduce(module: Any, protocol: int) -> tuple[Any, ...]:
    own = ("forward", *_COPYING) if _is_swapped(module) else (*_COPYING,)
    state = {name: value for name, value in module.__getstate__().items() if name not in own}
    return _swapped, (type(module),), state


def _swapped(cls: type[nn.Module]) -> nn.Module:
    return _swap(cls.__new__(cls))


def _replicate(module: Any) -> nn.Module:
    return _swap(type(module)._replicate_for_data_parallel(module))


def _restore(module: nn.Module) -> nn.Module:
    if _is_swapped(module):
        for name in ("forward", *_COPYING):
            vars(module).pop(name, None)
    elif _TORCH_CLASS in vars(module):
        _change_class(module, vars(module).pop(_TORCH_CLASS))
    return module


# What copies a module's __dict__ as it is must bind forward to the copy; TorchScript compiles code.
_COPYING: dict[str, Any] = {
    "__reduce_ex__": _reduce,
    "_replicate_for_data_parallel": _replicate,
    "__prepare_scriptable__": _restore,
}


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):  # its class has properties for the weights
        cls = type(type(module).__name__, (cls,), dict(vars(type(module))))
    module.__class__ = cls
