"""Swap the LSTM and attention modules of an existing model for ours, and swap them back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from .nn import LSTM, Attention, LSTMCell

_ORIGINAL = "_accelerated_from"  # where a replacement keeps the module that it replaces
_SHARED = ("_buffers", "_non_persistent_buffers_set", "_is_full_backward_hook")
_CACHES = ("_flat_weights", "_flat_weight_refs", "_flat_weights_names", "_all_weights")
_NAMES = ("LSTM", "LSTMCell", "GRU", "GRUCell", "RNN", "RNNCell", "MultiheadAttention")
_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: LSTM,
    nn.LSTMCell: LSTMCell,
    nn.MultiheadAttention: Attention,
}


@dataclass(repr=False)
class Report:
    """What :func:`accelerate` swapped, and what it left alone and why; print it."""

    swapped: list[tuple[str, str]] = field(default_factory=list)  # (name in the model, what)
    kept: list[tuple[str, str, str]] = field(default_factory=list)  # (name, class, reason)

    def __repr__(self) -> str:
        lines = [f"swapped {len(self.swapped)}, left {len(self.kept)}"]
        lines += [f"  swapped {name}: {what}" for name, what in self.swapped]
        for name, cls, reason in self.kept:
            lines.append(f"  left {name or '(the model itself)'}: {cls}: {reason}")
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Replace every nn.LSTM, nn.LSTMCell and nn.MultiheadAttention inside ``model``, in place.

    The replacement works on the same Parameters, so optimizers, state_dicts and tied weights stay
    as they are. Hooks, weight normalisation, pruning and other parametrizations go along (a hook
    then receives the new module). A module used in several places is replaced by one module.
    Subclasses, quantized and scripted modules are left, as is the attention inside torch's
    transformer layers, which ask for no weights; and so is ``model`` itself, which only its owner
    can replace: ``model = seqmem_fast.LSTM.from_torch(model)``.

    Returns:
        A :class:`Report`.
    """
    report = Report()
    swapped: dict[nn.Module, nn.Module] = {}
    for parent, key, name, module in list(_children(model)):
        if module in swapped:
            parent._modules[key] = swapped[module]
            report.swapped.append((name, "shared with another name"))
            continue
        reason = _reason_to_keep(module, parent)
        if reason is None:
            parent._modules[key] = swapped[module] = new = _replacement(module)
            report.swapped.append((name, f"{type(module).__name__}({new.extra_repr()})"))
        elif reason:
            report.kept.append((name, type(module).__name__, reason))
    reason, cls = _reason_to_keep(model), parametrize.type_before_parametrizations(model).__name__
    if reason is None:
        plain = not parametrize.is_parametrized(model)
        ours = _OURS[parametrize.type_before_parametrizations(model)].__name__
        how = f"use seqmem_fast.{ours}.from_torch(model)" if plain else "put it into another module"
        reason = f"nothing holds it that could be changed; {how}"
    if reason:
        report.kept.append(("", cls, reason))
    return report


def restore(model: nn.Module) -> int:
    """Put back the modules that :func:`accelerate` replaced, with the weights as they are now.

    Returns:
        How many places changed.
    """
    count = 0
    for parent, key, _, module in list(_children(model)):
        original = module.__dict__.get(_ORIGINAL)
        if original is not None:
            parent._modules[key] = original.train(module.training)
            count += 1
    return count


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """Every (parent, key, full name, child), a shared child once for each of its places."""
    for prefix, parent in model.named_modules():
        for key, child in parent._modules.items():
            if child is not None:
                yield parent, key, f"{prefix}.{key}" if prefix else key, child


def _reason_to_keep(module: nn.Module, parent: nn.Module | None = None) -> str | None:
    """Why a module stays; None if it can be swapped, "" if it is nothing of ours."""
    cls = parametrize.type_before_parametrizations(module)
    if cls in _OURS:
        if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            return "its layer asks for no weights, where torch's own kernel is the right one"
        return "its forward was patched on the instance" if "forward" in vars(module) else None
    if isinstance(module, tuple(_OURS)):
        return "a subclass, which may compute something else"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "not an LSTM"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: its code is fixed" if module.original_name in _NAMES else ""
    if cls.__name__ in _NAMES and cls.__module__.startswith(("torch.ao.", "torchao.")):
        return "quantized: there is no quantized kernel"
    return ""


def _replacement(module: nn.Module) -> nn.Module:
    ours: Any = _OURS[parametrize.type_before_parametrizations(module)]
    replacement: nn.Module = ours.from_torch(module)
    if parametrize.is_parametrized(module):
        _share_parametrizations(module, replacement)
    for name, value in vars(module).items():
        # Hooks and buffers: the very dicts, so that a hook's handle still removes it. Attributes
        # unknown to us: weights computed by a hook (pruning, weight_norm), or the user's own.
        if "_hooks" in name or name in _SHARED or name not in {*vars(replacement), *_CACHES}:
            replacement.__dict__[name] = value
    replacement.__dict__[_ORIGINAL] = module  # not in _modules: no second entry in the state_dict
    return replacement


def _share_parametrizations(module: nn.Module, replacement: nn.Module) -> None:
    """Let torch prepare the class of ``replacement``, then put the parametrizations in place."""
    parameters = replacement._parameters
    for name, parametrization in cast(Any, module.parametrizations).items():
        replacement._parameters = {name: nn.Parameter(getattr(module, name).detach())}
        parametrize.register_parametrization(replacement, name, nn.Identity())
        cast(Any, replacement.parametrizations)[name] = parametrization
    replacement._parameters = parameters
