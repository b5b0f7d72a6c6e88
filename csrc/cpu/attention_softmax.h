// A row of scores on its way to weights: mask, maximum, powers of two.
#pragma once

#include "attention_common.h"

namespace seqmem::attention {
namespace {

template <class C>
constexpr C kInfinity = std::is_same_v<C, float> ? C(__builtin_inff()) : C(__builtin_inf());

constexpr double kMaskedScore = -1e9;

// Masks a row of scores in place, minus infinity from `last` on; returns its maximum.
template <class C, MaskKind kind>
C mask_row(C* row, int64_t keys, int64_t last, const uint8_t* allowed, const C* added) {
  constexpr int L = kLanes<C>;
  Vec<C> most[4];
  for (int v = 0; v < 4; ++v) most[v] = splat(-kInfinity<C>);
  auto step = [&](int64_t at, int v, int n) {
    Vec<C> x = load(row + at);
    if constexpr (kind == MaskKind::Allowed) {
      x = allowed_lanes<C>(allowed + at, n, at > 0) ? x : splat(C(kMaskedScore));
    } else if constexpr (kind == MaskKind::Added) {
      x += load_n(added + at, n);
    }
    if (n < L) x = lane_numbers<C>() < n ? x : splat(-kInfinity<C>);
    if (kind != MaskKind::None || n < L) store(row + at, x);
    most[v] = x > most[v] ? x : most[v];
  };
  int64_t at = 0;
  for (; at + 4 * L <= last; at += 4 * L) SEQMEM_UNROLL
  for (int v = 0; v < 4; ++v) step(at + v * L, v, L);
  for (; at < last; at += L) step(at, 0, static_cast<int>(min<int64_t>(L, last - at)));
  for (; at < keys; at += L) store(row + at, splat(-kInfinity<C>));
  for (int v = 1; v < 4; ++v) most[0] = most[v] > most[0] ? most[v] : most[0];
  C value = most[0][0];
  for (int i = 1; i < L; ++i) value = most[0][i] > value ? most[0][i] : value;
  return value;
}

// scores -> e^(score - most) in place; returns the row's sum. What lies too low for a normal
// number becomes zero: denormals would cost several times the arithmetic. As exp_parts, but with
// ln 2 in one piece, whose error is small beside a weight's, and in fewer registers.
template <class C>
C exponentials(C* row, int64_t n, C most) {
  constexpr int L = kLanes<C>;
  constexpr int W = 4;
  using K = ExpConstants<C>;
  // Adding it rounds to an integer, which stands in the low bits with the exponent's bias.
  constexpr C magic = K::magic + K::bias, ln2 = C(0x1.62e42fefa39efp-1), lowest = -K::bias * ln2;
  Vec<C> total[W] = {};
  int64_t i = 0;
  auto some = [&](auto count) {
    constexpr int V = decltype(count)::value;
    Vec<C> shifted[V], r[V], p[V];
    SEQMEM_UNROLL
    for (int v = 0; v < V; ++v) {
      Vec<C> x = load(row + i + v * L) - most;
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
  while (i + W * L <= n) some(std::integral_constant<int, W>{});
  while (i < n) some(std::integral_constant<int, 1>{});
  return sum<C>((total[0] + total[1]) + (total[2] + total[3]));
}

}  // namespace
}  // namespace seqmem::attention
