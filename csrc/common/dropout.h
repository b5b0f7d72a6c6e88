// Dropout of attention's weights by counting: whether a weight is dropped depends on a seed, on its
// row and on its column alone. A dropped weight is stored with a minus sign, so that a backward
// knows both what it was and that it did not meet the values. The same numbers:
// seqmem_fast/reference/common.py.
#pragma once

#include "heads.h"
#include "vec_math.h"

namespace seqmem {
namespace {

// Of the weights that are kept.
template <class C>
SEQMEM_INLINE C kept_factor(const Dropout& d) {
  return d.p < 1 ? static_cast<C>(1 / (1 - d.p)) : C(0);
}

SEQMEM_INLINE uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}

// What row number `row` of the weights, all dimensions but the last, draws its numbers from.
SEQMEM_INLINE uint32_t key_of(const Dropout& d, int64_t row) {
  constexpr uint32_t kStep = 0x9E3779B9u;
  uint32_t key = 0;
  for (const uint64_t part : {d.seed, d.seed >> 32, uint64_t(row), uint64_t(row) >> 32})
    key = mixed(key + static_cast<uint32_t>(part) + kStep);
  return key;
}

// Gives dropped ones of row[lo..hi-1] a minus sign; row[x] is column column_of(x).
template <class C, class Column>
SEQMEM_INLINE void drop(C* row, int64_t lo, int64_t hi, const Dropout& d, uint32_t key,
                        Column&& column_of) {
  const auto below = static_cast<int32_t>(d.p * (1 << 24) + 0.5);
  for (int64_t x = lo; x < hi; ++x) {
    const uint32_t number = mixed(key ^ static_cast<uint32_t>(column_of(x)) * 0x9E3779B9u);
    row[x] = static_cast<int32_t>(number >> 8) < below ? -row[x] : row[x];
  }
}

// row[lo..hi-1] -> what meets the values: zero where dropped, the others times the factor.
template <class C>
void meet_values(C* row, int64_t lo, int64_t hi, const Dropout& d) {
  const C factor = kept_factor<C>(d);
  for (int64_t x = lo; x < hi; ++x) row[x] = row[x] < 0 ? C(0) : factor * row[x];
}

// The gradient of what meets the values -> that of the weights.
template <class C>
void meet_gradients(C* slope, const C* weight, int64_t lo, int64_t hi, const Dropout& d) {
  const C factor = kept_factor<C>(d);
  for (int64_t x = lo; x < hi; ++x) slope[x] = weight[x] < 0 ? C(0) : factor * slope[x];
}

// Stored weights and their gradient -> without the sign.
template <class C>
void take_signs(C* slope, C* weight, int64_t lo, int64_t hi) {
  for (int64_t x = lo; x < hi; ++x) {
    slope[x] = weight[x] < 0 ? -slope[x] : slope[x];
    weight[x] = weight[x] < 0 ? -weight[x] : weight[x];
  }
}

}  // namespace
}  // namespace seqmem
