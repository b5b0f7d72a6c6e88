// Functions of vectors for the NTM's single steps.
#pragma once

#include "../common/machine_math.h"

namespace seqmem::ntm_addressing {
namespace {

using machine::square_root;

// Calls f(constant K, first vector) for 0..n-1, four vectors at once as long as they last: the
// polynomials of one vector alone would wait for themselves.
template <class F>
SEQMEM_INLINE void for_vectors(int64_t n, F&& f) {
  int64_t v = 0;
  for (; v + 4 <= n; v += 4) f(std::integral_constant<int, 4>{}, v);
  for (; v < n; ++v) f(std::integral_constant<int, 1>{}, v);
}

}  // namespace
}  // namespace seqmem::ntm_addressing
