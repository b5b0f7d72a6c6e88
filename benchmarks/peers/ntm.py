"""The NTM as a jitted JAX scan: one LSTM layer and the heads "wr"; optional."""

from __future__ import annotations

from typing import Any


def _address(memory: Any, p: Any, weights: Any) -> tuple[Any, Any]:
    """A head's new weights [B, N] from its parameters, and the parameters that are left over."""
    import jax
    import jax.numpy as jnp

    width = memory.shape[2]
    key, beta, gate = jnp.tanh(p[:, :width]), jax.nn.softplus(p[:, width]), p[:, width + 1]
    shift = jax.nn.softmax(p[:, width + 2 : width + 5])
    gamma = 1 + jax.nn.softplus(p[:, width + 5])
    norms = jnp.sqrt((memory**2).sum(2)) * jnp.sqrt((key**2).sum(1, keepdims=True))
    similarity = jnp.einsum("bnm,bm->bn", memory, key) / (norms + 1e-8)
    content = jax.nn.softmax(beta[:, None] * similarity)
    gate = jax.nn.sigmoid(gate)[:, None]
    mixed = gate * content + (1 - gate) * weights
    moved = sum(shift[:, j, None] * jnp.roll(mixed, j - 1, axis=1) for j in range(3))
    sharpened = jax.nn.softmax(gamma[:, None] * jnp.log(moved))
    return sharpened, p[:, width + 6 :]


def run(x: Any, state: Any, controller: Any, head_weight: Any, head_bias: Any) -> Any:
    import jax
    import jax.numpy as jnp

    weight_ih, weight_hh, bias_ih, bias_hh = controller
    inputs, width = x.shape[2], state[2].shape[2]
    projected = x @ weight_ih[:, :inputs].T + (bias_ih + bias_hh)
    from_reads = weight_ih[:, inputs:].T

    def step(carry: Any, z: Any) -> Any:
        h, c, memory, weights, reads = carry
        i, f, g, o = jnp.split(z + reads[:, 0] @ from_reads + h[0] @ weight_hh.T, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c[0] + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        p = h @ head_weight.T + head_bias
        written, p = _address(memory, p, weights[:, 0])
        erase, add = jax.nn.sigmoid(p[:, :width]), jnp.tanh(p[:, width : 2 * width])
        memory = memory * (1 - written[:, :, None] * erase[:, None])
        memory = memory + written[:, :, None] * add[:, None]
        read_from, _ = _address(memory, p[:, 2 * width :], weights[:, 1])
        read = jnp.einsum("bn,bnm->bm", read_from, memory)
        weights = jnp.stack([written, read_from], axis=1)
        carry = (h[None], c[None], memory, weights, read[:, None])
        return carry, jnp.concatenate([h, read], axis=-1)

    state, features = jax.lax.scan(step, tuple(state), projected)
    return features, state
