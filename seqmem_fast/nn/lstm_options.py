"""The options that ``LSTM`` and ``LSTMCell`` have beside torch.nn's."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.lstm import State, Weights


def check_forget_bias(op: str, forget_bias: float | None, bias: bool) -> None:
    if forget_bias is not None and not bias:
        raise ValueError(f"seqmem::{op}: expected bias with a forget_bias, got bias False")


def check_share(op: str, name: str, share: Any) -> None:
    if isinstance(share, bool) or not isinstance(share, Real):  # numpy's numbers are Real, too
        raise TypeError(f"seqmem::{op}: expected {name} to be a number, got {share!r}")
    if not 0 <= float(share) <= 1:
        raise ValueError(f"seqmem::{op}: expected {name} in 0..1, got {share}")


def check_regularization(op: str, zoneout_h: float, zoneout_c: float, layer_norm: bool) -> None:
    for name, share in (("zoneout_h", zoneout_h), ("zoneout_c", zoneout_c)):
        check_share(op, name, share)
    if not isinstance(layer_norm, bool):
        raise TypeError(f"seqmem::{op}: expected layer_norm to be a bool, got {layer_norm}")


def check_no_projection(module: Any) -> None:
    if module.proj_size and is_regularized(module):
        raise ValueError(
            "seqmem::lstm: expected no proj_size with zoneout or layer_norm, "
            f"got proj_size {module.proj_size}"
        )


def is_regularized(module: Any) -> bool:
    """Whether a module of ours runs ``ops.lstm_regularized``."""
    return bool(module.layer_norm or module.zoneout_h or module.zoneout_c)


def add_norms(module: Any, layers: Sequence[str], device: Any, dtype: torch.dtype | None) -> None:
    """Gains and shifts of each layer; the values are `start`'s."""
    widths = {"gain_ih": 4, "gain_hh": 4, "gain_c": 1, "shift_c": 1}
    for layer in layers if module.layer_norm else ():
        for name, width in widths.items():
            empty = torch.empty(width * module.hidden_size, device=device, dtype=dtype)
            module.register_parameter(name + layer, nn.Parameter(empty))


@torch.no_grad()
def start(module: Any) -> None:
    """What torch.nn's reset_parameters does not know."""
    for name, parameter in module.named_parameters():
        if name.startswith("gain_"):
            parameter.fill_(1)
        elif name.startswith("shift_"):
            parameter.zero_()
        elif name.startswith("bias_") and module.forget_bias is not None:
            value = module.forget_bias if name.startswith("bias_ih") else 0.0
            parameter[module.hidden_size : 2 * module.hidden_size] = value


def run_regularized(
    module: Any,
    layer: str,
    x: Tensor,
    state: State | None,
    weights: Weights,
    return_gates: bool = False,
    **options: Any,
) -> tuple[Tensor, State, Tensor | None, Tensor | None]:
    """One layer in one direction; in training torch's generator draws the seed of its masks."""
    seed = None
    if module.training and (module.zoneout_h or module.zoneout_c):
        seed = torch.randint(-(2**63), 2**63 - 1, (2,), device=x.device)
    norms = None
    if module.layer_norm:
        norms = ops.LSTMNorms(*(getattr(module, name + layer) for name in ops.LSTMNorms._fields))
    return ops.lstm_regularized(
        x,
        state,
        *weights[:4],
        norms,
        zoneout_h=module.zoneout_h,
        zoneout_c=module.zoneout_c,
        seed=seed,
        return_gates=return_gates,
        **options,
    )


def dropout(x: Tensor, p: float, batch_first: bool) -> Tensor:
    """nn.LSTM's masks from the same seed: it draws them over time-major outputs."""
    if not batch_first:
        return F.dropout(x, p)
    return F.dropout(x.transpose(0, 1).contiguous(), p).transpose(0, 1)


def locked(
    x: Tensor,
    p: float,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    **_: Tensor | None,
) -> Tensor:
    """A row's mask is the same at every step."""
    if batch_sizes is None:
        shape = (x.size(0), 1, x.size(2)) if batch_first else (1, *x.shape[1:])
        return x * F.dropout(x.new_ones(shape), p)
    sizes = batch_sizes.tolist()
    mask = F.dropout(x.new_ones(sizes[0], x.size(1)), p)
    return x * torch.cat([mask[:size] for size in sizes])


def thinned(weight_dropout: float, weights: Weights) -> Weights:
    """With weight_hh as DropConnect leaves it."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    return w_ih, F.dropout(w_hh, weight_dropout), b_ih, b_hh, w_hr
