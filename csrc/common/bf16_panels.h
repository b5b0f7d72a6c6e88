// Products of rows of bf16 by weights packed into panels of 64 columns, on tiles or on vectors of
// dot products, and how rows and columns become such operands.
//
//   left     rows of bf16, whole blocks of 32 columns: what lies beyond the last one is zero, and
//            so is its partner on the right, for zero times NaN is NaN
//   right    [panel][block of 32 k]..[16 pairs of k][16 columns][2]
#pragma once

#if defined(SEQMEM_DOT_PRODUCTS)
#include "bf16_panels_on_dots.h"
#else
#include "bf16_panels_on_tiles.h"
#endif
#include "gemm.h"
#include "lanes.h"

namespace seqmem {
namespace {

constexpr auto kNothing = [] {};

// For products of so many rows, or more in several blocks.
SEQMEM_INLINE void configure(int64_t rows) {
  tiles_configure(static_cast<int>(min<int64_t>(rows, kBlock)));
  tiles_fence();
}

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

}  // namespace
}  // namespace seqmem
