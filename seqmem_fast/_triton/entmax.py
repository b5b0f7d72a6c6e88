r"""Entmax on GPU: launchers of `entmax` and its backward.

Formulas, shapes and errors: `ops/entmax.py`. A program a row: the threshold by Newton's method from
the left, on a row that stays in registers where it fits one block. alpha = 2 and 1.5 have products
for powers; any other is computed in float64, as on CPU. What alpha holds is not checked here, which
would wait for the GPU: one out of range gives NaN.

State of proof: as in lstm.py.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, launcher, load_wide, next_power_of_2, store_narrow, wide
from .normalizers import ANY, any_lane, kind_of, newton_step, powers, slopes_of

_BLOCK = 4096


@triton.jit
def _entries(ptr, n, count, ACC: tl.constexpr):
    return load_wide(ptr, n, n < count, float("-inf"), ACC)


@triton.jit
def _sums(
    ptr, row, top, scale, tau, power, count,
    KIND: tl.constexpr, ACC: tl.constexpr, ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the powers and of their slopes, over the entries above tau."""
    total = tau * 0.0
    slope = total
    for start in range(0, count, BLOCK):
        z = row
        if not ONE:
            z = _entries(ptr, start + tl.arange(0, BLOCK), count, ACC)
        x = (z - top) * scale
        p, s = powers(x - tau, x > tau, power, KIND)
        total += tl.sum(p, axis=0)
        slope += tl.sum(s, axis=0)
    return total, slope


