r"""A memory of the past at two resolutions, and attention over it.

Of a stream of vectors the newest n_m are kept as they are. What leaves them waits until c vectors
are there, which together become one compressed vector; the newest n_cm of those are kept. So
n_m + n_cm slots reach back n_m + c n_cm steps:

.. math::
    [\mathrm{old}, m] &\leftarrow [\mathrm{pending}, m, h] \quad (m \text{ the last } n_m) \\
    cm &\leftarrow \text{the last } n_{cm} \text{ of }
        [cm, f_c(\mathrm{old}_1), f_c(\mathrm{old}_2), \dots]
        \quad (\mathrm{old}_j \text{ of } c \text{ vectors})

Attention reads [cm, pending, m, h], causal inside the segment h. No gradient passes from one
segment to the vectors of an earlier one. f_c is the mean, the maximum, a convolution of width and
stride c, or the vector of the c that was attended to most. The convolution is trained by what the
attention's layer makes of it (with Q, K, V and h as constants),

.. math:: \mathcal{L} = \lVert \mathrm{attn}(h, \mathrm{old}) - \mathrm{attn}(h, f_c(\mathrm{old}))
    \rVert^2,

or through the task itself.

Paper: Rae, Potapenko, Jayakumar & Lillicrap, Compressive Transformers for Long-Range Sequence
Modelling, arXiv 1911.05507, 2019. Unlike there, a slot without a vector takes part in nothing, and
the memories are the same however a stream is cut into segments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.common import require_like

__all__ = ["Compression", "CompressiveAttention", "CompressiveMemory", "CompressiveState"]

_FUNCTIONS = ("mean", "max", "conv", "most_used")
_TRAINED = ("reconstruction", "task")
_ATTENTION, _MEMORY = "seqmem::compressive_attention", "seqmem::compressive_memory"


class CompressiveState(NamedTuple):
    """What a row remembers. Slots are filled from the right, the newest last; empty ones are 0.

    How many slots are filled follows from `steps`. E is the width, c the ratio; S = c - 1 + n_m for
    the function "most_used", otherwise 0; the last two are float32, or float64 beside it.
    ``torch.save(state._asdict(), path)`` keeps one.
    """

    steps: Tensor  # int64 [B]: since the row was empty
    memory: Tensor  # [B, n_m, E]
    pending: Tensor  # [B, c - 1, E]
    compressed: Tensor  # [B, n_cm, E]
    received: Tensor  # [B, S]: the attention that pending and memory got, summed over queries
    asked: Tensor  # [B, S]: by how many queries

    def detach(self) -> CompressiveState:
        """The same values without their history: later gradients end here."""
        return CompressiveState(*(t.detach() for t in self))


class Compression(NamedTuple):
    """What a segment made a memory compress: K groups, of which a row uses the first few."""

    old: Tensor  # [B, K, c, E]; 0 where not valid
    new: Tensor  # [B, K, E]; 0 where not valid
    valid: Tensor  # bool [B, K]


class CompressiveMemory(nn.Module):
    """The memory alone: takes segments of a stream, keeps the newest vectors and compressed ones.

    Args:
        dim: E, the width of a vector.
        memory_size: n_m >= 1, vectors kept as they are.
        compressed_size: n_cm >= 1, compressed vectors kept.
        ratio: c >= 1, vectors in one compressed vector.
        function: "mean", "max", "conv" (starts as the mean) or "most_used".
        trained_by: what reaches the convolution's weights: "reconstruction", by
            :meth:`CompressiveAttention.reconstruction_loss` alone, or "task", by the gradients of
            whatever reads the compressed vectors; then a training step goes over several segments
            and ends with ``state.detach()``.
        device, dtype: of the parameters.

    ``memory(input, state=None, *, lengths=None, reset=None, weights=None) -> (state,
    compression)``:

    - input: [B, T, E], one segment, T >= 0.
    - state: :class:`CompressiveState` of the segment before; None for :meth:`init_state`.
    - lengths: int64 [B], row b's segment ends after ``lengths[b]`` steps, 0 <= lengths <= T.
    - reset: bool [B], the row forgets all before this segment, or [B, T], all before step t.
    - weights: [B, T, n_cm + c - 1 + n_m + T], the attention that the segment paid to the slots and
      to itself; "most_used" needs it.

    Errors are a ValueError for shapes and values, a TypeError for dtypes. Parameters, of "conv"
    alone: conv.weight [E, E, c] and conv.bias [E].
    """

    def __init__(
        self,
        dim: int,
        memory_size: int,
        compressed_size: int,
        ratio: int = 4,
        function: str = "mean",
        trained_by: str = "reconstruction",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.memory_size, self.compressed_size = dim, memory_size, compressed_size
        self.ratio, self.function, self.trained_by = ratio, function, trained_by
        for name in ("dim", "memory_size", "compressed_size", "ratio"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise TypeError(f"{_MEMORY}: expected {name} to be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{_MEMORY}: expected {name} > 0, got {value}")
        for name, allowed in (("function", _FUNCTIONS), ("trained_by", _TRAINED)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{_MEMORY}: expected {name} as one of {list(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )
        self.conv: nn.Conv1d | None = None
        if function == "conv":
            self.conv = nn.Conv1d(dim, dim, ratio, ratio, device=device, dtype=dtype)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The convolution becomes the mean."""
        if self.conv is not None:
            with torch.no_grad():
                for parameter in self.conv.parameters():
                    parameter.zero_()
                self.conv.weight.diagonal().fill_(1 / self.ratio)

    @property
    def slots(self) -> int:
        """How many there are: n_cm + c - 1 + n_m."""
        return self.compressed_size + self.ratio - 1 + self.memory_size

    def init_state(self, like: Tensor) -> CompressiveState:
        """Empty memories for the rows of a segment [B, T, E]."""
        rows, places = like.size(0), self.ratio - 1 + self.memory_size
        counts = torch.promote_types(like.dtype, torch.float32)  # bfloat16 cannot count beyond 256
        used = places if self.function == "most_used" else 0
        return CompressiveState(
            torch.zeros(rows, dtype=torch.int64, device=like.device),
            like.new_zeros(rows, self.memory_size, self.dim),
            like.new_zeros(rows, self.ratio - 1, self.dim),
            like.new_zeros(rows, self.compressed_size, self.dim),
            like.new_zeros(rows, used, dtype=counts),
            like.new_zeros(rows, used, dtype=counts),
        )

    def read(self, state: CompressiveState) -> tuple[Tensor, Tensor]:
        """All slots [B, n_cm + c - 1 + n_m, E], the oldest first, and which hold a vector."""
        left, groups = self._gone(state.steps)
        filled = (
            _last(groups, self.compressed_size),
            _last(left % self.ratio, self.ratio - 1),
            _last(state.steps, self.memory_size),
        )
        slots = torch.cat((state.compressed, state.pending, state.memory), 1)
        return slots, torch.cat(filled, 1)

    def forward(
        self,
        input: Tensor,
        state: CompressiveState | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[CompressiveState, Compression]:
        state = self.check(_MEMORY, input, state, lengths, reset)
        time, c = input.size(1), self.ratio
        start, end = _span(input, lengths, reset)
        kept = start < 0  # the row goes on from its state
        start = start.clamp(min=0)
        before = torch.where(kept, state.steps, 0)
        count = before + end - start
        left, groups = self._gone(before)
        new_left, new_groups = self._gone(count)

        # pending, memory and segment side by side; a row's vectors are one run of them
        inside = torch.arange(time, device=input.device) < end[:, None]
        segment = torch.where(inside[..., None], input, 0)
        stream = torch.cat((state.pending, state.memory, segment), 1).detach()
        places = c - 1 + self.memory_size
        full = before.clamp(max=self.memory_size)
        first = torch.where(kept, places - full - left % c, places + start)

        most = (time + c - 1) // c
        valid = torch.arange(most, device=input.device) < (new_groups - groups)[:, None]
        old = _run(stream, first, most * c).unflatten(1, (most, c))
        old = torch.where(valid[..., None, None], old, 0)
        received, asked, usage = state.received, state.asked, None
        if self.function == "most_used":
            received, asked = self._attended(state, weights, input, lengths, reset)
            mean = torch.where(asked > 0, received / asked.clamp(min=1), 0)
            usage = _run(mean, first, most * c).unflatten(1, (most, c))
            received, asked = (_run(t, end, places) for t in (received, asked))
            in_use = torch.cat((_last(new_left % c, c - 1), _last(count, self.memory_size)), 1)
            received, asked = received * in_use, asked * in_use
        new = torch.where(valid[..., None], self.compress(old, usage), 0)

        compressed = torch.where(kept[:, None, None], state.compressed, 0)
        made = new if self.trained_by == "task" else new.detach()
        compressed = _run(
            torch.cat((compressed, made), 1), new_groups - groups, self.compressed_size
        )
        memory = _run(stream, end + c - 1, self.memory_size)
        pending = _run(stream, end, c - 1)
        state = CompressiveState(
            count,
            torch.where(_last(count, self.memory_size)[..., None], memory, 0),
            torch.where(_last(new_left % c, c - 1)[..., None], pending, 0),
            torch.where(_last(new_groups, self.compressed_size)[..., None], compressed, 0),
            received,
            asked,
        )
        return state, Compression(old, new, valid)

    def compress(self, old: Tensor, usage: Tensor | None = None) -> Tensor:
        """f_c: groups [B, K, c, E] (and how much each vector was used, [B, K, c]) -> [B, K, E]."""
        if self.function == "mean":
            return old.mean(2)
        if self.function == "max":
            return old.amax(2)
        if self.conv is not None:
            weight = self.conv.weight.transpose(1, 2).flatten(1)  # [E, c * E]
            return F.linear(old.flatten(2), weight, self.conv.bias)
        assert usage is not None
        best = usage.sort(stable=True, dim=2, descending=True).indices[..., :1, None]
        return old.gather(2, best.expand(-1, -1, 1, self.dim)).squeeze(2)

    def visible(
        self,
        input: Tensor,
        state: CompressiveState,
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> Tensor:
        """Which slots and which steps of the segment a step may see, bool [B, T, slots + T]."""
        rows, time = input.shape[:2]
        _, filled = self.read(state)
        at = torch.arange(time, device=input.device)
        own = (at <= at[:, None]).expand(rows, time, time)
        slots = filled[:, None].expand(rows, time, -1)
        if reset is not None:
            begun = _each_step(reset, time).cumsum(1)
            own = own & (begun[:, None] == begun[..., None])
            slots = slots & (begun == 0)[..., None]
        if lengths is not None:  # steps beyond see themselves, so that every step sees something
            inside = at < lengths[:, None].to(at.device)
            own = own & (inside[:, None] | (at == at[:, None]))
        return torch.cat((slots, own), 2)

    def check(
        self,
        op: str,
        input: Tensor,
        state: CompressiveState | None,
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> CompressiveState:
        """Refuse what does not fit, in the name of `op`; the state, an empty one for None."""
        if input.dim() != 3 or input.size(2) != self.dim:
            raise ValueError(
                f"{op}: expected input of shape [B, T, {self.dim}], got {list(input.shape)}"
            )
        rows, time = input.shape[:2]
        given = self.init_state(input) if state is None else state
        for name, value, empty in zip(
            CompressiveState._fields, given, self.init_state(input), strict=True
        ):
            if value.shape != empty.shape:
                raise ValueError(
                    f"{op}: expected {name} of shape {list(empty.shape)}, got {list(value.shape)}"
                )
            if value.dtype != empty.dtype:
                raise TypeError(f"{op}: expected {name} of {empty.dtype}, got {value.dtype}")
        if lengths is not None:
            if lengths.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"{op}: expected lengths of int64 or int32, got {lengths.dtype}")
            if list(lengths.shape) != [rows]:
                raise ValueError(
                    f"{op}: expected lengths of shape [{rows}], got {list(lengths.shape)}"
                )
            if lengths.is_cpu and not torch.compiler.is_compiling():  # a GPU would be waited for
                for length in lengths.tolist():
                    if not 0 <= length <= time:
                        raise ValueError(f"{op}: expected lengths in 0..{time}, got {length}")
        if reset is not None:
            if reset.dtype != torch.bool:
                raise TypeError(f"{op}: expected reset of torch.bool, got {reset.dtype}")
            if list(reset.shape) not in ([rows], [rows, time]):
                raise ValueError(
                    f"{op}: expected reset of shape [{rows}] or [{rows}, {time}], "
                    f"got {list(reset.shape)}"
                )
        return given

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, {self.memory_size}, {self.compressed_size}, ratio={self.ratio}, "
            f"function={self.function!r}"
        )

    def _gone(self, count: Tensor) -> tuple[Tensor, Tensor]:
        """How many of a row's vectors have left the memory, and the groups they filled."""
        left = (count - self.memory_size).clamp(min=0)
        return left, left // self.ratio

    def _attended(
        self,
        state: CompressiveState,
        weights: Tensor | None,
        input: Tensor,
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`received` and `asked` of pending, memory and segment [B, c - 1 + n_m + T]."""
        rows, time = input.shape[:2]
        shape = [rows, time, self.slots + time]
        if weights is None or list(weights.shape) != shape:
            got = None if weights is None else list(weights.shape)
            raise ValueError(f"{_MEMORY}: expected weights of shape {shape}, got {got}")
        seen = self.visible(input, state, lengths, reset)
        if lengths is not None:
            at = torch.arange(time, device=input.device)
            seen = seen & (at < lengths[:, None].to(at.device))[..., None]
        seen = seen[..., self.compressed_size :]
        paid = torch.where(seen, weights.detach()[..., self.compressed_size :], 0)
        fresh = state.asked.new_zeros(rows, time)
        received = torch.cat((state.received, fresh), 1) + paid.sum(1, dtype=fresh.dtype)
        return received, torch.cat((state.asked, fresh), 1) + seen.sum(1)


class CompressiveAttention(nn.Module):
    """Multi-head self-attention over a segment and a :class:`CompressiveMemory` of those before.

    Args:
        embed_dim: E, the width of input and output.
        num_heads: H, dividing E.
        memory_size, compressed_size, ratio, function, trained_by: of the memory.
        dropout: probability of zeroing a weight in training.
        bias: with in_proj_bias and out_proj.bias.
        device, dtype: of the parameters.

    ``attention(input, state=None, *, lengths=None, reset=None, need_weights=True,
    average_attn_weights=True) -> (output, state, weights)``:

    - input, state, lengths, reset: as of :class:`CompressiveMemory`; the batch comes first.
    - output: [B, T, E], zero beyond lengths.
    - weights: [B, T, n_cm + c - 1 + n_m + T], the heads' mean, or [B, H, ...] of each head; None
      unless asked for. Columns are the slots, the oldest first, then the segment. Differentiable.
      :func:`seqmem_fast.plot.compressive` draws them over the steps that they stand for.

    Where something is in the stream is for the caller to say, in the input itself. Errors are a
    ValueError for shapes and values, a TypeError for dtypes and devices. Equations and paper are in
    the module's docstring.

    Parameters: in_proj_weight [3E, E], in_proj_bias [3E], out_proj.weight [E, E] and out_proj.bias
    [E], drawn as torch.nn.MultiheadAttention's; memory.conv.* for "conv".
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        memory_size: int,
        compressed_size: int,
        ratio: int = 4,
        function: str = "mean",
        trained_by: str = "reconstruction",
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"{_ATTENTION}: expected embed_dim > 0 that num_heads > 0 divides, "
                f"got {embed_dim} and {num_heads}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"{_ATTENTION}: expected 0 <= dropout < 1, got {dropout}")
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        made = {"device": device, "dtype": dtype}
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **made))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **made)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        self.memory = CompressiveMemory(
            embed_dim, memory_size, compressed_size, ratio, function, trained_by, **made
        )
        self._compressed: tuple[Tensor, Compression] | None = None  # of the last call
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn.MultiheadAttention draws them; out_proj.weight stays as nn.Linear drew it."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        self.memory.reset_parameters()

    def init_state(self, like: Tensor) -> CompressiveState:
        """Empty memories for the rows of a segment [B, T, E]."""
        return self.memory.init_state(like)

    def forward(
        self,
        input: Tensor,
        state: CompressiveState | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        need_weights: bool = True,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, CompressiveState, Tensor | None]:
        memory = self.memory
        require_like("compressive_attention", self.in_proj_weight, input=input)
        state = memory.check(_ATTENTION, input, state, lengths, reset)
        inside = None
        if lengths is not None:  # padding may hold anything, even NaN
            at = torch.arange(input.size(1), device=input.device)
            inside = (at < lengths[:, None].to(at.device))[..., None]
            input = torch.where(inside, input, 0)
        slots, _ = memory.read(state)
        mask = memory.visible(input, state, lengths, reset)[:, None]
        q, k, v = self._project(input, torch.cat((slots, input), 1))
        if self.training and self.dropout > 0:
            # Values of no features: the weights alone, thinned before they meet the values.
            weights = F.dropout(ops.attention(q, k, v[..., :0], mask)[1], self.dropout)
            output = weights @ v
        else:
            output, weights = ops.attention(q, k, v, mask)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if inside is not None:
            output = torch.where(inside, output, 0)
        mean = weights.mean(1)
        state, compression = memory(input, state, lengths=lengths, reset=reset, weights=mean)
        self._compressed = input.detach(), compression
        if not need_weights:
            return output, state, None
        return output, state, mean if average_attn_weights else weights

    def reconstruction_loss(self) -> Tensor:
        """How far attention to what the last call compressed is from attention to what it was.

        The squared distance, averaged over the queries of rows that compressed something; 0 where
        none did. Its gradient reaches the convolution alone.
        """
        if self._compressed is None:
            raise ValueError(f"{_ATTENTION}: expected a call before its reconstruction_loss")
        input, (old, new, valid) = self._compressed
        asks = valid.any(1)
        if valid.size(1) == 0:
            return new.sum()
        attended = []
        for vectors, holds in ((old.flatten(1, 2), valid.repeat_interleave(old.size(2), 1)),
                               (new, valid)):  # fmt: skip
            q, k, v = self._project(input, vectors, constant=True)
            attended.append(ops.attention(q, k, v, holds[:, None, None])[0])
        apart = (attended[0] - attended[1]).square().sum((1, 3))  # [B, T]
        apart = torch.where(asks[:, None], apart, 0)
        return apart.sum() / (asks.sum() * input.size(1)).clamp(min=1)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}"

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last call compressed, whose history cannot be copied."""
        return {**super().__getstate__(), "_compressed": None}

    def _project(self, queries: Tensor, slots: Tensor, constant: bool = False) -> list[Tensor]:
        """q [B, H, T, E / H], k and v [B, H, S, E / H]; with parameters as constants if asked."""
        weight: Tensor = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        if constant:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        widths = [self.embed_dim, 2 * self.embed_dim]
        q_bias, kv_bias = (None, None) if bias is None else bias.split(widths)
        q_weight, kv_weight = weight.split(widths)
        q = F.linear(queries, q_weight, q_bias)
        parts = [q, *F.linear(slots, kv_weight, kv_bias).chunk(2, -1)]
        return [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in parts]


def _last(count: Tensor, size: int) -> Tensor:
    """Bool [B, size]: the last `count` places."""
    return torch.arange(size, device=count.device) >= size - count[:, None]


def _run(source: Tensor, first: Tensor, size: int) -> Tensor:
    """[B, size, ...]: of each row that many entries from `first` on, whatever beyond the end."""
    at = first[:, None] + torch.arange(size, device=source.device)
    at = at.clamp(0, max(source.size(1) - 1, 0))
    if source.dim() == 3:
        return source.gather(1, at[..., None].expand(-1, -1, source.size(2)))
    return source.gather(1, at)


def _each_step(reset: Tensor, time: int) -> Tensor:
    """Reset [B, T]; one of a whole row stands at its first step."""
    return reset if reset.dim() == 2 else F.pad(reset[:, None], (0, time - 1))[:, :time]


def _span(input: Tensor, lengths: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each row the step at which it was last emptied, -1 for none, and its length."""
    rows, time = input.shape[:2]
    device = input.device
    end = torch.full((rows,), time, device=device) if lengths is None else lengths.to(device).long()
    none = torch.full((rows,), -1, device=device)
    if reset is None:
        return none, end
    if reset.dim() == 1:
        return torch.where(reset, 0, none), end
    at = torch.arange(time, device=device)
    steps = torch.where(reset & (at < end[:, None]), at, -1)
    return (steps.amax(1) if time > 0 else none), end
