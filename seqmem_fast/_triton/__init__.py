"""GPU kernels in Triton, at the dispatcher's CUDA key (which ROCm shares).

Importing this package does not import Triton: the first CUDA tensor that reaches an op does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

# Module of this package -> its launchers, each named as its op.
_LAUNCHERS = {
    "additive_attention": ("additive_attention", "additive_attention_backward"),
    "attention": ("attention", "attention_backward"),
    "dynamic_memory": ("dynamic_memory", "dynamic_memory_backward"),
    "hard_attention": (
        "categorical_sample",
        "categorical_sample_backward",
        "reinforce_loss",
        "reinforce_loss_backward",
    ),
    "lstm": ("lstm_cell", "lstm_cell_backward", "lstm", "lstm_backward"),
    "ntm": ("ntm", "ntm_backward"),
    "ntm_addressing": (
        "ntm_addressing",
        "ntm_addressing_backward",
        "ntm_content_addressing",
        "ntm_content_addressing_backward",
        "ntm_read",
        "ntm_read_backward",
        "ntm_write",
        "ntm_write_backward",
    ),
}


def register() -> None:
    """Register every launcher whose op has no CUDA kernel from the compiled module yet."""
    for module, names in _LAUNCHERS.items():
        for name in names:
            op = f"seqmem::{name}"
            if not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"):
                torch.library.impl(op, "cuda", _on_first_call(op, module, name))


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
