// Stores that bypass the caches, for results so large that they would leave the caches before they
// are read: a line then need not be fetched before it is overwritten. For sources compiled once per
// ISA.
#pragma once

#include "vec_math.h"

namespace seqmem {
namespace {

// p is aligned to a vector.
template <class S>
SEQMEM_INLINE void store_past_caches(S* p, Vec<compute_t<S>> v) {
#if defined(__clang__)
  if constexpr (std::is_same_v<S, compute_t<S>>)
    return __builtin_nontemporal_store(v, reinterpret_cast<Vec<S>*>(p));
#elif SEQMEM_VEC_BYTES == 64
  if constexpr (std::is_same_v<S, float>) return __builtin_ia32_movntps512(p, v);
  if constexpr (std::is_same_v<S, double>) return __builtin_ia32_movntpd512(p, v);
#elif SEQMEM_VEC_BYTES == 32
  if constexpr (std::is_same_v<S, float>) return __builtin_ia32_movntps256(p, v);
  if constexpr (std::is_same_v<S, double>) return __builtin_ia32_movntpd256(p, v);
#endif
  store(p, v);
}

// Makes these stores visible to other threads.
SEQMEM_INLINE void settle_stores() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace
}  // namespace seqmem
