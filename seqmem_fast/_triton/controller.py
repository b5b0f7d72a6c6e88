"""The parameters of a machine as its kernels read them (`controller_kernels.py`): in the wide dtype
and with the gates of a unit side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common import wide


class Parameters(NamedTuple):
    """Weights are transposed for a forward kernel, as given for a backward one; all but the first
    and the last are flat."""

    of_input: Tensor  # [I, C * G]
    layers: Tensor  # each layer's [K, C * G] of [below, h]; below of the first: the reads
    head_weight: Tensor  # [C, P]
    head_bias: Tensor  # [P]
    biases: Tensor  # [L, C * G]


def by_unit(t: Tensor, gates: int) -> Tensor:
    """Rows [G * C] of a weight or bias with the gates of a unit side by side."""
    return t.unflatten(0, (gates, -1)).transpose(0, 1).flatten(0, 1)


def by_gate(t: Tensor, gates: int) -> Tensor:
    return t.unflatten(0, (-1, gates)).transpose(0, 1).flatten(0, 1)


def pack(given: Sequence[Tensor], width: int, gates: int, transposed: bool) -> Parameters:
    """given: the controller's parameters, then weight and bias of the head values; width: I.

    A few launches, however many parameters there are: all are joined, and their elements fetched
    from the places that packing takes them to, which are kept from call to call.
    """
    joined = torch.cat([t.reshape(-1) for t in given]).to(wide(given[0].dtype))
    device, stream = joined.device, 0
    find: Any = _places
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        if torch.cuda.is_current_stream_capturing():  # a graph's memory is its own
            find = _places.__wrapped__
    sizes = tuple(tuple(t.shape) for t in given)
    places, counts, of_first, of_last = find(sizes, width, gates, transposed, device, stream)
    found = Parameters(*joined.index_select(0, places).split(counts))
    return found._replace(
        of_input=found.of_input.view(of_first), biases=found.biases.view(of_last).sum(0)
    )


@lru_cache(maxsize=64)
def _places(
    sizes: Sequence[Sequence[int]],
    width: int,
    gates: int,
    transposed: bool,
    device: torch.device,
    stream: int,  # another one might read them before they are written
) -> tuple[Tensor, list[int], torch.Size, torch.Size]:
    """Where among all parameters each element of the packed ones is; how many elements these have,
    the first one's shape and the last one's."""
    counts = [math.prod(size) for size in sizes]
    all_places = torch.arange(sum(counts), dtype=torch.int32, device=device)
    given = [p.view(size) for p, size in zip(all_places.split(counts), sizes, strict=True)]
    parts = _arranged(given, width, gates, transposed)
    packed = torch.cat([part.flatten() for part in parts])
    return packed, [part.numel() for part in parts], parts[0].shape, parts[-1].shape


def _arranged(given: Sequence[Tensor], width: int, gates: int, transposed: bool) -> Parameters:
    """The same, but for biases: they are one or two that are to be summed, [1 or 2, L, C * G]."""
    *controller, head_weight, head_bias = given
    kinds = 4 if gates == 4 else 2  # parameters of a layer
    ours = [by_unit(t, gates) for t in controller]
    weights, biases = ours[::kinds], [ours[k::kinds] for k in range(kinds // 2, kinds)]
    of_input, weights[0] = weights[0][:, :width], weights[0][:, width:]
    if gates == 4:
        weights = [torch.cat(pair, 1) for pair in zip(weights, ours[1::kinds], strict=True)]
    of_input, *weights, head_weight = (
        w.t() if transposed else w for w in (of_input, *weights, head_weight)
    )
    layers = torch.cat([w.flatten() for w in weights])
    return Parameters(
        of_input, layers, head_weight, head_bias, torch.stack([torch.stack(b) for b in biases])
    )
