// What additive attention's forward and backward share: tanh, matrices padded to whole vectors.
#pragma once

#include "../common/gemm.h"
#include "../common/kernel_util.h"
#include "additive_attention_kernel.h"

namespace seqmem::additive_attention {
namespace {

// tanh x = x P(x^2) / Q(x^2) on |x| <= 9, beyond which a float's tanh is 1. Both polynomials were
// fitted for the least largest relative error, 2e-8; all their coefficients are positive, so
// nothing cancels and rounding leaves it below 4e-7, near zero too. A third of the instructions of
// tanh by way of exp. NaN passes through.
SEQMEM_INLINE Vec<float> squash(Vec<float> x) {
  x = clamp<float>(x, 9.0f);
  const Vec<float> y = x * x;
  const Vec<float> p =
      (((0x1.cae49cp-27f * y + 0x1.59c668p-16f) * y + 0x1.ca2e0ep-9f) * y + 0x1.120b54p-3f) * y +
      1.0f;
  const Vec<float> q =
      (((0x1.a1857ap-21f * y + 0x1.588816p-12f) * y + 0x1.a7f8b2p-6f) * y + 0x1.de5af4p-2f) * y +
      1.0f;
  return x * p / q;
}
SEQMEM_INLINE Vec<double> squash(Vec<double> x) { return tanh<double>(x); }

// Rows in the compute type, whole vectors each, zero beyond the width.
template <class C>
struct Matrix {
  const C* data = nullptr;
  int64_t stride = 0;
  const C* row(int64_t i) const { return data + i * stride; }
};

template <class C>
SEQMEM_INLINE int64_t padded(int64_t width) {
  return ceil_div(width, kLanes<C>) * kLanes<C>;
}

// Copies of `rows` rows, `stride` apart.
template <class S, class C>
Matrix<C> copy_rows(const S* from, int64_t rows, int64_t width, C* to, int64_t stride) {
  constexpr int L = kLanes<C>;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width; i += L)
      store(to + r * stride + i, load_n(from + r * width + i, static_cast<int>(width - i)));
  return {to, stride};
}

// The same, or the rows as they lie where these are whole vectors already.
template <class S, class C>
Matrix<C> as_rows(const S* from, int64_t rows, int64_t width, C* scratch) {
  if constexpr (std::is_same_v<S, C>)
    if (width % kLanes<C> == 0) return {from, width};
  return copy_rows(from, rows, width, scratch, padded<C>(width));
}

// The mask's row for query i of batch row b; null without a mask.
template <class M>
SEQMEM_INLINE const M* mask_row(const Shape& s, const M* mask, int64_t b, int64_t i) {
  if (mask == nullptr) return nullptr;
  return mask + (s.mask_of[b] * s.mask_rows + (s.mask_rows == 1 ? 0 : i)) * s.Tk;
}

template <class C>
SEQMEM_INLINE void fill(C* to, int64_t n, C x) {
  for (int64_t i = 0; i < n; ++i) to[i] = x;
}

}  // namespace
}  // namespace seqmem::additive_attention
