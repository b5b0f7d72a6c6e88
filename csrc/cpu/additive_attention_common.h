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

// ---- tanh of a sum by factors
// --------------------------------------------------------------------------
// With E = e^2q e^2k, tanh(q + k) = (E - 1) / (E + 1): the exponentials are taken once for each
// query and key, and what is left for each pair is a product and a division. Each factor is held as
// a sum of two floats, so that E - 1 loses nothing near zero. Wants a fused multiply-add.

inline constexpr bool kHasFusedMultiplyAdd = SEQMEM_VEC_BYTES >= 32;
// The exponentials of larger projections, or products of their small parts, might leave the range.
inline constexpr float kLargestFactor = 15;
// Below these the exponentials cost more than they save.
inline constexpr int64_t kQueriesWorthFactors = 8, kKeysWorthFactors = 16;

template <class C>
SEQMEM_INLINE bool worth_factors(const Shape& s) {
  return kHasFusedMultiplyAdd && std::is_same_v<C, float> && s.Tq >= kQueriesWorthFactors &&
         s.Tk >= kKeysWorthFactors;
}

struct Factor {
  Vec<float> high, low;
};

SEQMEM_INLINE Factor factor(Vec<float> x) {
  const Vec<float> argument[1] = {x + x};
  ExpParts<float> e[1];
  exp_parts<1, float>(argument, e);
  const Vec<float> high = e[0].power + e[0].power * e[0].fraction;
  return {high, (e[0].power - high) + e[0].power * e[0].fraction};
}

// E - 1 from its factors; E + 1 is two more.
SEQMEM_INLINE Vec<float> product_less_one(Factor q, Factor k) {
  return q.low * k.high + (q.high * k.low + (q.high * k.high - 1.0f));
}

// Lanes become all ones where x is too large, or NaN.
SEQMEM_INLINE IntVec<float> too_large(Vec<float> x) {
  return ~((x >= -kLargestFactor) & (x <= kLargestFactor));
}

SEQMEM_INLINE bool none(IntVec<float> lanes) {
  int32_t any = 0;
  for (int l = 0; l < kLanes<float>; ++l) any |= lanes[l];
  return any == 0;
}

// A panel holds the factors of a vector of keys, [A][high, low][lanes]; beyond the last of `rows`
// keys, up to `padded_rows`, they are those of zero. False if a key is too large.
template <class S>
bool pack_keys(const S* keys, int64_t rows, int64_t padded_rows, int64_t width, float* panels) {
  constexpr int L = kLanes<float>;
  IntVec<float> bad{};
  for (int64_t j = 0; j < padded_rows; j += L) {
    float* panel = panels + j * width * 2;
    const int64_t lanes = min<int64_t>(L, rows - j);
    for (int64_t i = 0; i < width; i += L) {
      const int n = static_cast<int>(min<int64_t>(L, width - i));
      Vec<float> square[L] = {};
      for (int64_t l = 0; l < lanes; ++l) square[l] = load_n(keys + (j + l) * width + i, n);
      transpose<float>(square);
      for (int l = 0; l < n; ++l) {
        bad |= too_large(square[l]);
        const Factor f = factor(square[l]);
        store(panel + (i + l) * 2 * L, f.high);
        store(panel + (i + l) * 2 * L + L, f.low);
      }
    }
  }
  return none(bad);
}

// The factors of rows of queries, `stride` apart. False if one is too large.
SEQMEM_INLINE bool split_queries(const Matrix<float>& query, int64_t rows, int64_t stride,
                                 float* high, float* low) {
  IntVec<float> bad{};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < stride; i += kLanes<float>) {
      const Vec<float> x = load(query.row(r) + i);
      bad |= too_large(x);
      const Factor f = factor(x);
      store(high + r * stride + i, f.high);
      store(low + r * stride + i, f.low);
    }
  }
  return none(bad);
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
