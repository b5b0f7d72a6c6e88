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

from ..ops.common import by_fields, reference_vjp

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def launcher(compute: Launcher) -> Launcher:
    """`compute` on its tensors' device, after the check that its op has everywhere.

    The check is `seqmem::check_<name>`, with `compute`'s name; arguments come as to `by_fields`.
    """
    check = getattr(torch.ops.seqmem, f"check_{compute.__name__}").default
    flat = by_fields(compute)

    @wraps(flat)
    def checked(*arguments: Any) -> Any:
        check(*arguments)
        with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
            return flat(*arguments)

    return checked  # type: ignore[return-value]


# Triton's own serve kernels as well and take 3 us a call.
def cdiv(n: int, block: int) -> int:
    """How many blocks hold n."""
    return -(-n // block)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


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


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """[Z, M, K] by [Z, K, N], summed in the wide dtype and left in it."""
    dtype = wide(a.dtype)
    if a.dtype != dtype and a.is_cuda and torch.version.hip is None:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))


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


def of_dropout(dropout: float, seed: Tensor | None) -> dict[str, Any]:
    """What a forward kernel takes, beside the factor, to draw which weights are dropped."""
    below = int(dropout * 2**24 + 0.5)
    return {"seed_ptr": seed if below else None, "BELOW": below}


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
def load_gates(ptr, at, width, mask, ACC: tl.constexpr):
    """i, f, g and o, `width` apart."""
    i = tl.load(ptr + at, mask=mask, other=0.0).to(ACC)
    f = tl.load(ptr + at + width, mask=mask, other=0.0).to(ACC)
    g = tl.load(ptr + at + 2 * width, mask=mask, other=0.0).to(ACC)
    return i, f, g, tl.load(ptr + at + 3 * width, mask=mask, other=0.0).to(ACC)


@triton.jit
def store_gates(ptr, i, f, g, o, at, width, mask):
    out_type = ptr.dtype.element_ty
    tl.store(ptr + at, i.to(out_type), mask=mask)
    tl.store(ptr + at + width, f.to(out_type), mask=mask)
    tl.store(ptr + at + 2 * width, g.to(out_type), mask=mask)
    tl.store(ptr + at + 3 * width, o.to(out_type), mask=mask)


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


# ---- storage of 16 bits, of which the interpreter knows no direct way to float64 -----------------


@triton.jit
def load_wide(ptr, n, mask, other: tl.constexpr, ACC: tl.constexpr):
    value = tl.load(ptr + n, mask=mask, other=other)
    if value.dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(ACC)


@triton.jit
def store_narrow(ptr, n, value, mask):
    if ptr.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    tl.store(ptr + n, value.to(ptr.dtype.element_ty), mask=mask)


# ---- where a program stands in [Z0, Z1, rows, columns] -------------------------------------------


@triton.jit
def place(blocks, BLOCK: tl.constexpr):
    """A program's place z in the leading dimensions, and the rows that it owns."""
    z = (tl.program_id(0) // blocks).to(tl.int64)
    return z, (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def moved(ptr, z, heads, stride_0, stride_1):
    """Where the matrix at place z begins; None stays None."""
    begin = ptr  # Triton 3.6 returns no argument that is None
    if ptr is not None:
        begin = ptr + (z // heads * stride_0 + z % heads * stride_1)
    return begin


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


# ---- dropout -------------------------------------------------------------------------------------


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
