// The gate functions of SIMD vectors, N vectors at once; internal linkage, as in vectors.h:
//
//   exp(x)     = 2^n e^r       with n = round(x / ln2), r = x - n ln2, |r| <= ln2 / 2
//   sigmoid(x) = 1 / (1 + e^-x)
//   tanh(x)    = (e^2x - 1) / (e^2x + 1)
//
// e^r - 1 by its Taylor polynomial, whose first dropped term is below half an ulp. NaN passes
// through: the clamps compare false.
#pragma once

#include "vectors.h"

namespace seqmem {
namespace {

// `limit`: e^-limit and e^limit are normal numbers. `largest`: 1 / e^largest is still one.
// `infinite`: its 2^n is infinite and its e^r - 1 positive.
template <class C>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float magic = 0x1.8p23f, ln2_hi = 0x1.62e4p-1f, ln2_lo = 0x1.7f7d1cp-20f;
  static constexpr float log2e = 0x1.715476p+0f, limit = 87.0f;
  static constexpr float largest = 87.33f, infinite = 89.0f;
  static constexpr int mantissa = 23, bias = 127, degree = 7;
};
template <>
struct ExpConstants<double> {
  static constexpr double magic = 0x1.8p52, ln2_hi = 0x1.62e42feep-1,
                          ln2_lo = 0x1.a39ef35793c76p-33;
  static constexpr double log2e = 0x1.71547652b82fep+0, limit = 708.0;
  static constexpr double largest = 708.39, infinite = 710.0;
  static constexpr int mantissa = 52, bias = 1023, degree = 13;
};

template <class C>
struct ExpParts {
  Vec<C> power;     // 2^n
  Vec<C> fraction;  // e^r - 1
};

#if defined(__AVX512F__)
constexpr __mmask16 kAllLanes = 0xffff;  // without a mask GCC 12 warns of its own header
#endif

// The larger of x and limit, the smaller; NaN passes through. GCC makes a comparison and a blend of
// 64 bytes of these, not one instruction.
template <class C>
SEQMEM_INLINE Vec<C> at_least(Vec<C> x, C limit) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<C, float>)
    return (Vec<C>)_mm512_maskz_max_ps(kAllLanes, (__m512)splat(limit), (__m512)x);
#endif
  return x < limit ? splat<C>(limit) : x;
}
template <class C>
SEQMEM_INLINE Vec<C> at_most(Vec<C> x, C limit) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<C, float>)
    return (Vec<C>)_mm512_maskz_min_ps(kAllLanes, (__m512)splat(limit), (__m512)x);
#endif
  return x > limit ? splat<C>(limit) : x;
}
template <class C>
SEQMEM_INLINE Vec<C> clamp(Vec<C> x, C limit) {
  return at_most<C>(at_least<C>(x, -limit), limit);
}

// 1 / x to about an ulp, for x from 1 to 2^126 or infinite. A division of 64 bytes keeps its unit
// busy for 10 to 16 cycles; an estimate of 14 bits and one of Newton's steps take 3.
template <class C>
SEQMEM_INLINE Vec<C> reciprocal(Vec<C> x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<C, float>) {
    const __m512 y = _mm512_maskz_rcp14_ps(kAllLanes, (__m512)x);
    const Vec<C> rest = C(1) - x * (Vec<C>)y;  // NaN where x is infinite and y zero
    const __mmask16 finite =
        _mm512_cmp_ps_mask((__m512)x, (__m512)splat(__builtin_huge_valf()), _CMP_NEQ_UQ);
    return (Vec<C>)_mm512_mask_fmadd_ps(y, finite, (__m512)rest, y);
  }
#endif
  return C(1) / x;
}

template <class C>
constexpr C inverse_factorial(int k) {
  double f = 1;
  for (int i = 2; i <= k; ++i) f *= i;
  return static_cast<C>(1 / f);
}

// N vectors at once, step by step: a single polynomial would wait for its own multiplications.
template <int N, class C>
SEQMEM_INLINE void exp_parts(const Vec<C> (&x)[N], ExpParts<C> (&out)[N]) {
  using K = ExpConstants<C>;
  Vec<C> shifted[N], r[N], p[N];
  SEQMEM_UNROLL
  for (int i = 0; i < N; ++i) {
    shifted[i] = x[i] * K::log2e + K::magic;
    const Vec<C> n = shifted[i] - K::magic;
    r[i] = (x[i] - n * K::ln2_hi) - n * K::ln2_lo;
    p[i] = splat(inverse_factorial<C>(K::degree));
  }
  SEQMEM_UNROLL
  for (int k = K::degree - 1; k >= 1; --k) {
    SEQMEM_UNROLL
    for (int i = 0; i < N; ++i) p[i] = p[i] * r[i] + inverse_factorial<C>(k);
  }
  SEQMEM_UNROLL
  for (int i = 0; i < N; ++i) {
    const IntVec<C> exponent = (IntVec<C>)shifted[i] + K::bias;
    out[i] = {(Vec<C>)(exponent << K::mantissa), p[i] * r[i]};
  }
}

// x = e^x for x <= 0: zero below the smallest normal number, for denormal numbers are slow to
// compute with, and NaN where x is NaN.
template <int N, class C>
SEQMEM_INLINE void exp_of_negative(Vec<C> (&x)[N]) {
  constexpr C limit = ExpConstants<C>::limit;
  Vec<C> argument[N];
  ExpParts<C> e[N];
  SEQMEM_UNROLL
  for (int i = 0; i < N; ++i) argument[i] = x[i] < -limit ? splat<C>(-limit) : x[i];
  exp_parts<N, C>(argument, e);
  SEQMEM_UNROLL
  for (int i = 0; i < N; ++i)
    x[i] = x[i] < -limit ? Vec<C>{} : e[i].power + e[i].power * e[i].fraction;
}

// sigmoid(x) = 1 / (1 + e^-x), from the parts of e^-x: exactly 0 where it underflows, so that a
// closed gate lets nothing of the largest cell through.
template <class C>
SEQMEM_INLINE Vec<C> sigmoid_argument(Vec<C> x) {
  using K = ExpConstants<C>;
  const Vec<C> y = at_least<C>(-x, -K::limit);
  return y > K::largest ? splat<C>(K::infinite) : y;
}
template <class C>
SEQMEM_INLINE Vec<C> sigmoid_of(const ExpParts<C>& e) {
  return reciprocal<C>(C(1) + (e.power + e.power * e.fraction));
}

// tanh x = (e^2x - 1) / (e^2x + 1), with e^2x - 1 = 2^n (e^r - 1) + (2^n - 1): no cancellation
// near zero, where n is 0.
template <class C>
SEQMEM_INLINE Vec<C> tanh_argument(Vec<C> x) {
  return clamp<C>(x + x, C(std::is_same_v<C, float> ? 20 : 44));
}
template <class C>
SEQMEM_INLINE Vec<C> tanh_of(const ExpParts<C>& e) {
  const Vec<C> m = e.power * e.fraction + (e.power - C(1));
  return m * reciprocal<C>(m + C(2));
}

template <class C>
SEQMEM_INLINE Vec<C> tanh(Vec<C> x) {
  const Vec<C> argument[1] = {tanh_argument<C>(x)};
  ExpParts<C> e[1];
  exp_parts<1, C>(argument, e);
  return tanh_of<C>(e[0]);
}

}  // namespace
}  // namespace seqmem
