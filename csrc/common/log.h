// The logarithm of vectors, for kernel sources compiled once per ISA.
#pragma once

#include "vec_math.h"

namespace seqmem {
namespace {

template <class C>
struct LogConstants;
template <>
struct LogConstants<float> {
  static constexpr int32_t sqrt_half = 0x3f3504f3;
  static constexpr float smallest = 0x1p-126f;
  static constexpr int terms = 4;
};
template <>
struct LogConstants<double> {
  static constexpr int64_t sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double smallest = 0x1p-1022;
  static constexpr int terms = 10;
};

// log x for x > 0, anything finite for x <= 0; NaN and infinity stay. With x = 2^n m and m near 1,
// log m = 2 atanh s = 2 (s + s^3/3 + s^5/5 + ...), s = (m - 1) / (m + 1).
template <int K, class C>
SEQMEM_INLINE void log_of_positive(const Vec<C> (&x)[K], Vec<C> (&out)[K]) {
  using E = ExpConstants<C>;
  using G = LogConstants<C>;
  constexpr C up = C(int64_t(1) << (E::mantissa + 1));
  Vec<C> s[K], z[K], p[K], n[K];
  SEQMEM_UNROLL
  for (int i = 0; i < K; ++i) {
    const IntVec<C> tiny = x[i] < G::smallest;
    const Vec<C> scaled = tiny ? x[i] * up : x[i];
    const IntVec<C> bits = (IntVec<C>)scaled;
    const IntVec<C> exponent = (bits - G::sqrt_half) >> E::mantissa;
    const Vec<C> m = (Vec<C>)(bits - (exponent << E::mantissa));
    n[i] = __builtin_convertvector(exponent + (tiny & -(E::mantissa + 1)), Vec<C>);
    s[i] = (m - C(1)) / (m + C(1));
    z[i] = s[i] * s[i];
    p[i] = splat(C(2) / C(2 * G::terms + 1));
  }
  SEQMEM_UNROLL
  for (int k = G::terms - 1; k >= 1; --k) {
    SEQMEM_UNROLL
    for (int i = 0; i < K; ++i) p[i] = p[i] * z[i] + C(2) / C(2 * k + 1);
  }
  SEQMEM_UNROLL
  for (int i = 0; i < K; ++i) {
    const Vec<C> log_m = s[i] * C(2) + (s[i] * z[i] * p[i] + n[i] * E::ln2_lo);
    const Vec<C> value = n[i] * E::ln2_hi + log_m;
    out[i] = x[i] - x[i] == C(0) ? value : x[i];
  }
}

}  // namespace
}  // namespace seqmem
