// SIMD vectors for kernel sources that are compiled once per ISA: their types, how a value of 16
// bits is stored and read, whole vectors and the first n lanes, and sums over lanes.
//
//   Vec<C> = load(S*)     SEQMEM_VEC_BYTES of float or double, whatever S they are stored as
//   store(S*, Vec<C>)     rounded to nearest even
//
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

}  // namespace
}  // namespace seqmem
