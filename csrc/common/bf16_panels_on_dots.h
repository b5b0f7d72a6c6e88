// Products by panels on vectors of dot products (AVX512-BF16), with the names and the layout of
// bf16_panels_on_tiles.h. 24 vectors of sums are in registers while k runs, of 64 columns (wide) or
// 32.
//
// A sum runs over k in one order whatever the shape, so bits do not depend on it.
#pragma once

#include "bf16_blocks.h"
#include "bf16_dot.h"

namespace seqmem {
namespace {

// Rows are not bound to a tile's 16, so that a panel of 64 columns always serves.
SEQMEM_INLINE bool is_wide(int64_t) { return true; }
SEQMEM_INLINE int64_t whole_blocks(int64_t rows) { return rows; }
SEQMEM_INLINE void tiles_configure(int) {}
SEQMEM_INLINE void tiles_release() {}
SEQMEM_INLINE void tiles_fence() {}

// Up to 32 rows, in one block: passes of six at most over a panel, which L1 holds half of.
SEQMEM_INLINE RowGroup row_group(int64_t first, int64_t rows, bool) {
  return {first, min(kMostRows, rows - first), {first, first}, false};
}

// Rows begin.. of the group: to = from + the terms, by R rows at most.
template <int columns, int R, int n>
void sum_rows(int64_t rows, int64_t begin, const RowGroup& g, const Term (&terms)[n],
              const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  if constexpr (R > 1)
    if (rows < R)
      return sum_rows<columns, R - 1>(rows, begin, g, terms, from, from_stride, to, to_stride);
  // Of each block of columns one vector at a time: all 16 of them where vectors are that long.
  constexpr int L = kLanes<float>;
  for (int part = 0; part < kBlock; part += L) {
    Vec<float> acc[R][columns];
    start_sums(acc);
    if (from != nullptr) SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) SEQMEM_UNROLL
    for (int v = 0; v < columns; ++v)
      acc[r][v] = load(from + (begin + r) * from_stride + v * kBlock + part);
    for (const Term& term : terms) {
      const bf16* a = term.left + (g.block[0] + begin) * term.stride;
      const bf16* b = term.panels.tile(term.panel, 0, 0) + 2 * part;
      for (int64_t pairs = term.pairs(); pairs > 0; pairs -= kDepth / 2) {
        const int some = static_cast<int>(min<int64_t>(pairs, kDepth / 2));
        multiply_pairs(some, a, term.stride, b, kTile, kDepth, acc);
        a += kDepth, b += columns * kTile;
      }
    }
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) SEQMEM_UNROLL
    for (int v = 0; v < columns; ++v)
      store(to + (begin + r) * to_stride + v * kBlock + part, acc[r][v]);
  }
}

// to [the group's rows][64, or 32 of panels that are not wide] = from + the terms; zero for a null
// `from`. Calls slice() about as often as there are blocks of k.
template <int n, class Slice>
SEQMEM_INLINE void sum_products(const RowGroup& g, const Term (&terms)[n], const float* from,
                                int64_t from_stride, float* to, int64_t to_stride,
                                const Slice& slice) {
  const bool wide = terms[0].panels.wide;
  const int64_t passes = ceil_div(g.count, wide ? 6 : 12);
  int64_t blocks = 0, done = 0;
  for (const Term& term : terms) blocks += term.blocks;
  for (int64_t i = 0; i < passes; ++i) {
    const int64_t begin = g.count * i / passes, rows = g.count * (i + 1) / passes - begin;
    if (wide)
      sum_rows<4, 6>(rows, begin, g, terms, from, from_stride, to, to_stride);
    else
      sum_rows<2, 12>(rows, begin, g, terms, from, from_stride, to, to_stride);
    for (; done < blocks * (i + 1) / passes; ++done) slice();
  }
}

}  // namespace
}  // namespace seqmem
