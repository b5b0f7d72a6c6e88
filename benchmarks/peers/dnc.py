"""The DNC of the package dnc 1.1.0 (pytorch-dnc) beside ours with the same weights; optional."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.rows import Work, uninstalled
from seqmem_fast import DNC

PACKAGE = "pytorch-dnc"


def missing() -> str | None:
    """Why it does not stand in the table; None if it does."""
    return uninstalled(PACKAGE, "dnc")


class _Theirs(nn.Module):
    """Its output from a start of zeros, where it would draw hidden and cell at random."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.start = module.num_hidden_layers, module.hidden_size

    def forward(self, x: Tensor) -> tuple[Tensor]:
        layers, units = self.start
        zeros = x.new_zeros(layers, x.shape[0], units)
        return (self.module(x, ([(zeros, zeros)], None, None))[0],)


def package_work(
    inputs: int, time: int, batch: int, slots: int, width: int, control: int, reads: int
) -> Work:
    """Modules of one layer on [B, T, I]; what its controller never sees, ours is not shown either.

    Output width is input width there. The gradients compared are the input's: the weights have
    other names.
    """
    import dnc

    torch.manual_seed(0)
    theirs = dnc.DNC(
        input_size=inputs,
        hidden_size=control,
        num_hidden_layers=1,
        nr_cells=slots,
        cell_size=width,
        read_heads=reads,
    )
    ours = DNC.from_pytorch_dnc(theirs, fed_back=False)
    peer, exact = _Theirs(theirs), copy.deepcopy(ours).double()  # theirs knows float32 alone

    def sample(rng: torch.Generator) -> tuple[Tensor]:
        return (torch.randn(batch, time, inputs, generator=rng),)

    def call(module: nn.Module) -> Callable[[Tensor], tuple[Tensor]]:
        weights = list(module.parameters())

        def run(x: Tensor) -> tuple[Tensor]:
            for weight in weights:
                weight.grad = None
            return (module(x)[0],)

        return run

    return Work(sample, call(ours), {PACKAGE: call(peer)}, exact=call(exact))
