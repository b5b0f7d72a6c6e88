// From a row of scores to weights that still have to be divided by their sum, for kernel sources
// compiled once per ISA.
#pragma once

#include "vec_math.h"

namespace seqmem {
namespace {

template <class C>
constexpr C kInfinity = C(__builtin_huge_val());

// scores -> e^(score - highest). What is too small for a normal number becomes zero: denormals
// would cost several times the arithmetic. As exp_parts, but with ln 2 in one piece, whose error is
// small beside a weight's, and in fewer registers.
template <class C, int V>
SEQMEM_INLINE void to_exponentials(Vec<C> (&p)[V], C highest) {
  using K = ExpConstants<C>;
  // Adding it rounds to an integer and leaves that, with the exponent's bias, in the low bits.
  constexpr C magic = K::magic + K::bias, ln2 = C(0x1.62e42fefa39efp-1), lowest = -K::bias * ln2;
  Vec<C> shifted[V], r[V];
  SEQMEM_UNROLL
  for (int v = 0; v < V; ++v) {
    Vec<C> x = p[v] - highest;
    x = x < lowest ? splat(lowest) : x;  // whose power is zero; NaN passes
    shifted[v] = x * K::log2e + magic;
    r[v] = x - (shifted[v] - magic) * ln2;
    p[v] = splat(inverse_factorial<C>(K::degree));
  }
  SEQMEM_UNROLL
  for (int k = K::degree - 1; k >= 0; --k) {
    SEQMEM_UNROLL
    for (int v = 0; v < V; ++v) p[v] = p[v] * r[v] + inverse_factorial<C>(k);
  }
  SEQMEM_UNROLL
  for (int v = 0; v < V; ++v) p[v] *= (Vec<C>)((IntVec<C>)shifted[v] << K::mantissa);
}

// The same of a row's n scores, in place; returns their sum.
template <class C>
C exponentials(C* row, int64_t n, C highest) {
  constexpr int L = kLanes<C>;
  constexpr int W = 4;
  Vec<C> total[W] = {};
  int64_t i = 0;
  auto next = [&](auto count) {
    constexpr int V = decltype(count)::value;
    Vec<C> p[V];
    SEQMEM_UNROLL
    for (int v = 0; v < V; ++v) p[v] = load(row + i + v * L);
    to_exponentials<C>(p, highest);
    SEQMEM_UNROLL
    for (int v = 0; v < V; ++v) {
      total[v] += p[v];
      store(row + i + v * L, p[v]);
    }
    i += V * L;
  };
  while (i + W * L <= n) next(std::integral_constant<int, W>{});
  while (i < n) next(std::integral_constant<int, 1>{});
  return lane_sum<C>((total[0] + total[1]) + (total[2] + total[3]));
}

}  // namespace
}  // namespace seqmem
