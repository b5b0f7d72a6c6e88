// SIMD vectors and the gate functions, for kernel sources that are compiled once per ISA.
// Written with the vector extensions that GCC and Clang share: one source serves SSE2, AVX2,
// AVX-512 and other processors. Everything has internal linkage, so that the linker cannot replace
// one ISA's copy by another's.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SEQMEM_VEC_BYTES 64
#elif defined(__AVX2__)
#define SEQMEM_VEC_BYTES 32
#else
#define SEQMEM_VEC_BYTES 16
#endif

namespace seqmem {
namespace {

// Storage-only 16-bit types: loaded to and stored from float.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The type arithmetic is done in: double for double, float for everything else.
template <class S>
using compute_t = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class C>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float type __attribute__((vector_size(SEQMEM_VEC_BYTES)));
  typedef int32_t ints __attribute__((vector_size(SEQMEM_VEC_BYTES)));
  typedef uint32_t uints __attribute__((vector_size(SEQMEM_VEC_BYTES)));
  typedef uint16_t halves __attribute__((vector_size(SEQMEM_VEC_BYTES / 2)));
};
template <>
struct VecTypes<double> {
  typedef double type __attribute__((vector_size(SEQMEM_VEC_BYTES)));
  typedef int64_t ints __attribute__((vector_size(SEQMEM_VEC_BYTES)));
};

template <class C>
using Vec = typename VecTypes<C>::type;
template <class C>
using IntVec = typename VecTypes<C>::ints;
using UintVec = VecTypes<float>::uints;
using HalfVec = VecTypes<float>::halves;

template <class C>
inline constexpr int kLanes = SEQMEM_VEC_BYTES / sizeof(C);

#define SEQMEM_INLINE inline __attribute__((always_inline))
// Loops over a tile must be unrolled, or its accumulators are kept in memory instead of registers.
#if defined(__clang__)
#define SEQMEM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SEQMEM_UNROLL _Pragma("GCC unroll 16")
#endif

template <class C>
SEQMEM_INLINE Vec<C> splat(C x) {
  return x - Vec<C>{};
}

// The vector whose lane i is lane index(i) of a followed by b. `index` captures nothing.
template <class V, class F, int... I>
SEQMEM_INLINE V shuffle_lanes(V a, V b, F index, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, index(I)...);
}
template <class V, class F>
SEQMEM_INLINE V shuffle(V a, V b, F index) {
  return shuffle_lanes(a, b, index, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>{});
}

// ---- 16-bit conversions: round to nearest even, NaN stays NaN ----

SEQMEM_INLINE Vec<float> widen(HalfVec h, bf16) {
  return (Vec<float>)(__builtin_convertvector(h, UintVec) << 16);
}

SEQMEM_INLINE HalfVec narrow(Vec<float> x, bf16) {
#if defined(__AVX512BF16__)  // subnormal numbers become zero
  return (HalfVec)_mm512_cvtneps_pbh((__m512)x);
#else
  UintVec u = (UintVec)x;
  UintVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  UintVec nan = (UintVec)(x != x);
  return __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), HalfVec);
#endif
}

SEQMEM_INLINE Vec<float> widen(HalfVec h, fp16) {
  UintVec u = __builtin_convertvector(h, UintVec);
  UintVec sign = (u & 0x8000u) << 16;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals.
  Vec<float> magnitude = (Vec<float>)((u & 0x7fffu) << 13) * 0x1p112f;
  UintVec special = (UintVec)((u & 0x7c00u) == 0x7c00u);
  return (Vec<float>)((UintVec)magnitude | (special & 0x7f800000u) | sign);
}

SEQMEM_INLINE HalfVec narrow(Vec<float> x, fp16) {
  UintVec u = (UintVec)x;
  UintVec sign = (u >> 16) & 0x8000u;
  UintVec mag = u & 0x7fffffffu;
  UintVec normal = (mag + 0xc8000fffu + ((mag >> 13) & 1u)) >> 13;
  // Below 2^-14 the sum with 0.5 leaves the rounded subnormal in the low bits.
  UintVec subnormal = (UintVec)((Vec<float>)mag + 0.5f) - 0x3f000000u;
  UintVec tiny = (UintVec)(mag < 0x38800000u);
  UintVec huge = (UintVec)(mag >= 0x477ff000u);
  UintVec nan = (UintVec)(mag > 0x7f800000u);
  UintVec half = (subnormal & tiny) | (normal & ~tiny);
  half = (half & ~huge) | (0x7c00u & huge);
  half = (half & ~nan) | (0x7e00u & nan);
  return __builtin_convertvector(half | sign, HalfVec);
}

// ---- loads and stores, of whole vectors and of the first n lanes ----

