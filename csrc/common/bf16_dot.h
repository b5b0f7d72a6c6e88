// Products of bf16 by vectors of dot products (AVX512-BF16): each lane adds the products of two
// pairs to a float32 sum. Without that instruction the same by two multiplications, so that the
// kernels run on any processor.
#pragma once

#include "gemm.h"

namespace seqmem {
namespace {

// sum + a's odd member times b's, then + the even ones': each lane holds a pair, the even member in
// its low half.
SEQMEM_INLINE Vec<float> dot_pairs(Vec<float> sum, UintVec a, UintVec b) {
#if defined(__AVX512BF16__)
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += (Vec<float>)(a & 0xffff0000u) * (Vec<float>)(b & 0xffff0000u);
  return sum + (Vec<float>)(a << 16) * (Vec<float>)(b << 16);
#endif
}

// acc[r][v] += sum over `pairs` pairs of a[r * a_stride ..] times lanes of b + v * b_vec +
// k * b_step, k = 0.. in this order; strides count elements of bf16.
template <int R, int NV>
SEQMEM_INLINE void multiply_pairs(int pairs, const bf16* a, int64_t a_stride, const bf16* b,
                                  int64_t b_vec, int64_t b_step, Vec<float> (&acc)[R][NV]) {
#pragma GCC unroll 2
  for (int k = 0; k < pairs; ++k) {
    UintVec x[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      uint32_t pair;
      __builtin_memcpy(&pair, a + r * a_stride + 2 * k, sizeof pair);
      x[r] = UintVec{} + pair;
    }
    SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) {
      UintVec w;
      __builtin_memcpy(&w, b + v * b_vec + k * b_step, sizeof w);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) acc[r][v] = dot_pairs(acc[r][v], x[r], w);
    }
  }
}

}  // namespace
}  // namespace seqmem
