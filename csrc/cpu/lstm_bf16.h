// What the LSTM's kernels in bf16 share: the products of a step's rows, on tiles or on dot
// products, elementwise work among these products, and gate functions that are as good as bf16
// needs.
#pragma once

#include "../common/gemm.h"
#include "lstm_common.h"
#if defined(SEQMEM_DOT_PRODUCTS)
#include "lstm_bf16_dots.h"
#else
#include "lstm_bf16_tiles.h"
#endif

namespace seqmem::lstm {
namespace {

constexpr auto kNothing = [] {};

// The elementwise work on the rows of one group, done bit by bit among the products of the next:
// `slices` times slice(), or finish() at once.
template <class Row>
class Pending {
  const Row work;
  const int64_t slices;
  int64_t next = 0, end = 0, rows = 0, due = 0;

 public:
  Pending(int64_t slices, const Row& work) : work(work), slices(slices) {}
  void start(const RowGroup& g) {
    next = g.first, end = g.first + g.count;
    rows = g.count, due = 0;
  }
  SEQMEM_INLINE void slice() {
    for (due += rows; due >= slices && next < end; due -= slices) work(next++);
  }
  SEQMEM_INLINE void finish() {
    while (next < end) work(next++);
  }
};

// to[j * stride + i] = from[i][j], 16 x 16 elements of 32 bits.
SEQMEM_INLINE void transpose_tile(const float (&from)[kBlock][kBlock], float* to, int64_t stride) {
  constexpr int L = kLanes<float>;
  for (int i = 0; i < kBlock; i += L)
    for (int j = 0; j < kBlock; j += L)
      transpose_block<float>(
          L, L, [&](int l) { return load(from[i + l] + j); },
          [&](int l, Vec<float> v) { store(to + (j + l) * stride + i, v); });
}

// Pairs of bf16 from two rows of them, widened.
SEQMEM_INLINE UintVec pairs_of(Vec<float> even, Vec<float> odd) {
  return (UintVec)even >> 16 | (UintVec)odd;
}
// A line of pairs: 16 columns of two rows of bf16, of which n exist; a null row is zero.
SEQMEM_INLINE void store_pairs(void* to, const bf16* even, const bf16* odd, int64_t n) {
  for (int l = 0; l < kBlock; l += kLanes<float>) {
    const int lanes = static_cast<int>(n - l);
    const UintVec line = pairs_of(even == nullptr ? Vec<float>{} : load_n(even + l, lanes),
                                  odd == nullptr ? Vec<float>{} : load_n(odd + l, lanes));
    __builtin_memcpy(static_cast<uint32_t*>(to) + l, &line, sizeof line);
  }
}

// v, zero from lane n on: what stands in padding must be finite, for zero times NaN is NaN.
SEQMEM_INLINE Vec<float> first_lanes(Vec<float> v, int n) {
  if (n >= kLanes<float>) return v;
  IntVec<float> lane;
  for (int i = 0; i < kLanes<float>; ++i) lane[i] = i;
  return (Vec<float>)((IntVec<float>)v & (lane < n));
}

// Gate functions good to 6e-5 of their value; bf16 keeps 2e-3.

SEQMEM_INLINE Vec<float> rough_reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)x);
#else
  return 1.0f / x;
#endif
}

// 2^x = 2^n + 2^n (2^r - 1), n = round(x); the second factor by a polynomial, good to 1.5e-5.
SEQMEM_INLINE ExpParts<float> power_of_two(Vec<float> x) {
  constexpr float magic = ExpConstants<float>::magic;
  const Vec<float> shifted = x + magic, r = x - (shifted - magic);
  Vec<float> p = r * 0.00961811095f + 0.0558372885f;
  p = p * r + 0.240232527f;
  p = p * r + 0.693136871f;
  return {(Vec<float>)(((IntVec<float>)shifted + 127) << 23), p * r};
}
// Exactly 0 where 1 + 2^y would overflow.
SEQMEM_INLINE Vec<float> cheap_sigmoid(Vec<float> x) {
  const Vec<float> y = at_least<float>(x * -1.44269504f, -126);
  const ExpParts<float> e = power_of_two(y > 126 ? splat(128.25f) : y);
  return rough_reciprocal((e.power + 1.0f) + e.power * e.fraction);
}
SEQMEM_INLINE Vec<float> cheap_tanh(Vec<float> x) {
  const ExpParts<float> e = power_of_two(clamp<float>(x * 2.88539008f, 40));
  const Vec<float> m = e.power * e.fraction + (e.power - 1.0f);
  return m * rough_reciprocal(m + 2.0f);
}

}  // namespace
}  // namespace seqmem::lstm
