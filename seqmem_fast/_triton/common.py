"""What the Triton kernels share: gate maths, masked softmax, and how products are multiplied.

All kernels here compute in the dtype it is given; callers widen 16-bit storage first. Written
with `tl.exp` alone (no libdevice), so that one source runs on NVIDIA, on AMD and in Triton's
interpreter.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.common import reference_vjp

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def launcher(compute: Launcher) -> Launcher:
    """`compute` on its tensors' device, after the check that its op has everywhere.

    The check is `seqmem::check_<name>`, with `compute`'s name and arguments.
    """
    check = getattr(torch.ops.seqmem, f"check_{compute.__name__}").default

    @wraps(compute)
    def checked(*arguments: Any) -> Any:
        check(*arguments)
        with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
            return compute(*arguments)

    return checked  # type: ignore[return-value]


def tf32_allowed() -> bool:
    """Whether torch may round float32 products to TF32.

    Reads the result of torch's two settings; the older flag raises if both were used.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def has_matrix_cores(device: torch.device) -> bool:
    """Whether the device has them for 16 bits and TF32; the interpreter counts as one that has."""
    if device.type != "cuda":
        return True
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def product_precision(dtype: torch.dtype, device: torch.device) -> str:
    """tl.dot's input_precision: what float32 is rounded to on its way into tensor cores."""
    if dtype != torch.float32 or torch.version.hip is not None or not has_matrix_cores(device):
        return "ieee"
    return "tf32" if tf32_allowed() else "tf32x3"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over this storage."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulator(dtype: torch.dtype) -> Any:
    """The same for a kernel."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def refuse_in_capture(device: torch.device, expected: str) -> None:
    """Raises while a CUDA graph is captured: a replay would read host memory that is freed."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise TypeError(f"{expected} while a CUDA graph is captured")


def row_lengths(op: str, lengths: Tensor, device: torch.device, steps: int) -> Tensor:
    """`lengths` on the device, int64, clamped to 0..steps: the checks do not wait for a GPU's."""
    if lengths.is_cpu:
        refuse_in_capture(device, f"seqmem::{op}: expected lengths on the GPU")
    return lengths.to(device, torch.int64, non_blocking=True).clamp(0, steps)


def two_leading(t: Tensor, lead: Sequence[int]) -> Tensor:
    """t, whose leading dimensions broadcast to `lead`, as [Z0, Z1, rows, columns].

    Copies only what no strides can express: more than two leading dimensions, partly broadcast.
    """
    t = t.expand(*lead, *t.shape[-2:])
    return t.flatten(0, -4) if t.dim() > 4 else t[(None,) * (4 - t.dim())]


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def fits_heads(q: Tensor, v: Tensor, alpha: float) -> bool:
    """Whether a program holds the features of a head, and the normaliser is softmax."""
    most = 32 if q.dtype == torch.float64 else 128
    return alpha == 1 and max(q.shape[-1], v.shape[-1]) <= most


def of_dropout(dropout: float, seed: Tensor | None) -> dict[str, Any]:
    """What a forward kernel takes, beside the factor, to draw which weights are dropped."""
    below = int(dropout * 2**24 + 0.5)
    return {"seed_ptr": seed if below else None, "BELOW": below}


def dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def begins_of(numbers: Tensor, count: int) -> Tensor:
    """[lists, places] in order, `count` where there is none -> where each begins, of count + 1."""
    wanted = torch.arange(count + 1, device=numbers.device).expand(numbers.size(0), -1)
    return torch.searchsorted(numbers.contiguous(), wanted.contiguous())


def int_bound(prefix: str, t: Tensor | None) -> dict[str, Any]:
    """A bound of the keys that queries see, [B] or [B, Tq], as `key_bound` takes it."""
    if t is not None:
        t = t.to(torch.int64).contiguous()
    return {f"{prefix}_ptr": t, f"EACH_{prefix.upper()}": t is not None and t.dim() == 2}


