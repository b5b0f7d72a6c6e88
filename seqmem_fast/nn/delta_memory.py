"""A layer over the gated delta rule, :mod:`seqmem_fast.ops.delta_memory`.

Paper: Yang, Kautz & Hatamizadeh, Gated delta networks: improving Mamba2 with delta rule, arXiv
2412.06464, 2024; the parameters' names and order are those of Qwen3-Next in transformers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.common import require_like, require_tensors

__all__ = ["DeltaMemory", "DeltaMemoryState"]


class DeltaMemoryState(NamedTuple):
    """What a :class:`DeltaMemory` hands from one call to the next."""

    conv: Tensor  # [B, width - 1, channels]: the last inputs of the convolution
    memory: Tensor  # [B, H, K, V], float32 or wider

    def detach(self) -> DeltaMemoryState:
        """The same values without their history: later gradients end here."""
        return DeltaMemoryState(*(t.detach() for t in self))


class _GatedNorm(nn.Module):
    """weight * x / rms(x) * silu(gate), over the last dimension, in float32 at least."""

    def __init__(self, size: int, eps: float, **made: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, **made))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        x = F.rms_norm(x.to(wide), x.shape[-1:], eps=self.eps).to(dtype)
        return (self.weight * x * F.silu(gate.to(wide))).to(dtype)


class DeltaMemory(nn.Module):
    """Gated DeltaNet: a memory of fixed size for each head that replaces what a key held.

    q, k and v are projections of the input after a short causal convolution and SiLU; with b and a,
    further projections, beta = sigmoid(b) and the log of the decay = -exp(A_log) * softplus(a +
    dt_bias); queries and keys have norm 1. The output is normalised, gated by SiLU of a projection
    z, and projected.

    Args:
        dim: D, the width of input and output.
        heads: H, of values.
        head_dim: K, the features of a key.
        key_heads: Hk, which divides H; H by default.
        value_dim: V, the features of a value; K by default.
        conv_width: steps that the convolution sees, at least 1.
        eps: of the output's norm.
        device, dtype: of the parameters.

    ``memory(input, state=None, *, lengths=None, reset=None)``:

    - input: [B, T, D].
    - state: :class:`DeltaMemoryState` of the call before, for running a sequence in chunks; None
      for an empty one (:meth:`init_state`).
    - lengths: [B] int64, row b ends after ``lengths[b]`` steps, 0 <= lengths <= T; later outputs
      are zero and the state is that at the length.
    - reset: bool [B, T], true where step t starts anew, as the next of several joined sequences.
    - returns output [B, T, D] and the DeltaMemoryState after the last step.

    Errors are a ValueError for shapes and values, a TypeError for dtypes and devices.

    Parameters: in_proj_qkvz.weight [2 Hk K + 2 H V, D], for each key head rows q, k, then v and z
    of its value heads; in_proj_ba.weight [2 H, D], for each key head rows b, then a; conv1d.weight
    [2 Hk K + H V, 1, width]; dt_bias [H] (its softplus is 0.001 to 0.1), A_log [H] (log of 0.01 to
    16); norm.weight [V]; out_proj.weight [D, H V].
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
        key_heads: int | None = None,
        value_dim: int | None = None,
        conv_width: int = 4,
        eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.key_heads = heads if key_heads is None else key_heads
        self.value_dim = head_dim if value_dim is None else value_dim
        self.conv_width = conv_width
        for name in ("dim", "heads", "head_dim", "key_heads", "value_dim", "conv_width"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"seqmem::delta_memory: expected {name} > 0, got {getattr(self, name)}"
                )
        if heads % self.key_heads != 0:
            raise ValueError(
                f"seqmem::delta_memory: expected key_heads that divides {heads} heads, got "
                f"{self.key_heads}"
            )
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        keys, values = self.key_heads * head_dim, heads * self.value_dim
        self._sizes = [keys, keys, values]
        channels = sum(self._sizes)
        self.conv1d = nn.Conv1d(
            channels,
            channels,
            conv_width,
            groups=channels,
            padding=conv_width - 1,
            bias=False,
            **made,
        )
        self.in_proj_qkvz = nn.Linear(dim, 2 * (keys + values), bias=False, **made)
        self.in_proj_ba = nn.Linear(dim, 2 * heads, bias=False, **made)
        self.dt_bias = nn.Parameter(torch.empty(heads, **made))
        self.A_log = nn.Parameter(torch.empty(heads, **made))
        self.norm = _GatedNorm(self.value_dim, eps, **made)
        self.out_proj = nn.Linear(values, dim, bias=False, **made)
        self._reset_gates()

    @classmethod
    def from_transformers(cls, layer: nn.Module) -> DeltaMemory:
        """A copy of transformers' ``Qwen3NextGatedDeltaNet`` with the same parameters."""
        given: Any = layer
        weight = given.in_proj_qkvz.weight
        made = cls(
            given.hidden_size,
            given.num_v_heads,
            given.head_k_dim,
            key_heads=given.num_k_heads,
            value_dim=given.head_v_dim,
            conv_width=given.conv_kernel_size,
            eps=given.layer_norm_epsilon,
            device=weight.device,
            dtype=weight.dtype,
        )
        made.load_state_dict(given.state_dict())
        return made

    def _reset_gates(self) -> None:
        """As Gated DeltaNet and Mamba 2."""
        with torch.no_grad():
            self.A_log.uniform_(0.01, 16).log_()
            step = self.dt_bias.uniform_(math.log(0.001), math.log(0.1)).exp_()
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def init_state(self, batch_size: int) -> DeltaMemoryState:
        """An empty one."""
        weight = self.conv1d.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        memory = batch_size, self.heads, self.head_dim, self.value_dim
        return DeltaMemoryState(
            weight.new_zeros(batch_size, self.conv_width - 1, sum(self._sizes)),
            weight.new_zeros(memory, dtype=wide),
        )

    def forward(
        self,
        input: Tensor,
        state: DeltaMemoryState | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, DeltaMemoryState]:
        if input.dim() != 3 or input.shape[2] != self.dim:
            raise ValueError(
                f"seqmem::delta_memory: expected input of shape [B, T, {self.dim}], got "
                f"{list(input.shape)}"
            )
        require_like("delta_memory", self.out_proj.weight, input=input)
        batch, steps, _ = input.shape
        require_tensors("delta_memory", lengths=lengths, reset=reset)
        if lengths is not None and lengths.shape == (batch,):  # others the op refuses
            inside = torch.arange(steps, device=input.device) < lengths.to(input.device)[:, None]
            input = torch.where(inside.unsqueeze(-1), input, 0)  # padding may hold NaN
        conv, memory = self.init_state(batch) if state is None else state
        if conv.shape != (batch, self.conv_width - 1, sum(self._sizes)):
            raise ValueError(
                "seqmem::delta_memory: expected state.conv of shape "
                f"{[batch, self.conv_width - 1, sum(self._sizes)]}, got {list(conv.shape)}"
            )
        if reset is not None and reset.shape != (batch, steps):
            raise ValueError(
                f"seqmem::delta_memory: expected reset of shape {[batch, steps]}, got "
                f"{list(reset.shape)}"
            )
        mixed, z, beta, decay = self._project(input)
        padded = torch.cat((conv.to(mixed.dtype), mixed), 1)
        part = None  # by number, which of the joined sequences a step belongs to
        if reset is not None:
            part = F.pad(reset.long().cumsum(1), (self.conv_width - 1, 0))
        counts = self.key_heads, self.key_heads, self.heads
        parts = self._convolve(padded, part).split(self._sizes, -1)
        q, k, v = (x.unflatten(2, (n, -1)) for x, n in zip(parts, counts, strict=True))
        output, memory = ops.delta_memory(
            q, k, v, beta, decay, memory, qk_l2norm=True, lengths=lengths, reset=reset
        )
        found: Tensor = self.out_proj(self.norm(output, z).flatten(2))
        return found, DeltaMemoryState(self._rest(padded, part, lengths), memory)

    def _project(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[q, k, v] side by side, z [B, T, H, V], beta and the log of the decay [B, T, H]."""
        per_key, group = self.head_dim, self.heads // self.key_heads
        sizes = [per_key, per_key, group * self.value_dim, group * self.value_dim]
        qkvz = self.in_proj_qkvz(input).unflatten(2, (self.key_heads, -1)).split(sizes, -1)
        *qkv, z = (x.flatten(2) for x in qkvz)
        ba = self.in_proj_ba(input).unflatten(2, (self.key_heads, -1)).split(group, -1)
        b, a = (x.flatten(2) for x in ba)
        wide = torch.promote_types(a.dtype, torch.float32)
        decay = -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias)
        return torch.cat(qkv, -1), z.unflatten(2, (self.heads, -1)), b.sigmoid(), decay

    def _convolve(self, padded: Tensor, part: Tensor | None) -> Tensor:
        """SiLU of the convolution of [B, width - 1 + T, channels], which begins with what the call
        before left."""
        before, weight = self.conv_width - 1, self.conv1d.weight
        steps = padded.shape[1] - before
        total = padded[:, before:] * weight[:, 0, before]
        for k in range(before):
            taken = padded[:, k : k + steps]
            if part is not None:
                other = part[:, k : k + steps] != part[:, before:]
                taken = taken.masked_fill(other.unsqueeze(-1), 0)
            total = torch.addcmul(total, taken, weight[:, 0, k])
        return F.silu(total)

    def _rest(self, padded: Tensor, part: Tensor | None, lengths: Tensor | None) -> Tensor:
        """The inputs that the next call begins with; zeros for those before a reset."""
        before = self.conv_width - 1
        if lengths is None:
            lengths = torch.full((padded.shape[0],), padded.shape[1] - before)
        kept = lengths.to(padded.device).unsqueeze(1) + torch.arange(before, device=padded.device)
        rest = padded.gather(1, kept.unsqueeze(-1).expand(-1, -1, padded.shape[2]))
        if part is None or before == 0:
            return rest
        numbers = part.gather(1, kept)  # the last is that of the last step
        return rest.masked_fill((numbers != numbers[:, -1:]).unsqueeze(-1), 0)

    def extra_repr(self) -> str:
        said = f"{self.dim}, {self.heads}, {self.head_dim}"
        if self.key_heads != self.heads:
            said += f", key_heads={self.key_heads}"
        if self.value_dim != self.head_dim:
            said += f", value_dim={self.value_dim}"
        return said if self.conv_width == 4 else f"{said}, conv_width={self.conv_width}"
