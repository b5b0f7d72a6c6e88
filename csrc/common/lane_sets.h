// Sets of lanes as bits, for kernel sources compiled once per ISA: bit l stands for lane l.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "lanes.h"

namespace seqmem {
namespace {

using LaneSet = uint32_t;

// The lanes of a comparison's result that are true.
template <class C>
SEQMEM_INLINE LaneSet lanes_set(IntVec<C> mask) {
#if SEQMEM_VEC_BYTES == 64
  if constexpr (sizeof(C) == 4) return _mm512_movepi32_mask((__m512i)mask);
  if constexpr (sizeof(C) == 8) return _mm512_movepi64_mask((__m512i)mask);
#elif SEQMEM_VEC_BYTES == 32
  typedef float Floats __attribute__((vector_size(32)));
  typedef double Doubles __attribute__((vector_size(32)));
  if constexpr (sizeof(C) == 4) return __builtin_ia32_movmskps256((Floats)mask);
  if constexpr (sizeof(C) == 8) return __builtin_ia32_movmskpd256((Doubles)mask);
#elif defined(__SSE2__)
  typedef float Floats __attribute__((vector_size(16)));
  typedef double Doubles __attribute__((vector_size(16)));
  if constexpr (sizeof(C) == 4) return __builtin_ia32_movmskps((Floats)mask);
  if constexpr (sizeof(C) == 8) return __builtin_ia32_movmskpd((Doubles)mask);
#else
  LaneSet bits = 0;
  for (int l = 0; l < kLanes<C>; ++l) bits |= LaneSet(mask[l] & 1) << l;
  return bits;
#endif
}

// The first n lanes, of a vector of C; all where there are no more.
template <class C>
SEQMEM_INLINE LaneSet first_lanes_set(int64_t n) {
  const int64_t count = n < 0 ? 0 : n < kLanes<C> ? n : kLanes<C>;
  return (LaneSet(1) << count) - 1;
}

#if SEQMEM_VEC_BYTES == 32
// For each set of lanes, the 32-bit words of its lanes one after the other, a byte each.
template <class C>
struct WordsOfSet {
  static constexpr int kWords = sizeof(C) / 4;
  uint8_t of[1 << kLanes<C>][8] = {};

  constexpr WordsOfSet() {
    for (int set = 0; set < 1 << kLanes<C>; ++set)
      for (int lane = 0, n = 0; lane < kLanes<C>; ++lane)
        for (int word = 0; word < kWords && (set >> lane & 1); ++word)
          of[set][n++] = uint8_t(lane * kWords + word);
  }
};
template <class C>
constexpr WordsOfSet<C> kWordsOfSet;
#endif

// The lanes in `set` side by side from `to` on; what follows them, up to a whole vector, is lost.
template <class C, class V, class T>
SEQMEM_INLINE void put_lanes(T* to, V x, LaneSet set) {
  static_assert(sizeof(V) == SEQMEM_VEC_BYTES && std::is_same_v<T, std::decay_t<decltype(x[0])>>);
#if SEQMEM_VEC_BYTES == 64
  if constexpr (sizeof(C) == 4) {
    x = (V)_mm512_maskz_compress_epi32(set, (__m512i)x);
  } else {
    x = (V)_mm512_maskz_compress_epi64(set, (__m512i)x);
  }
  __builtin_memcpy(to, &x, sizeof x);
#elif SEQMEM_VEC_BYTES == 32
  const __m128i words = _mm_loadl_epi64((const __m128i*)kWordsOfSet<C>.of[set]);
  x = (V)_mm256_permutevar8x32_epi32((__m256i)x, _mm256_cvtepu8_epi32(words));
  __builtin_memcpy(to, &x, sizeof x);
#else
  for (; set != 0; set &= set - 1) *to++ = x[__builtin_ctz(set)];
#endif
}

}  // namespace
}  // namespace seqmem