def strides(prefix: str, t: Tensor | None, *ends: str) -> dict[str, int]:
    """A kernel's stride arguments `prefix_end`, of t's first dimensions; 0 where there is one."""
    if t is None:
        return {f"{prefix}_{end}": 0 for end in ends}
    found = zip(ends, t.shape, t.stride(), strict=False)
    return {f"{prefix}_{end}": 0 if size == 1 else stride for end, size, stride in found}


def as_bytes(mask: Tensor) -> Tensor:
    """A bool or integer mask as uint8 that is 0 where masked; a floating one as it is."""
    if mask.is_floating_point():
        return mask
    return (mask if mask.dtype == torch.bool else mask.ne(0)).view(torch.uint8)


@contextmanager
def autograd_below() -> Iterator[None]:
    """Lets autograd record inside a kernel, whose callers have switched it off.

    For backwards whose plain path differentiates the reference.
    """
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(keys, name))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def through_reference(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """A plain path's gradients by autograd; empty where not wanted."""
    with autograd_below():
        found = reference_vjp(function, inputs, grads, output_mask)
    return tuple(inputs[0].new_empty(0) if a is None else a.detach() for a in found)


def only(output_mask: Sequence[bool], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients that are wanted, empty in the place of the others."""
    pairs = zip(output_mask, grads, strict=True)
    return tuple(grad if wanted else grad.new_empty(0) for wanted, grad in pairs)


def of_heads(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float
) -> dict[str, Any]:
    """What every kernel of attention over heads takes: q [B, Hq, Tq, D], k and v [B, Hk, Tk, *]."""
    queries, width = q.shape[2:]
    keys, values = v.shape[2:]
    return {
        "SCALE": width**-0.5 if scale is None else float(scale),
        "queries": queries,
        "keys": keys,
        "width": width,
        "value_width": values,
        "heads": q.shape[1],
        "group": q.shape[1] // k.shape[1],
        "ACC": accumulator(q.dtype),
        "FACTOR": 1 / (1 - dropout) if dropout < 1 else 0.0,  # of weights that are not dropped
        "BD": max(16, triton.next_power_of_2(width)),
        "BV": max(16, triton.next_power_of_2(values)),
        "num_warps": 4 if q.element_size() == 2 else 8,
        "num_stages": 1,
    }


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exact 0 and 1 at the ends, NaN stays NaN."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """tanh by an odd minimax polynomial below 0.625 and by exp above.

    1 - 2/(exp(2x)+1) alone cancels near zero (error 5e-5 at x = 1e-3 in fp32); the polynomial's
    own relative error is 1.5e-8 in fp32 (5 terms) and 1.4e-18 in fp64 (12 terms).
    """
    a = tl.abs(x)
    s = x * x
    if x.dtype == tl.float64:
        p = 6.48516348279311315e-6 * s - 3.12011014257974e-5
        p = p * s + 9.25711612955676827e-5
        p = p * s - 2.37590649605556196e-4
        p = p * s + 5.89660657775704335e-4
        p = p * s - 1.45577541204780551e-3
        p = p * s + 3.59212175115496227e-3
        p = p * s - 8.86323510324087792e-3
        p = p * s + 2.18694885190083058e-2
        p = p * s - 5.39682539678969917e-2
        p = p * s + 1.33333333333330416e-1
        p = p * s - 3.33333333333333329e-1
    else:
        p = -6.09671416590819757e-3 * s + 2.09971789990747506e-2
        p = p * s - 5.38509095785135808e-2
        p = p * s + 1.33327697369763279e-1
        p = p * s - 3.33333289441342546e-1
    near = x + x * s * p
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def lstm_point(z_i, z_f, z_g, z_o, c_prev):
    """Pre-activations and c_{t-1} to (i, f, g, o, c, h): c = f c_{t-1} + i g, h = o tanh(c)."""
    i = sigmoid(z_i)
    f = sigmoid(z_f)
    g = tanh(z_g)
    o = sigmoid(z_o)
    c = f * c_prev + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def lstm_point_backward(i, f, g, o, c, c_prev, d_h, d_c, d_i, d_f, d_g, d_o):
    """Gradients of h, c and of the activated gates to those of the pre-activations and c_{t-1}.

    d_c' = d_c + d_h o (1 - tanh(c)^2); dz_i = (d_c' g + d_i) i (1-i);
    dz_f = (d_c' c_{t-1} + d_f) f (1-f); dz_g = (d_c' i + d_g) (1-g^2);
    dz_o = (d_h tanh(c) + d_o) o (1-o); dc_{t-1} = d_c' f.
    """
    tanh_c = tanh(c)
    d_c = d_c + d_h * o * (1.0 - tanh_c * tanh_c)
    dz_i = (d_c * g + d_i) * i * (1.0 - i)
    dz_f = (d_c * c_prev + d_f) * f * (1.0 - f)
    dz_g = (d_c * i + d_g) * (1.0 - g * g)
    dz_o = (d_h * tanh_c + d_o) * o * (1.0 - o)
    return dz_i, dz_f, dz_g, dz_o, d_c * f


# ---- scores of keys, their softmax over blocks of keys, and its gradient -------------------------
#
# Rows are queries [BM], columns keys [BN]. A bool or integer mask comes as uint8 (0 = masked, the
# score becomes -1e9, a row without any other key is uniform), a floating one is added. What is
# no key of its row at all (past the last key, or after the query where causal) scores -inf.


@triton.jit
def _offsets(rows, columns, stride_row, stride_column):
    """[BM, BN], of 64 bits: a size times a stride may pass 2^31."""
    return rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column


@triton.jit
def masked_scores(s, mask_ptr, rows, columns, stride_row, stride_column, there, known):
    """Scores with the mask applied; `there`: inside the matrix; `known`: a key of its row."""
    if mask_ptr is not None:
        at = _offsets(rows, columns, stride_row, stride_column)
        if mask_ptr.dtype.element_ty == tl.uint8:
            s = tl.where(tl.load(mask_ptr + at, mask=there, other=1) == 0, -1e9, s)
        else:
            s = s + tl.load(mask_ptr + at, mask=there, other=0.0).to(s.dtype)
    return tl.where(known, s, float("-inf"))


@triton.jit
def softmax_step(s, m, z):
    """One block of scores into the running maximum m and sum z of exp(s - m), both [BM].

    A maximum of -inf (all scores so far are) counts as 0, or -inf minus it would be NaN; a NaN
    score reaches z and with it the whole row.
    """
    m_new = tl.maximum(m, tl.max(s, axis=1))
    least = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, z * tl.exp(m - least) + tl.sum(tl.exp(s - least[:, None]), axis=1)


@triton.jit
def softmax_weights(s, m, z):
    """exp(s - m) / z with m and z from `softmax_step`."""
    least = tl.where(m == float("-inf"), 0.0, m)
    return tl.exp(s - least[:, None]) / z[:, None]


@triton.jit
def unmasked(ds, mask_ptr, rows, columns, stride_row, stride_column, there):
    """The gradient of scores before the mask: none where a bool mask replaced them."""
    if mask_ptr is not None:
        if mask_ptr.dtype.element_ty == tl.uint8:
            at = _offsets(rows, columns, stride_row, stride_column)
            ds = tl.where(tl.load(mask_ptr + at, mask=there, other=1) == 0, 0.0, ds)
    return ds


# ---- rows of heads, their products, and which keys a query sees ---------------------------------


@triton.jit
def load_rows(ptr, at, rows, known, stride, width, BLOCK: tl.constexpr):
    """[len(rows), BLOCK] of a matrix; zero in rows that are not known."""
    n = tl.arange(0, BLOCK)
    mask = known[:, None] & (n < width)[None, :]
    return tl.load(
        ptr + at + rows[:, None].to(tl.int64) * stride + n[None, :], mask=mask, other=0.0
    )


@triton.jit
def store_rows(ptr, at, value, rows, known, width, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    mask = known[:, None] & (n < width)[None, :]
    where = ptr + at + rows[:, None].to(tl.int64) * width + n[None, :]
    tl.store(where, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    if ACC == tl.float64:  # which matrix cores do not have everywhere
        found = tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        found = tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)
    return found


@triton.jit
def key_bound(ptr, b, i, queries, keys, other, EACH: tl.constexpr):
    """Of each query i, clamped to the keys."""
    at = other + i * 0
    if ptr is not None:
        if EACH:
            at = tl.load(ptr + b * queries + i, mask=i < queries, other=0)
        else:
            at = tl.load(ptr + b) + i * 0
    return tl.minimum(tl.maximum(at, 0), keys)


@triton.jit
def any_row(seen):
    return tl.max(seen.to(tl.int32), axis=0) > 0


@triton.jit
def is_nothing(w):
    """Where weights are zero; NaN is not. Beside zero itself, 16 bits would be compared in pairs,
    which is no faster, and which the emulated PTX does not know."""
    return w < 1.1e-38


@triton.jit
def mixed(x):
    """32 bits, each of which depends on all of those given."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def signed(w, seed_ptr, row, column, BELOW: tl.constexpr):
    """Weights, with a minus sign where dropout drops them; row and column broadcast to them."""
    if BELOW > 0:
        seed = tl.load(seed_ptr)
        key = mixed(seed.to(tl.uint32) + 0x9E3779B9)
        key = mixed(key + (seed >> 32).to(tl.uint32) + 0x9E3779B9)
        row = row.to(tl.int64)
        key = mixed(key + row.to(tl.uint32) + 0x9E3779B9)
        key = mixed(key + (row >> 32).to(tl.uint32) + 0x9E3779B9)
        number = mixed(key ^ (column.to(tl.uint32) * 0x9E3779B9)) >> 8
        w = tl.where(number.to(tl.int32) < BELOW, -w, w)
    return w


@triton.jit
def meet_values(w, x, FACTOR: tl.constexpr):
    """Weights x as they meet the values, or the gradient x of that as it comes back: zero where the
    signed weights w are dropped."""
    if FACTOR != 1.0:
        x = tl.where(w < 0, 0.0, x * FACTOR)
    return x


@triton.jit
def with_sign(w, x, FACTOR: tl.constexpr):
    """x with the sign of w."""
    if FACTOR != 1.0:
        x = tl.where(w < 0, -x, x)
    return x


@triton.jit
def scores_of(q, k_ptr, k_at, k_t, j, seen, width, SCALE: tl.constexpr, ACC: tl.constexpr,
            PRECISION: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    k = load_rows(k_ptr, k_at, j, any_row(seen), k_t, width, BD)
    return tl.where(seen, product(q, tl.trans(k), ACC, PRECISION) * SCALE, float("-inf"))


@triton.jit
def weights_gradient(g, v_ptr, v_at, v_t, weights_ptr, grad_ptr, at, there, j, value_width,
              ACC: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr, BM: tl.constexpr,
              BN: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """Weights W, zero where a query does not see a key, and their gradient P, [BM, BN] each."""
    sign = tl.load(weights_ptr + at, mask=there, other=0.0).to(ACC)
    w = with_sign(sign, sign, FACTOR)
    p = tl.zeros([BM, BN], ACC)
    if g is not None:
        v = load_rows(v_ptr, v_at, j, any_row(~is_nothing(w)), v_t, value_width, BV)
        p += meet_values(sign, product(g, tl.trans(v), ACC, PRECISION), FACTOR)
    if grad_ptr is not None:
        given = tl.load(grad_ptr + at, mask=there, other=0.0).to(ACC)
        p += with_sign(sign, given, FACTOR)
    return w, tl.where(is_nothing(w), 0.0, p)
