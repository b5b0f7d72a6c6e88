// Functions of vectors and of their lanes that the networks with a memory of slots share.
#pragma once

#include "kernel_util.h"
#include "log.h"

namespace seqmem::machine {
namespace {

// Calls f(constant K, first vector) for 0..n-1, K vectors at once and the last ones singly: the
// polynomial of a single vector waits for its own results, and those of many do not fit the
// registers beside what the passes over a memory hold (so two, where ntm_addressing::for_vectors
// takes four).
template <class F>
SEQMEM_INLINE void for_vectors(int64_t n, F&& f) {
  int64_t v = 0;
  constexpr int K = SEQMEM_VEC_BYTES == 64 ? 4 : 2;
  for (; v + K <= n; v += K) f(std::integral_constant<int, K>{}, v);
  for (; v < n; ++v) f(std::integral_constant<int, 1>{}, v);
}

SEQMEM_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
SEQMEM_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// A vector's lanes stay in a register only if the loop over them vanishes.
template <class C>
SEQMEM_INLINE Vec<C> square_root(Vec<C> x) {
  Vec<C> y{};
  SEQMEM_UNROLL
  for (int i = 0; i < kLanes<C>; ++i) y[i] = square_root(x[i]);
  return y;
}

}  // namespace
}  // namespace seqmem::machine
