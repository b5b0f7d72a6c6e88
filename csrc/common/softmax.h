// Softmax of one row in place, for kernel sources compiled once per ISA.
//
//   pass 1  top = max x          four vectors at once: a lone chain waits for its own latency
//   pass 2  x = e^(x - top)      and its sum, in `Sums` partial sums: they decide the bits
//   pass 3  x *= 1 / sum
#pragma once

#include "kernel_util.h"

namespace seqmem {
namespace {

// What is below the smallest number that exp_of_negative gives becomes zero.
template <int Sums, class C>
__attribute__((noinline)) void softmax(C* x, int64_t n) {
  static_assert(Sums == 1 || Sums == 4);
  constexpr int64_t L = kLanes<C>, Q = 4;
  constexpr C infinity = C(__builtin_huge_val());
  const Vec<C> lowest = splat<C>(-infinity);
  Vec<C> highest[Q] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + Q * L <= n; i += Q * L) {
    SEQMEM_UNROLL
    for (int q = 0; q < Q; ++q) {
      const Vec<C> v = load(x + i + q * L);
      highest[q] = v > highest[q] ? v : highest[q];
    }
  }
  for (int q = 1; q < Q; ++q) highest[0] = highest[q] > highest[0] ? highest[q] : highest[0];
  C top = largest_lane<C>(highest[0]);
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;

  Vec<C> sums[Sums] = {};
  for (i = 0; i + Q * L <= n; i += Q * L) {
    Vec<C> v[Q];
    SEQMEM_UNROLL
    for (int q = 0; q < Q; ++q) v[q] = load(x + i + q * L) - top;
    exp_of_negative<Q, C>(v);
    SEQMEM_UNROLL
    for (int q = 0; q < Q; ++q) {
      sums[q % Sums] += v[q];
      store(x + i + q * L, v[q]);
    }
  }
  for (; i < n; i += L) {
    const int lanes = static_cast<int>(min(L, n - i));
    Vec<C> v[1] = {load_n(x + i, lanes) - top};
    for (int64_t l = lanes; l < L; ++l) v[0][l] = -infinity;
    exp_of_negative<1, C>(v);
    sums[0] += v[0];
    store_n(x + i, v[0], lanes);
  }
  if constexpr (Sums == 4) sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  const C scale = C(1) / lane_sum<C>(sums[0]);
  for (i = 0; i < n; i += L) {
    const int lanes = static_cast<int>(min(L, n - i));
    store_n(x + i, load_n(x + i, lanes) * scale, lanes);
  }
}

}  // namespace
}  // namespace seqmem
