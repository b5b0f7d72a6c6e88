// From a row of scores to weights that still have to be divided by their sum:
//   pass 1  mask_row: scores masked, and their maximum
//   pass 2  exponentials: e^(score - maximum), and their sum
#pragma once

#include "attention_common.h"

namespace seqmem::attention {
namespace {

template <class C>
constexpr C kInfinity = C(__builtin_huge_val());

constexpr double kMaskedScore = -1e9;

// Masks a row of scores in place, minus infinity from `last` on; returns its maximum.
template <class C, MaskKind kind>
C mask_row(C* row, int64_t keys, int64_t last, const uint8_t* allowed, const C* added) {
  constexpr int L = kLanes<C>;
  Vec<C> highest[4];
  for (int v = 0; v < 4; ++v) highest[v] = splat(-kInfinity<C>);
  auto step = [&](int64_t j, int v, int n) {
    Vec<C> x = load(row + j);
    if constexpr (kind == MaskKind::Allowed) {
      x = allowed_lanes<C>(allowed + j, n, j > 0) ? x : splat(C(kMaskedScore));
    } else if constexpr (kind == MaskKind::Added) {
      x += load_n(added + j, n);
    }
    if (n < L) x = lane_numbers<C>() < n ? x : splat(-kInfinity<C>);
    if (kind != MaskKind::None || n < L) store(row + j, x);
    highest[v] = x > highest[v] ? x : highest[v];
  };
  int64_t j = 0;
  for (; j + 4 * L <= last; j += 4 * L) SEQMEM_UNROLL
  for (int v = 0; v < 4; ++v) step(j + v * L, v, L);
  for (; j < last; j += L) step(j, 0, static_cast<int>(min<int64_t>(L, last - j)));
  for (; j < keys; j += L) store(row + j, splat(-kInfinity<C>));
  for (int v = 1; v < 4; ++v) highest[0] = highest[v] > highest[0] ? highest[v] : highest[0];
  return largest<C>(highest[0]);
}

// scores -> e^(score - highest) in place; returns the row's sum. What is too small for a normal
// number becomes zero: denormals would cost several times the arithmetic. As exp_parts, but with
// ln 2 in one piece, whose error is small beside a weight's, and in fewer registers.
template <class C>
C exponentials(C* row, int64_t n, C highest) {
  constexpr int L = kLanes<C>;
  constexpr int W = 4;
  using K = ExpConstants<C>;
  // Adding it rounds to an integer and leaves that, with the exponent's bias, in the low bits.
  constexpr C magic = K::magic + K::bias, ln2 = C(0x1.62e42fefa39efp-1), lowest = -K::bias * ln2;
  Vec<C> total[W] = {};
  int64_t i = 0;
  auto next = [&](auto count) {
    constexpr int V = decltype(count)::value;
    Vec<C> shifted[V], r[V], p[V];
    SEQMEM_UNROLL
    for (int v = 0; v < V; ++v) {
      Vec<C> x = load(row + i + v * L) - highest;
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
    for (int v = 0; v < V; ++v) {
      p[v] *= (Vec<C>)((IntVec<C>)shifted[v] << K::mantissa);
      total[v] += p[v];
      store(row + i + v * L, p[v]);
    }
    i += V * L;
  };
  while (i + W * L <= n) next(std::integral_constant<int, W>{});
  while (i < n) next(std::integral_constant<int, 1>{});
  return sum<C>((total[0] + total[1]) + (total[2] + total[3]));
}

}  // namespace
}  // namespace seqmem::attention
