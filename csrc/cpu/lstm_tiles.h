// What the LSTM's kernels on tiles share: packed weights, the products of a step's rows,
// elementwise work among these products, and gate functions that are as good as bf16 needs.
//
// Units and columns come in blocks of 16, a tile's width; four tiles of sums are in use at once:
//
//   wide   16 rows by four tiles of columns    up to 16 rows: each weight is read once
//   tall   32 rows by two tiles, twice         more rows: half the loads a product
//
// A sum runs over k in one order whatever the shape, so bits do not depend on it.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../common/gemm.h"
#include "../common/tiles.h"
#include "lstm_common.h"

namespace seqmem::lstm {
namespace {

constexpr int kBlock = 16;          // units, columns or rows of a tile
constexpr int kDepth = 32;          // members of the sum that one tile product takes
constexpr int kPanel = 4 * kBlock;  // columns of a panel
constexpr int64_t kTile = kBlock * kDepth;

// Up to 32 rows: one or two blocks of 16. The last block is moved back rather than cut, so that it
// reads no foreign row; where there are fewer than 16 rows in all, tiles read beyond the last.
struct RowGroup {
  int64_t first, count;
  int64_t block[2];
  bool two;
};
SEQMEM_INLINE RowGroup row_group(int64_t first, int64_t rows, bool wide) {
  const int64_t count = min<int64_t>(wide ? kBlock : 2 * kBlock, rows - first);
  if (count > kBlock) return {first, count, {first, first + count - kBlock}, true};
  const int64_t block = max<int64_t>(0, min(first, rows - kBlock));
  return {first, count, {block, block}, false};
}

// Calls f(tile, offset) for each tile of sums of a group by a panel, or by one half of it (tall);
// offset: where they lie in rows of `stride` elements, the group's first block first.
template <class F>
SEQMEM_INLINE void each_sum(const RowGroup& g, bool wide, int half, int64_t stride, F&& f) {
  const int64_t column = half * 2 * kBlock, second = (g.block[1] - g.block[0]) * stride;
  f(std::integral_constant<int, 0>{}, column);
  f(std::integral_constant<int, 1>{}, column + kBlock);
  if (wide) {
    f(std::integral_constant<int, 2>{}, 2 * kBlock);
    f(std::integral_constant<int, 3>{}, 3 * kBlock);
  } else if (g.two) {
    f(std::integral_constant<int, 2>{}, second + column);
    f(std::integral_constant<int, 3>{}, second + column + kBlock);
  }
}
SEQMEM_INLINE void clear_sums() { tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(); }
SEQMEM_INLINE void load_sums(const RowGroup& g, bool wide, int half, const float* p,
                             int64_t stride) {
  each_sum(g, wide, half, stride,
           [&](auto tile, int64_t i) { tile_load<decltype(tile)::value>(p + i, stride * 4); });
}
SEQMEM_INLINE void store_sums(const RowGroup& g, bool wide, int half, float* p, int64_t stride) {
  each_sum(g, wide, half, stride,
           [&](auto tile, int64_t i) { tile_store<decltype(tile)::value>(p + i, stride * 4); });
}

// A right operand in panels of 64 columns: wide [panel][k][4 tiles], tall [panel][half][k][2
// tiles].
class Panels {
 public:
  bf16* data;
  int64_t depth;  // blocks of k
  bool wide;

  bf16* tile(int64_t panel, int64_t k, int column) const {
    if (wide) return data + ((panel * depth + k) * 4 + column) * kTile;
    return data + (((panel * 2 + column / 2) * depth + k) * 2 + column % 2) * kTile;
  }

  // The sums += rows of `left`, from the group's blocks on, times a panel or a half of it. Calls
  // slice() after each k.
  template <class Slice>
  SEQMEM_INLINE void multiply(int64_t panel, int half, const RowGroup& g, const bf16* left,
                              int64_t stride, const Slice& slice) const {
    if (wide)
      run<4, 1>(panel, half, g, left, stride, slice);
    else if (g.two)
      run<2, 2>(panel, half, g, left, stride, slice);
    else
      run<2, 1>(panel, half, g, left, stride, slice);
  }

