"""Memory that is read and rewritten over several hops: one shared memory, or facts per sample."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.common import require_like

__all__ = ["DynamicMemory", "EpisodicMemory"]


class _Networks(nn.Module):
    """The update gate and the write network, and the projection of the query for the scores."""

    def __init__(
        self, memory_dim: int, hidden_dim: int, device: Any, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.memory_dim = memory_dim
        self.hidden_dim = hidden_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = memory_dim + hidden_dim
        self.update_gate = nn.Sequential(nn.Linear(width, memory_dim, **factory), nn.Sigmoid())
        self.write_net = nn.Sequential(nn.Linear(width, memory_dim, **factory), nn.Tanh())

    def _add_projection(self, device: Any, dtype: torch.dtype | None) -> None:
        self.query_projection: nn.Linear | None = None
        if self.hidden_dim != self.memory_dim:
            self.query_projection = nn.Linear(
                self.hidden_dim, self.memory_dim, bias=False, device=device, dtype=dtype
            )

    def _hops(
        self,
        query: Tensor,
        memory: Tensor,
        num_hops: int,
        mask: Tensor | None,
        return_memory: bool,
    ) -> tuple[Tensor | None, Tensor]:
        score = None if self.query_projection is None else self.query_projection(query)
        gate, write = cast("list[nn.Linear]", (self.update_gate[0], self.write_net[0]))
        return ops.dynamic_memory(
            query,
            memory,
            gate.weight,
            gate.bias,
            write.weight,
            write.bias,
            num_hops,
            score_query=score,
            mask=mask,
            return_memory=return_memory,
        )


class DynamicMemory(_Networks):
    """A learned memory that every query reads and rewrites for itself, over several hops.

    Equation and papers: :mod:`seqmem_fast.ops.dynamic_memory`. Letters: N = ``memory_size`` slots
    of width m = ``memory_dim``, queries of width h = ``hidden_dim``, B batch, K hops.

    Parameters: memory [N, m], drawn from a normal distribution; update_gate.0 and write_net.0,
    Linear layers from [read, query], m + h wide, to m; and, only where h differs from m,
    query_projection, a Linear layer without bias from h to m. The projected query serves the
    scores alone; the two networks see the query itself.

    Calling it as ``module(query, num_hops=3, *, return_memory=True)``:

    - query: [B, h], or [h] for a single one.
    - num_hops: K >= 0.
    - return_memory: whether the final memory is wanted; without it no memory is written.
    - returns the final memory [B, N, m] (or None) and the attention of each hop, a list of K
      tensors [B, N]; without B for a single query.

    Raises:
        ValueError: a shape or value does not fit. TypeError: a type, dtype or device does not.
    """

    def __init__(
        self,
        memory_size: int,
        memory_dim: int,
        hidden_dim: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_sizes(memory_size=memory_size, memory_dim=memory_dim, hidden_dim=hidden_dim)
        super().__init__(memory_dim, hidden_dim, device, dtype)
        self.memory_size = memory_size
        self.memory = nn.Parameter(torch.randn(memory_size, memory_dim, device=device, dtype=dtype))
        self._add_projection(device, dtype)

    def forward(
        self, query: Tensor, num_hops: int = 3, *, return_memory: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        form, like = "[B, hidden_dim] or [hidden_dim]", self.memory
        _check_width("query", query, self.hidden_dim, form, (1, 2), like)
        single = query.dim() == 1
        rows = query.unsqueeze(0) if single else query
        final, attention = self._hops(rows, self.memory, num_hops, None, return_memory)
        if single:
            final = None if final is None else final.squeeze(0)
            attention = attention.squeeze(1)
        return final, list(attention.unbind(0))

    def extra_repr(self) -> str:
        return f"{self.memory_size}, {self.memory_dim}, {self.hidden_dim}"


class EpisodicMemory(_Networks):
    """Answers a question from the facts of its own sample, over several hops (episodes).

    .. math::
        \\alpha_k &= \\operatorname{softmax}(M_k P c_k), \\qquad e_k = \\alpha_k^T M_k \\\\
        M_{k+1} &= (1 - g_k) \\odot M_k + g_k \\odot w_k \\\\
        c_{k+1} &= \\operatorname{GRU}(e_k, c_k)

    The memory begins as the encoded facts, the state c as the question; gate g and write w see
    [e_k, c_k] as in :class:`DynamicMemory`. Each episode thus asks with what the one before found.
    Since the state changes between the hops, each hop is a call of the op by itself, and all but
    the last write their memory [B, N, m] out.

    Papers: the dynamic memory network is that of Kumar et al. 2015 (arXiv 1506.07285), the stories
    and the several hops over them are those of Sukhbaatar et al. 2015 (arXiv 1503.08895).

    Letters: B batch, N facts (the most of any sample), m = ``memory_dim``, h = ``hidden_dim``,
    f = ``fact_dim`` (m where not given), K hops.

    Parameters: update_gate.0, write_net.0 and query_projection as in :class:`DynamicMemory`;
    state_update, a GRUCell from m to h; and, only where f differs from m, fact_projection, a
    Linear layer without bias from f to m.

    Calling it as ``module(facts, question, num_hops=3, *, lengths=None, mask=None)``:

    - facts: [B, N, f], encoded; question: [B, h], encoded. A single sample has no B in both.
    - num_hops: K >= 1.
    - lengths: [B] integers, how many facts each sample has (the first ones), 0 to N; or
    - mask: bool [B, N], true where there is a fact. What the other slots hold does not matter.
      A sample with no fact attends to nothing and reads zeros.
    - returns the answer state c_K [B, h] and the attention [K, B, N].

    Raises:
        ValueError: a shape or value does not fit. TypeError: a type, dtype or device does not.
    """

    def __init__(
        self,
        memory_dim: int,
        hidden_dim: int,
        fact_dim: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        fact_dim = memory_dim if fact_dim is None else fact_dim
        _check_sizes(memory_dim=memory_dim, hidden_dim=hidden_dim, fact_dim=fact_dim)
        super().__init__(memory_dim, hidden_dim, device, dtype)
        self.fact_dim = fact_dim
        self._add_projection(device, dtype)
        self.state_update = nn.GRUCell(memory_dim, hidden_dim, device=device, dtype=dtype)
        self.fact_projection: nn.Linear | None = None
        if fact_dim != memory_dim:
            self.fact_projection = nn.Linear(
                fact_dim, memory_dim, bias=False, device=device, dtype=dtype
            )

    def forward(
        self,
        facts: Tensor,
        question: Tensor,
        num_hops: int = 3,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        form, like = "[B, N, fact_dim] or [N, fact_dim]", self.state_update.weight_hh
        _check_width("facts", facts, self.fact_dim, form, (2, 3), like)
        single = facts.dim() == 2
        expected, dims = ("[hidden_dim]", 1) if single else ("[B, hidden_dim]", 2)
        _check_width("question", question, self.hidden_dim, expected, (dims,), like)
        if num_hops < 1:
            raise ValueError(f"{_op}: expected num_hops >= 1, got {num_hops}")
        if single:
            facts, question = facts.unsqueeze(0), question.unsqueeze(0)
            lengths = None if lengths is None else lengths.unsqueeze(0)
            mask = None if mask is None else mask.unsqueeze(0)
        mask = _mask_of(lengths, mask, facts)
        if mask is not None:
            facts = facts.masked_fill(~mask.unsqueeze(-1), 0)
        memory = facts if self.fact_projection is None else self.fact_projection(facts)
        state, history = question, []
        for hop in range(num_hops):
            last = hop + 1 == num_hops
            after, attention = self._hops(state, memory, 1, mask, not last)
            episode = (attention.squeeze(0).unsqueeze(1) @ memory).squeeze(1)  # [B, m]
            state = self.state_update(episode, state)
            history.append(attention)
            memory = memory if after is None else after
        weights = torch.cat(history)
        return (state.squeeze(0), weights.squeeze(1)) if single else (state, weights)

    def extra_repr(self) -> str:
        return f"{self.memory_dim}, {self.hidden_dim}, fact_dim={self.fact_dim}"


_op = "seqmem::dynamic_memory"


def _check_sizes(**sizes: object) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{_op}: expected {name} to be an int, got {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"{_op}: expected {name} > 0, got {size}")


def _check_width(
    name: str, value: object, width: int, form: str, dims: tuple[int, ...], like: Tensor
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{_op}: expected {name} to be a tensor, got {type(value).__name__}")
    if value.dim() not in dims or value.size(-1) != width:
        raise ValueError(
            f"{_op}: expected {name} of shape {form} with {width} in the last dimension, "
            f"got {list(value.shape)}"
        )
    require_like("dynamic_memory", like, **{name: value})


def _mask_of(lengths: Tensor | None, mask: Tensor | None, facts: Tensor) -> Tensor | None:
    """The mask that is meant, checked, for it is applied before the op sees it."""
    batch, slots, _ = facts.shape
    if mask is not None:
        if lengths is not None:
            raise ValueError(f"{_op}: expected lengths or mask, got both")
        _check_options("mask", mask, (torch.bool,), (batch, slots))
    if lengths is None:
        return mask
    _check_options("lengths", lengths, (torch.int64, torch.int32), (batch,))
    if lengths.is_cpu and not torch.compiler.is_compiling():  # else no value can be looked at
        wrong = (lengths < 0) | (lengths > slots)
        if wrong.any():
            raise ValueError(f"{_op}: expected lengths in 0..{slots}, got {int(lengths[wrong][0])}")
    return torch.arange(slots, device=facts.device) < lengths.to(facts.device).unsqueeze(1)


def _check_options(
    name: str, value: object, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{_op}: expected {name} to be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{_op}: expected {name} of dtype {expected}, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{_op}: expected {name} of shape {list(shape)}, got {list(value.shape)}")
