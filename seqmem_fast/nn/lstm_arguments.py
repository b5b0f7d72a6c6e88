"""What :class:`LSTM` and :class:`LSTMCell` check beside what their ops see."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..ops.lstm import State


def check_source(op: str, module: nn.Module, theirs: Any, ours: Any, names: Sequence[str]) -> None:
    """Whether ``from_torch`` may take the module's parameters, which have these names."""
    if not isinstance(module, (theirs, ours)):
        raise TypeError(
            f"seqmem::{op}: expected a torch.nn.{theirs.__name__}, got {type(module).__name__}"
        )
    computed = [name for name in names if name not in module._parameters]
    if computed:
        raise ValueError(
            f"seqmem::{op}: expected every weight to be a Parameter, got {computed[0]} computed "
            "(weight_norm, pruning, ...); accelerate() takes such modules"
        )


def refuse_input(op: str, input: Tensor, shape: str) -> NoReturn:
    """An input that neither has this shape nor is such a one without its batch."""
    raise ValueError(
        f"seqmem::{op}: expected input of shape [{shape}] or [{shape.replace('B, ', '')}], "
        f"got {list(input.shape)}"
    )


def check_pair(op: str, hx: object) -> None:
    if isinstance(hx, (tuple, list)) and len(hx) == 2:
        if isinstance(hx[0], Tensor) and isinstance(hx[1], Tensor):
            return
        kinds = ", ".join(type(part).__name__ for part in hx)
        got = f"({kinds})"
    else:
        got = type(hx).__name__ + (f" of {len(hx)}" if isinstance(hx, (tuple, list)) else "")
    raise TypeError(f"seqmem::{op}: expected hx to be a pair of tensors (h, c), got {got}")


def check_dims(op: str, hx: State, dims: int) -> None:
    for name, tensor in zip(("hx", "cx"), hx, strict=True):
        if tensor.dim() != dims:
            raise ValueError(
                f"seqmem::{op}: expected {name} of {dims} dimensions beside this input, "
                f"got shape {list(tensor.shape)}"
            )


def check_state(module: Any, hx: State, batch: int) -> None:
    """hx against [L*D, B, P] and [L*D, B, H]; the op itself sees one layer's rows only."""
    check_dims("lstm", hx, 3)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    widths = module.proj_size or module.hidden_size, module.hidden_size
    for name, tensor, width in zip(("hx", "cx"), hx, widths, strict=True):
        if tensor.shape != (layers, batch, width):
            raise ValueError(
                f"seqmem::lstm: expected {name} of shape {[layers, batch, width]}, "
                f"got {list(tensor.shape)}"
            )


def rows_of(lengths: Any, reset: object) -> Any:
    """lengths, which may be a list of integers, and reset as tensors."""
    if isinstance(lengths, list | tuple):
        try:
            lengths = torch.tensor([index(n) for n in lengths], dtype=torch.int64, device="cpu")
        except TypeError:
            raise TypeError(
                f"seqmem::lstm: expected lengths to be integers or a tensor of them, got {lengths}"
            ) from None
    for name, value in (("lengths", lengths), ("reset", reset)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"seqmem::lstm: expected {name} to be a tensor, got {type(value).__name__}"
            )
    return lengths, reset