template <class S>
SEQMEM_INLINE Vec<compute_t<S>> load(const S* p) {
  if constexpr (std::is_same_v<S, compute_t<S>>) {
    Vec<S> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  } else {
    HalfVec h;
    __builtin_memcpy(&h, p, sizeof h);
    return widen(h, S{});
  }
}

template <class S>
SEQMEM_INLINE void store(S* p, Vec<compute_t<S>> v) {
  if constexpr (std::is_same_v<S, compute_t<S>>) {
    __builtin_memcpy(p, &v, sizeof v);
  } else {
    HalfVec h = narrow(v, S{});
    __builtin_memcpy(p, &h, sizeof h);
  }
}

// Some lanes by masked instructions: a vector that is loaded from values stored one by one waits
// for all of them. Not under a sanitizer, which does not see what such instructions touch.
#if defined(__AVX512BW__) && !defined(__SANITIZE_ADDRESS__)

SEQMEM_INLINE uint32_t first_bits(int n) { return n > 0 ? (uint32_t(1) << n) - 1 : 0; }

template <class S>
SEQMEM_INLINE Vec<compute_t<S>> load_n(const S* p, int n) {
  if (n >= kLanes<compute_t<S>>) return load(p);
  if constexpr (std::is_same_v<S, float>) {
    return (Vec<float>)_mm512_maskz_loadu_ps(first_bits(n), p);
  } else if constexpr (std::is_same_v<S, double>) {
    return (Vec<double>)_mm512_maskz_loadu_pd(first_bits(n), p);
  } else {
    return widen((HalfVec)_mm256_maskz_loadu_epi16(first_bits(n), p), S{});
  }
}

template <class S>
SEQMEM_INLINE void store_n(S* p, Vec<compute_t<S>> v, int n) {
  if (n >= kLanes<compute_t<S>>) return store(p, v);
  if constexpr (std::is_same_v<S, float>) {
    _mm512_mask_storeu_ps(p, first_bits(n), (__m512)v);
  } else if constexpr (std::is_same_v<S, double>) {
    _mm512_mask_storeu_pd(p, first_bits(n), (__m512d)v);
  } else {
    _mm256_mask_storeu_epi16(p, first_bits(n), (__m256i)narrow(v, S{}));
  }
}

#else

template <class S>
SEQMEM_INLINE Vec<compute_t<S>> load_n(const S* p, int n) {
  if (n >= kLanes<compute_t<S>>) return load(p);
  S lanes[kLanes<compute_t<S>>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class S>
SEQMEM_INLINE void store_n(S* p, Vec<compute_t<S>> v, int n) {
  if (n >= kLanes<compute_t<S>>) return store(p, v);
  S lanes[kLanes<compute_t<S>>];
  store(lanes, v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

#endif

// The value of one stored element.
template <class S>
SEQMEM_INLINE compute_t<S> widen_one(S x) {
  if constexpr (std::is_same_v<S, compute_t<S>>) {
    return x;
  } else {
    return widen(HalfVec{} + x.bits, S{})[0];
  }
}

// What v becomes by being stored as S and loaded again.
template <class S>
SEQMEM_INLINE Vec<compute_t<S>> rounded_to(Vec<compute_t<S>> v) {
  if constexpr (std::is_same_v<S, compute_t<S>>) {
    return v;
  } else {
    return widen(narrow(v, S{}), S{});
  }
}

template <int first, class V, int... I>
SEQMEM_INLINE auto lanes_from(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (first + I)...);
}

// Combines the lanes in pairs, those of the upper half with those of the lower one, down to one.
// Halves are shorter vectors: by way of memory each round would wait for the store before it.
template <class V, class F>
SEQMEM_INLINE auto reduced(V v, const F& combine) {
  constexpr int kHalf = sizeof(V) / sizeof(v[0]) / 2;
  if constexpr (sizeof(V) > 16) {
    const auto half = std::make_integer_sequence<int, kHalf>{};
    return reduced(combine(lanes_from<0>(v, half), lanes_from<kHalf>(v, half)), combine);
  } else if constexpr (kHalf == 2) {
    const V pairs = combine(v, __builtin_shufflevector(v, v, 2, 3, 2, 3));
    return combine(pairs[0], pairs[1]);
  } else {
    return combine(v[0], v[1]);
  }
}

template <class C>
SEQMEM_INLINE C lane_sum(Vec<C> v) {
  return reduced(v, [](auto a, auto b) { return a + b; });
}

// Of numbers.
template <class C>
SEQMEM_INLINE C largest_lane(Vec<C> v) {
  return reduced(v, [](auto a, auto b) { return b > a ? b : a; });
}

// ---- exp, sigmoid, tanh ----
//
//   exp(x) = 2^n e^r  with n = round(x / ln2), r = x - n ln2, |r| <= ln2 / 2
//
// e^r - 1 by its Taylor polynomial, whose first dropped term is below half an ulp. NaN passes
// through: the clamps compare false.

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
