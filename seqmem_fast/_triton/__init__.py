"""GPU kernels in Triton, at the dispatcher's CUDA key (which ROCm shares).

Importing this package does not import Triton: the first CUDA tensor that reaches an op does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from ..ops.common import STEMS


def register() -> None:
    """Register a launcher for every op that has no CUDA kernel from the compiled module.

    The launcher of ``seqmem::<name>`` is the function of that name in the module of the op's stem.
    Where the compiled module computes small calls alone, it calls ``seqmem::<name>_triton`` for the
    others, which the launcher then becomes.
    """
    for name, stem in STEMS.items():
        if name.startswith("check_"):
            continue
        op = f"seqmem::{name}"
        if torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"):
            op += "_triton"
            if not torch._C._dispatch_has_kernel(op):  # not defined: there are no others
                continue
        torch.library.impl(op, "cuda", _on_first_call(op, stem, name))


def _on_first_call(op: str, module: str, name: str) -> Callable[..., Any]:
    launcher: Callable[..., Any] | None = None

    def kernel(*args: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            try:
                launcher = getattr(importlib.import_module(f".{module}", __name__), name)
            except ModuleNotFoundError as error:
                if error.name != "triton":
                    raise
                raise RuntimeError(
                    f"{op}: CUDA tensors need Triton, which is not installed: "
                    "run `pip install seqmem_fast[triton]`"
                ) from None
        return launcher(*args)

    return kernel
