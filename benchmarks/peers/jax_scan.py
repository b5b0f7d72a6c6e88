"""A jitted function of JAX arrays as a side of a table, by gradients of all arguments; optional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.harness.rows import INFERENCE, Contender

JAX = "JAX lax.scan"


def jax_scan(run: Callable[..., Any], mode: str) -> Contender:
    """`run` gives the output and the last state; a training step's loss is the output's sum."""
    import jax
    import jax.numpy as jnp

    def total(args: Any) -> Any:
        return run(*args)[0].sum()

    work = jax.jit((lambda args: run(*args)) if mode == INFERENCE else jax.grad(total))

    def prepare(args: Any) -> Any:
        return tree_map(lambda t: jnp.asarray(t.detach().numpy()), tuple(args))

    def call(args: Any) -> Any:
        return jax.block_until_ready(work(args))

    def values(args: Any) -> list[Tensor]:
        return [torch.from_numpy(np.array(a)) for a in tree_leaves(call(args))]

    return Contender(JAX, prepare, call, values, pool=JAX, compiles=True)
