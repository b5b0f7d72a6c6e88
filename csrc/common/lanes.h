// Vectors of which the first lanes alone count, for kernel sources compiled once per ISA.
#pragma once

#include "vec_math.h"

namespace seqmem {
namespace {

template <class C>
SEQMEM_INLINE IntVec<C> lane_numbers() {
  IntVec<C> lanes;
  for (int i = 0; i < kLanes<C>; ++i) lanes[i] = i;
  return lanes;
}

// v, zero from lane n on: what stands in padding must be finite, for zero times NaN is NaN.
SEQMEM_INLINE Vec<float> first_lanes(Vec<float> v, int n) {
  if (n >= kLanes<float>) return v;
  return (Vec<float>)((IntVec<float>)v & (lane_numbers<float>() < n));
}

}  // namespace
}  // namespace seqmem
