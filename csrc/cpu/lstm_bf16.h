// What the LSTM's kernels in bf16 share: the products of a step's rows, on tiles or on dot
// products, elementwise work among these products, and gate functions that are as good as bf16
// needs.
#pragma once

#include "../common/bf16_panels.h"
#include "lstm_common.h"

namespace seqmem::lstm {
namespace {

// The elementwise work on the rows of one group, done bit by bit among the products of the next:
// `slices` times slice(), or finish() at once.
template <class Row>
class Pending {
  const Row work;
  const int64_t slices;
  int64_t next = 0, end = 0, rows = 0, due = 0;

 public:
  Pending(int64_t slices, const Row& work) : work(work), slices(slices) {}
  void start(const RowGroup& g) {
    next = g.first, end = g.first + g.count;
    rows = g.count, due = 0;
  }
  SEQMEM_INLINE void slice() {
    for (due += rows; due >= slices && next < end; due -= slices) work(next++);
  }
  SEQMEM_INLINE void finish() {
    while (next < end) work(next++);
  }
};

// Gate functions good to 6e-5 of their value; bf16 keeps 2e-3.

SEQMEM_INLINE Vec<float> rough_reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)x);
#else
  return 1.0f / x;
#endif
}

// 2^x = 2^n + 2^n (2^r - 1), n = round(x); the second factor by a polynomial, good to 1.5e-5.
SEQMEM_INLINE ExpParts<float> power_of_two(Vec<float> x) {
  constexpr float magic = ExpConstants<float>::magic;
  const Vec<float> shifted = x + magic, r = x - (shifted - magic);
  Vec<float> p = r * 0.00961811095f + 0.0558372885f;
  p = p * r + 0.240232527f;
  p = p * r + 0.693136871f;
  return {(Vec<float>)(((IntVec<float>)shifted + 127) << 23), p * r};
}
// Exactly 0 where 1 + 2^y would overflow.
SEQMEM_INLINE Vec<float> cheap_sigmoid(Vec<float> x) {
  const Vec<float> y = at_least<float>(x * -1.44269504f, -126);
  const ExpParts<float> e = power_of_two(y > 126 ? splat(128.25f) : y);
  return rough_reciprocal((e.power + 1.0f) + e.power * e.fraction);
}
SEQMEM_INLINE Vec<float> cheap_tanh(Vec<float> x) {
  const ExpParts<float> e = power_of_two(clamp<float>(x * 2.88539008f, 40));
  const Vec<float> m = e.power * e.fraction + (e.power - 1.0f);
  return m * rough_reciprocal(m + 2.0f);
}

}  // namespace
}  // namespace seqmem::lstm