@triton.jit
def entmax_forward_kernel(
    input_ptr,  # [rows, K]
    alpha_ptr,  # [rows] float64, or None for the other kinds
    output_ptr,  # [rows, K]
    count,  # K
    KIND: tl.constexpr, ACC: tl.constexpr,
    ONE: tl.constexpr,  # whether a block holds the row
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    input_ptr += row * count
    output_ptr += row * count
    if KIND == ANY:
        alpha = tl.load(alpha_ptr + row)
    else:
        alpha = 1.0 + 0.5 * KIND
    in_range = (alpha > 1.0) & (alpha <= 2.0)
    scale = alpha - 1.0
    power = 1.0 / scale
    lanes = tl.arange(0, BLOCK)
    first = _entries(input_ptr, lanes, count, ACC)
    top = tl.max(first, axis=0)
    wrong = tl.sum((first != first).to(tl.int32), axis=0)
    for start in range(BLOCK, count, BLOCK):
        z = _entries(input_ptr, start + lanes, count, ACC)
        top = tl.maximum(top, tl.max(z, axis=0))
        wrong += tl.sum((z != z).to(tl.int32), axis=0)
    good = (wrong == 0) & (top < float("inf")) & in_range
    empty = good & (top == float("-inf"))
    finite = good & (top > float("-inf"))
    shift = tl.where(finite, top, 0.0)

    tau = shift * 0.0 - 1.0
    total, slope = _sums(
        input_ptr, first, shift, scale, tau, power, count, KIND, ACC, ONE, BLOCK
    )  # fmt: skip
    next = tau + newton_step(total, slope, scale, finite, KIND)
    while any_lane(finite & (next > tau), BLOCK):
        tau = tl.maximum(tau, next)
        total, slope = _sums(
            input_ptr, first, shift, scale, tau, power, count, KIND, ACC, ONE, BLOCK
        )  # fmt: skip
        next = tau + newton_step(total, slope, scale, finite, KIND)
    # The last step may go back: it mends what rounding did while tau was far away.
    tau = tl.where(finite, next, tau)

    for start in range(0, count, BLOCK):
        n = start + lanes
        z = first
        if not ONE:
            z = _entries(input_ptr, n, count, ACC)
        x = (z - shift) * scale
        p, _ = powers(x - tau, x > tau, power, KIND)
        p = tl.where(finite, p, tl.where(empty, 0.0, float("nan")))
        store_narrow(output_ptr, n, p, n < count)


@triton.jit
def _parts(grad_ptr, output_ptr, n, count, alpha, KIND: tl.constexpr, ACC: tl.constexpr):
    """Of a block: p, s = p^(2 - alpha) and the gradient, both 0 outside the support."""
    p = load_wide(output_ptr, n, n < count, 0.0, ACC)
    g = load_wide(grad_ptr, n, n < count, 0.0, ACC)
    return p, slopes_of(p, alpha, KIND), tl.where(p <= 0.0, 0.0, g)  # NaN spreads over its row


@triton.jit
def _curvature(p, h, length, s, e):
    """r in s = p + e h + e^2 r, by its series where the difference would lose digits."""
    x = e * length
    series = tl.full(x.shape, 1.0, x.dtype)
    for k in tl.static_range(14, 2, -1):
        series = 1.0 + x * series / k
    return tl.where(x < 0.5, h * length * series * 0.5, (s - p - e * h) / (e * e))


@triton.jit
def entmax_backward_kernel(
    grad_ptr,  # [rows, K], of the output
    output_ptr,  # [rows, K]
    alpha_ptr,  # [rows] float64, or None for the other kinds
    grad_input_ptr,  # [rows, K], or None
    grad_alpha_ptr,  # [rows] float64, or None
    count,
    KIND: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * count
    output_ptr += row * count
    alpha = 1.0 + 0.5 * KIND
    if KIND == ANY:
        alpha = tl.load(alpha_ptr + row)
    total = tl.sum(tl.zeros([BLOCK], ACC), axis=0)
    dot = total
    e = alpha - 1.0
    for start in range(0, count, BLOCK):
        n = start + tl.arange(0, BLOCK)
        p, s, g = _parts(grad_ptr, output_ptr, n, count, alpha, KIND, ACC)
        total += tl.sum(s, axis=0)
        dot += tl.sum(s * g, axis=0)
    mean = tl.where(total == 0.0, 0.0, dot / tl.where(total == 0.0, 1.0, total))
    if grad_alpha_ptr is not None:
        # The formula: csrc/common/entmax_rows.h.
        of_p, of_h, of_r = total * 0.0, total * 0.0, total * 0.0
        all_h, all_r = total * 0.0, total * 0.0
        for start in range(0, count, BLOCK):
            n = start + tl.arange(0, BLOCK)
            p, s, g = _parts(grad_ptr, output_ptr, n, count, alpha, KIND, ACC)
            g -= tl.where(p <= 0.0, 0.0, mean)
            length = -tl.log(tl.where(p <= 0.0, 1.0, p))
            h = p * length
            r = _curvature(p, h, length, s, e)
            of_p += tl.sum(g * p, axis=0)
            of_h += tl.sum(g * h, axis=0)
            of_r += tl.sum(g * r, axis=0)
            all_h += tl.sum(h, axis=0)
            all_r += tl.sum(r, axis=0)
        found = of_p * all_r - of_r + e * (of_h * all_r - all_h * of_r)
        tl.store(grad_alpha_ptr + row, found / tl.where(total == 0.0, 1.0, total))
    if grad_input_ptr is not None:
        for start in range(0, count, BLOCK):
            n = start + tl.arange(0, BLOCK)
            _, s, g = _parts(grad_ptr, output_ptr, n, count, alpha, KIND, ACC)
            store_narrow(grad_input_ptr + row * count, n, s * (g - mean), n < count)


def _rows(t: Tensor, dim: int) -> Tensor:
    return t.movedim(dim, -1).contiguous()


def _options(
    input: Tensor, alpha: Tensor | None, power: float, dim: int
) -> tuple[int, dict[str, Any]]:
    """How many rows, and what both kernels take."""
    count = input.shape[dim]
    kind, by_row = kind_of(power), None
    if alpha is not None or kind == ANY:
        kind = ANY
        shape = list(input.shape)
        shape[dim] = 1
        wide_alpha = input.new_full((), power, dtype=torch.float64) if alpha is None else alpha
        by_row = _rows(wide_alpha.double().expand(shape), dim)
    most = max(16, _BLOCK // 8) if kind == ANY else _BLOCK  # float64 takes the registers
    block = min(most, max(16, next_power_of_2(count)))
    options = {
        "alpha_ptr": by_row,
        "count": count,
        "KIND": kind.value,
        "ACC": tl.float64 if kind == ANY else accumulator(input.dtype),
        "BLOCK": block,
        "num_warps": 4 if block > 256 else 1,
    }
    return (input.numel() // count if count else 0), options


@launcher
def entmax(input: Tensor, alpha: Tensor | None, power: float, dim: int) -> Tensor:
    """`seqmem::entmax` on GPU."""
    return _forward(input, alpha, power, dim)


def _forward(input: Tensor, alpha: Tensor | None, power: float, dim: int) -> Tensor:
    by_row = _rows(input, dim)
    output = torch.empty_like(by_row)
    rows, options = _options(input, alpha, power, dim)
    if rows:
        one = options["count"] <= options["BLOCK"]
        entmax_forward_kernel[(rows,)](input_ptr=by_row, output_ptr=output, ONE=one, **options)
    return output.movedim(-1, dim)


@launcher
def entmax_backward(
    grad_output: Tensor,
    input: Tensor,
    alpha: Tensor | None,
    power: float,
    dim: int,
    output: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """`seqmem::entmax_backward` on GPU."""
    none = input.new_empty(0)
    of_alpha_wanted = alpha is not None and output_mask[1]
    if of_alpha_wanted and input.dtype != wide(input.dtype):
        # Half of alpha's gradient would be lost in an output rounded to 16 bits.
        output = _forward(input.to(wide(input.dtype)), alpha, power, dim)
    of_rows = _rows(output, dim)
    rows, options = _options(input, alpha, power, dim)
    grad = torch.empty_like(of_rows) if output_mask[0] else None
    by_row = None
    if of_alpha_wanted:
        by_row = input.new_zeros(of_rows.shape[:-1], dtype=torch.float64)
    if rows:
        entmax_backward_kernel[(rows,)](
            grad_ptr=_rows(grad_output, dim),
            output_ptr=of_rows,
            grad_input_ptr=grad,
            grad_alpha_ptr=by_row,
            **options,
        )
    of_alpha = none
    if alpha is not None and by_row is not None:
        of_alpha = by_row.unsqueeze(-1).movedim(-1, dim).sum_to_size(alpha.shape)
        of_alpha = of_alpha.to(input.dtype)
    return none if grad is None else grad.movedim(-1, dim), of_alpha