 private:
  template <int columns, int blocks, class Slice>
  SEQMEM_INLINE void run(int64_t panel, int half, const RowGroup& g, const bf16* left,
                         int64_t stride, const Slice& slice) const {
    const bf16 *a = left + g.block[0] * stride, *b = left + g.block[1] * stride;
    const bf16* w = tile(panel, 0, 2 * half);
    for (int64_t k = 0; k < depth; ++k, a += kDepth, b += kDepth, w += columns * kTile) {
      tile_load<4>(a, stride * 2);
      tile_load<6>(w, 64);
      tile_product<0, 4, 6>();
      tile_load<7>(w + kTile, 64);
      tile_product<1, 4, 7>();
      if constexpr (columns == 4) {
        tile_load<6>(w + 2 * kTile, 64);
        tile_product<2, 4, 6>();
        tile_load<7>(w + 3 * kTile, 64);
        tile_product<3, 4, 7>();
      }
      if constexpr (blocks == 2) {
        tile_load<5>(b, stride * 2);
        tile_product<2, 5, 6>();
        tile_product<3, 5, 7>();
      }
      slice();
    }
  }
};
constexpr auto kNothing = [] {};

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

// to[j * stride + i] = from[i][j], 16 x 16 elements of 32 bits.
SEQMEM_INLINE void transpose_tile(const float (&from)[kBlock][kBlock], float* to, int64_t stride) {
  constexpr int L = kLanes<float>;
  for (int i = 0; i < kBlock; i += L)
    for (int j = 0; j < kBlock; j += L)
      transpose_block<float>(
          L, L, [&](int l) { return load(from[i + l] + j); },
          [&](int l, Vec<float> v) { store(to + (j + l) * stride + i, v); });
}

// Pairs of bf16 from two rows of them, widened.
SEQMEM_INLINE UintVec pairs_of(Vec<float> even, Vec<float> odd) {
  return (UintVec)even >> 16 | (UintVec)odd;
}
// A line of pairs: 16 columns of two rows of bf16, of which n exist; a null row is zero.
SEQMEM_INLINE void store_pairs(void* to, const bf16* even, const bf16* odd, int64_t n) {
  for (int l = 0; l < kBlock; l += kLanes<float>) {
    const int lanes = static_cast<int>(n - l);
    const UintVec line = pairs_of(even == nullptr ? Vec<float>{} : load_n(even + l, lanes),
                                  odd == nullptr ? Vec<float>{} : load_n(odd + l, lanes));
    __builtin_memcpy(static_cast<uint32_t*>(to) + l, &line, sizeof line);
  }
}

// v, zero from lane n on: what stands in padding must be finite, for zero times NaN is NaN.
SEQMEM_INLINE Vec<float> first_lanes(Vec<float> v, int n) {
  if (n >= kLanes<float>) return v;
  IntVec<float> lane;
  for (int i = 0; i < kLanes<float>; ++i) lane[i] = i;
  return (Vec<float>)((IntVec<float>)v & (lane < n));
}

// Gate functions good to 6e-5 of their value; bf16 keeps 2e-3.

#if defined(__AVX512F__)
constexpr __mmask16 kAll = 0xffff;  // without a mask GCC 12 warns of its own header
#endif

SEQMEM_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_rcp14_ps(kAll, (__m512)x);
#else
  return 1.0f / x;
#endif
}
// NaN passes through both.
SEQMEM_INLINE Vec<float> at_least(Vec<float> x, float limit) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_max_ps(kAll, (__m512)splat(limit), (__m512)x);
#else
  return x < limit ? splat(limit) : x;
#endif
}
SEQMEM_INLINE Vec<float> at_most(Vec<float> x, float limit) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_min_ps(kAll, (__m512)splat(limit), (__m512)x);
#else
  return x > limit ? splat(limit) : x;
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
  const Vec<float> y = at_least(x * -1.44269504f, -126);
  const ExpParts<float> e = power_of_two(y > 126 ? splat(128.25f) : y);
  return reciprocal((e.power + 1.0f) + e.power * e.fraction);
}
SEQMEM_INLINE Vec<float> cheap_tanh(Vec<float> x) {
  const ExpParts<float> e = power_of_two(at_most(at_least(x * 2.88539008f, -40), 40));
  const Vec<float> m = e.power * e.fraction + (e.power - 1.0f);
  return m * reciprocal(m + 2.0f);
}

}  // namespace
}  // namespace seqmem::lstm
