"""The gated delta rule as transformers computes it without a GPU, and as a JAX scan; optional."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from seqmem_fast.integrations.transformers import patch

FALLBACK = "transformers"
QWEN = "transformers.models.qwen3_next.modeling_qwen3_next"


def fallback(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Any:
    rule = importlib.import_module(QWEN).torch_chunk_gated_delta_rule
    return rule(q, k, v, g=decay, beta=beta, output_final_state=True)


def scan(q: Any, k: Any, v: Any, beta: Any, decay: Any) -> Any:
    """A step at a time."""
    import jax
    import jax.numpy as jnp

    def step(memory: Any, at: Any) -> Any:
        q, k, v, beta, decay = at
        memory = memory * jnp.exp(decay)[..., None, None]
        known = jnp.einsum("bhk,bhkv->bhv", k, memory)
        memory = memory + jnp.einsum("bhk,bhv->bhkv", k, beta[..., None] * (v - known))
        return memory, jnp.einsum("bhk,bhkv->bhv", q, memory)

    batch, _, heads, features = q.shape
    scaled = q * features**-0.5
    along = tuple(jnp.moveaxis(x, 1, 0) for x in (scaled, k, v, beta, decay))
    memory = jnp.zeros((batch, heads, features, v.shape[-1]), q.dtype)
    memory, output = jax.lax.scan(step, memory, along)
    return jnp.moveaxis(output, 0, 1), memory


class Block(nn.Module):
    """A Qwen3-Next of one layer, a gated delta rule and an MLP: as it is, or on our op."""

    def __init__(self, dim: int, heads: int, head_dim: int, *, ours: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        qwen = importlib.import_module(QWEN)
        config = qwen.Qwen3NextConfig(
            vocab_size=2,
            hidden_size=dim,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=head_dim,
            linear_num_value_heads=heads,
            linear_num_key_heads=heads,
            linear_key_head_dim=head_dim,
            linear_value_head_dim=head_dim,
            mlp_only_layers=[0],
            intermediate_size=2 * dim,
            layer_types=["linear_attention"],
            num_hidden_layers=1,
        )
        self.model = qwen.Qwen3NextModel(config)
        self.model.embed_tokens.requires_grad_(False)
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        with patch() if self.ours else nullcontext():
            output: Tensor = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        return output
