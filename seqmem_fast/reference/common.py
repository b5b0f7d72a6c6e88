"""What the references of all ops share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Layers = Sequence[tuple[Tensor, ...]]
State = TypeVar("State", bound="tuple[Tensor, ...]")  # hidden and cell [L, B, C], others [B, ..]

BISECTIONS = {torch.float64: 54}  # of tau, to its last bit
ALPHAS = {"softmax": 1.0, "sparsemax": 2.0, "entmax15": 1.5}  # of entmax, whose limit softmax is
DERIVATIVES = 2  # Newton steps that are differentiated: derivatives up to the third are exact
MASKED = -1e9  # the score of a masked entry; a row without any other is uniform


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with a mask applied: a floating one is added, any other masks where it is 0."""
    if mask is None:
        return scores
    if mask.is_floating_point():
        return scores + mask
    return torch.where(mask == 0, max(MASKED, torch.finfo(scores.dtype).min), scores)


def attend(weights: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """weights [..., Tq, Tk], value [..., Tk, Dv] -> output, and weights in the batch of both."""
    batch = torch.broadcast_shapes(weights.shape[:-2], value.shape[:-2])
    weights = weights.expand(*batch, -1, -1)
    return weights @ value, weights


def norm(x: Tensor) -> Tensor:
    """Euclidean, over the last dimension; every derivative at the zero vector is 0, never NaN."""
    squares = (x * x).sum(-1)
    zero = squares == 0
    return torch.sqrt(squares.masked_fill(zero, 1)).masked_fill(zero, 0)


def entmax(input: Tensor, alpha: Tensor | float = 1.5, dim: int = -1) -> Tensor:
    """input [..., K, ...] -> probabilities over ``dim``; alpha a number, or a tensor that
    broadcasts to input and has one element along ``dim``.

    An entry of -inf is 0; a row of -inf alone is 0 everywhere. A NaN or +inf makes its row NaN.
    """
    out = input.isneginf()
    wrong = (input.isnan() | input.isposinf()).any(dim, keepdim=True)
    z = input.masked_fill(out | wrong, 0)
    top = z.masked_fill(out, torch.finfo(z.dtype).min).amax(dim, keepdim=True).detach()
    x = (alpha - 1) * (z - top)  # at most 0
    power = 1 / (torch.as_tensor(alpha, dtype=z.dtype, device=z.device) - 1)
    tau = _threshold(x.detach(), power.detach(), out, dim)
    for _ in range(DERIVATIVES):
        supported = (x > tau) & ~out
        above = torch.where(supported, x - tau, 1)
        total = torch.where(supported, above**power, 0).sum(dim, keepdim=True)
        slope = power * torch.where(supported, above ** (power - 1), 0).sum(dim, keepdim=True)
        tau = tau + torch.where(slope > 0, (total - 1) / slope.masked_fill(slope == 0, 1), 0)
    supported = (x > tau) & ~out
    p = torch.where(supported, torch.where(supported, x - tau, 1) ** power, 0)
    return p.masked_fill(wrong | power.isnan(), torch.nan)


def normalized(
    scores: Tensor, normalizer: str | Callable[[Tensor], Tensor], alpha: Tensor | float
) -> Tensor:
    """Softmax over the last dimension, or what the normalizer names or does."""
    if callable(normalizer):
        return normalizer(scores)
    alpha = ALPHAS.get(normalizer, alpha)
    softmax = not isinstance(alpha, Tensor) and alpha == 1
    return torch.softmax(scores, -1) if softmax else entmax(scores, alpha)


def _threshold(x: Tensor, power: Tensor, out: Tensor, dim: int) -> Tensor:
    """tau by bisection: x is at most 0 and reaches it, so that tau is in -1..0."""
    tau, width = torch.full_like(x.sum(dim, keepdim=True), -1), 1.0
    for _ in range(BISECTIONS.get(x.dtype, 26)):
        width /= 2
        middle = tau + width
        above = (x - middle).clamp(min=0).masked_fill(out, 0)
        tau = torch.where((above**power).sum(dim, keepdim=True) >= 1, middle, tau)
    return tau


def dropped(shape: Sequence[int], dropout: float, seed: Tensor) -> Tensor:
    """Which weights of this shape dropout drops: bool. It depends on the seed [1], the row (all
    dimensions but the last) and the column alone."""
    low, step = 2**32 - 1, 0x9E3779B9

    def mixed(x: Tensor) -> Tensor:  # integers of 32 bits, whose products wrap around
        x = (x ^ (x >> 16)) * 0x85EBCA6B & low
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & low
        return x ^ (x >> 16)

    row = torch.arange(math.prod(shape[:-1]), device=seed.device)
    key = torch.zeros_like(row)
    for part in (seed, seed >> 32, row, row >> 32):
        key = mixed(key + (part & low) + step & low)
    column = torch.arange(shape[-1], device=seed.device) * step & low
    return ((mixed(key[:, None] ^ column) >> 8) < int(dropout * 2**24 + 0.5)).reshape(*shape)


def by_query(bound: Tensor) -> Tensor:
    """[B] or [B, Tq] -> [B, 1 or Tq, 1]."""
    return bound.reshape(bound.size(0), *(bound.shape[1:] or (1,)), 1)


class Weighing(NamedTuple):
    """How attention to some of the keys makes weights of scores. signed: weights as they were
    before dropout, with a minus sign where they are dropped, as the op has them."""

    normalizer: str | Callable[[Tensor], Tensor] = "softmax"
    alpha: Tensor | float = 1.5
    scale: float | None = None  # 1 / sqrt(D) where None
    dropout: float = 0.0
    seed: Tensor | None = None  # [1]
    signed: bool = False


def weights_of_seen(products: Tensor, width: int, seen: Tensor, how: Weighing) -> Tensor:
    """Weights of the keys that a query sees, zero elsewhere; all are where it sees none."""
    scores = (width**-0.5 if how.scale is None else how.scale) * products
    if scores.size(-1) == 0:
        return scores
    some = seen.any(-1, keepdim=True)
    scores = torch.where(seen, scores, torch.where(some, -math.inf, 0.0).to(scores.dtype))
    return torch.where(seen, normalized(scores, how.normalizer, how.alpha), 0)


def thinned(signed: Tensor, dropout: float) -> Tensor:
    """Zero where the sign is minus, as dropped weights have it; the others larger by as much."""
    return signed.clamp(min=0) * (1 / (1 - dropout) if dropout < 1 else 0)


def after_dropout(
    weights: Tensor,
    how: Weighing,
    shape: Sequence[int] | None = None,
    placed: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights to return and those that meet the values.

    shape: in which it is drawn which ones are dropped, the weights' own if None; placed: brings
    that into the weights' shape.
    """
    if not how.dropout or how.seed is None:
        return weights, weights
    drop = dropped(weights.shape if shape is None else shape, how.dropout, how.seed)
    if placed is not None:
        drop = placed(drop)
    signed = torch.where(drop, -weights, weights)
    met = thinned(signed, how.dropout)
    return signed if how.signed else met, met


def controller_layers(controller: Sequence[Tensor], width: int, kind: str) -> Layers:
    """Per layer one weight and one bias; the first weight without its columns for x_t."""
    if kind == "feedforward":
        joined = list(zip(controller[::2], controller[1::2], strict=True))
    else:
        four = zip(*(controller[k::4] for k in range(4)), strict=True)
        joined = [(torch.cat((ih, hh), 1), b_ih + b_hh) for ih, hh, b_ih, b_hh in four]
    (weight, bias), *rest = joined
    return [(weight[:, width:].t(), bias), *((w.t(), b) for w, b in rest)]


def controller_step(
    projected: Tensor, hidden: Tensor, cell: Tensor, reads: Tensor, layers: Layers, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """From W x_t + b of the first layer to hidden and cell of all, and the top layer's output.

    hidden, cell [L, B, C] and reads [B, R, M] are those of the step before; layers are those of
    :func:`controller_layers`.
    """
    below = reads.flatten(1)
    if kind == "feedforward":
        for k, (weight, bias) in enumerate(layers):
            below = torch.tanh(torch.addmm(bias if k else projected, below, weight))
        return hidden, cell, below
    hiddens, cells = [], []
    pairs = zip(layers, hidden.unbind(), cell.unbind(), strict=True)
    for k, ((weight, bias), h, before) in enumerate(pairs):
        z = torch.addmm(bias if k else projected, torch.cat((below, h), -1), weight)
        i, f, g, o = z.chunk(4, -1)
        c = torch.sigmoid(f) * before + torch.sigmoid(i) * torch.tanh(g)
        below = torch.sigmoid(o) * torch.tanh(c)
        hiddens.append(below)
        cells.append(c)
    return torch.stack(hiddens), torch.stack(cells), below


def without_padding(input: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """input [T, B, I], zero beyond lengths, and whether step t exists in row b [T, B]."""
    if lengths is None:
        return input, None
    steps = torch.arange(input.size(0), device=input.device)[:, None]
    valid = steps < lengths.to(input.device)
    return where_row(valid, input, 0), valid  # padding may hold anything, even NaN


def where_row(mask: Tensor, a: Tensor, b: Tensor | float) -> Tensor:
    """``a`` where the mask is true, else ``b``; the mask's dimensions are a's first."""
    return torch.where(mask.reshape(*mask.shape, *[1] * (a.dim() - mask.dim())), a, b)


def projected_inputs(
    input: Tensor, controller: Sequence[Tensor], layers: Layers
) -> tuple[Tensor, ...]:
    """W x_t + b of the first layer, T of [B, ..]."""
    return F.linear(input, controller[0][:, : input.size(-1)], layers[0][-1]).unbind()


def choose(where: Tensor, a: State, b: State) -> State:
    """Row by row: ``a`` where the mask [B] is true, else ``b``."""
    controller = (torch.where(where[:, None], x, y) for x, y in zip(a[:2], b[:2], strict=True))
    rest = (where_row(where, x, y) for x, y in zip(a[2:], b[2:], strict=True))
    chosen: State = type(a)(*controller, *rest)
    return chosen


def started(reset: Tensor | None, initial: State | None, t: int, state: State) -> State:
    """The state that enters step t: in rows where ``reset`` [T, B] is true, the initial one."""
    if reset is None or initial is None:
        return state
    hidden, cell, *rest = initial
    expanded: State = type(
        state
    )(  # type: ignore[call-arg]
        hidden.unsqueeze(1).expand_as(state[0]),
        cell.unsqueeze(1).expand_as(state[1]),
        *(a.expand_as(b) for a, b in zip(rest, state[2:], strict=True)),
    )
    return choose(reset[t], expanded, state)


class Draw:
    """Random tensors for a sample: the same seed gives the same, whatever device and dtype."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype, self.first = device, dtype, seed
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal, of this deviation."""
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return value.to(device=self.device, dtype=self.dtype)

    def heads(self, sizes: Sequence[int], group: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, `group` heads of queries for each of keys; sizes = (B, Hk, Tq, Tk, D, Dv)."""
        batch, heads, queries, keys, width, values = sizes
        query = self(batch, group * heads, queries, width)
        return query, self(batch, heads, keys, width), self(batch, heads, keys, values)

    def controller(self, kind: str, layers: int, below: int, control: int) -> tuple[Tensor, ...]:
        """Of that many layers, on `below` values."""
        gates, scale = (4, control**-0.5) if kind == "lstm" else (1, 1.0)
        drawn: list[Tensor] = []
        for _ in range(layers):
            shapes = [(below,), ()] if kind == "feedforward" else [(below,), (control,), (), ()]
            drawn += [self(gates * control, *rest, scale=scale) for rest in shapes]
            below = control
        return tuple(drawn)

    def mask(self, *shape: int, share: float = 0.7) -> Tensor:
        """bool, that share of it true."""
        return (torch.rand(shape, generator=self.generator) < share).to(self.device)

    def seed(self, count: int = 1) -> Tensor:
        """Of dropout, [count]."""
        return self.whole(-(2**63), 2**63 - 1, count).to(self.device)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 on the CPU, low <= value < high."""
        return torch.randint(low, high, shape, generator=self.generator)


class Sample(NamedTuple):
    """The arguments of one call, under a name that says which option it reaches."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    function: str = ""  # the function's name in `ops/<op>.py`, where it is not the op's own


def samples(
    *usual: int,
) -> Callable[[Callable[..., Iterator[Sample]]], Callable[..., Iterator[Sample]]]:
    """Makes of ``drawn(draw, sizes, **options)`` a function of device, dtype, sizes (usual ones by
    default) and a number that decides what is drawn."""

    def decorate(drawn: Callable[..., Iterator[Sample]]) -> Callable[..., Iterator[Sample]]:
        def sample_inputs(
            device: torch.device | str = "cpu",
            dtype: torch.dtype = torch.float32,
            *,
            sizes: Sequence[int] = usual,
            seed: int = 0,
            **options: Any,
        ) -> Iterator[Sample]:
            return drawn(Draw(device, dtype, seed), sizes, **options)

        sample_inputs.__doc__ = drawn.__doc__
        return sample_inputs

    return decorate
