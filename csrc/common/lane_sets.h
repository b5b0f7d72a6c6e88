// Sets of lanes as bits, for kernel sources compiled once per ISA: bit l stands for lane l.
#pragma once

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

// The lanes in `set` side by side from `to` on; what follows them, up to a whole vector, is lost.
template <class C, class T>
SEQMEM_INLINE void put_lanes(T* to, IntVec<C> x, LaneSet set) {
  static_assert(sizeof(T) == sizeof(C));
#if SEQMEM_VEC_BYTES == 64
  if constexpr (sizeof(C) == 4) {
    x = (IntVec<C>)_mm512_maskz_compress_epi32(set, (__m512i)x);
  } else {
    x = (IntVec<C>)_mm512_maskz_compress_epi64(set, (__m512i)x);
  }
  __builtin_memcpy(to, &x, sizeof x);
#else
  for (; set != 0; set &= set - 1) *to++ = x[__builtin_ctz(set)];
#endif
}

}  // namespace
}  // namespace seqmem
