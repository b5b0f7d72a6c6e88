"""Models of transformers with a gated delta rule on :mod:`seqmem_fast.ops.delta_memory`.

Where flash-linear-attention does not run, Qwen3-Next, Qwen3.5, OLMo-hybrid and others compute it in
plain PyTorch. Tried with transformers 5.24::

    model = AutoModelForCausalLM.from_config(config)
    with seqmem_fast.integrations.transformers.patch():
        model(input_ids).logits

or ``patch()`` alone, for good.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import ops

__all__ = ["Patch", "patch"]

Rule = Callable[..., tuple[Tensor, Tensor | None]]
NAMES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


class Patch:
    """What :func:`patch` did; undone by :meth:`undo`, or at the end of a ``with``."""

    def __init__(self, places: list[tuple[ModuleType, str]]) -> None:
        self._replaced = [(module, name, vars(module)[name]) for module, name in places]
        for module, name, rule in self._replaced:
            setattr(module, name, _on_ours(rule))

    def undo(self) -> None:
        for module, name, rule in self._replaced:
            setattr(module, name, rule)
        self._replaced = []

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def patch() -> Patch:
    """The gated delta rules of all models of transformers that are loaded run on our op.

    On CPU tensors alone; others, and joined sequences (``cu_seqlens``), are left to transformers.
    Models made before are patched as well as later ones of the same kind.

    Raises:
        RuntimeError: no loaded module of transformers has a gated delta rule: import, or make, the
            model first.
    """
    modules = [m for name, m in [*sys.modules.items()] if name.startswith("transformers.models.")]
    found = [(m, name) for m in modules for name in NAMES if name in vars(m)]
    if not found:
        raise RuntimeError(
            "seqmem::delta_memory: expected a loaded model of transformers with a gated delta "
            "rule, got none: make the model first"
        )
    return Patch([(m, name) for m, name in found if not hasattr(vars(m)[name], "on_ours")])


def _on_ours(rule: Rule) -> Rule:
    """The rule by the same arguments, on our op where it can be."""

    @wraps(rule)
    def gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        *args: Any,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not query.is_cpu or args or kwargs.get("cu_seqlens") is not None:
            return rule(
                query,
                key,
                value,
                g,
                beta,
                *args,
                initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                **kwargs,
            )
        wide = torch.promote_types(query.dtype, torch.float32)
        output, state = ops.delta_memory(
            query,
            key,
            value,
            beta.to(wide),
            g.to(wide),
            None if initial_state is None else initial_state.to(wide),
            qk_l2norm=use_qk_l2norm_in_kernel,
        )
        return output, state if output_final_state else None

    vars(gated_delta_rule)["on_ours"] = True
    return gated_delta_rule
