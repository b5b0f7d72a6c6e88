// Products by panels on tiles (AMX). Four tiles of sums are in use at once:
//
//   wide   16 rows by four tiles of columns    up to 16 rows: each weight is read once
//   tall   32 rows by two tiles, twice         more rows: half the loads a product
//
// A sum runs over k in one order whatever the shape, so bits do not depend on it.
#pragma once

#include "bf16_blocks.h"
#include "tiles.h"

namespace seqmem {
namespace {

// Whether a call with at most so many rows a thread is wide.
SEQMEM_INLINE bool is_wide(int64_t rows) { return rows <= kBlock; }

// Rows of sums that are added to again: no group's last block may reach back into another one.
SEQMEM_INLINE int64_t whole_blocks(int64_t rows) { return ceil_div(rows, kBlock) * kBlock; }

// Up to 32 rows: one or two blocks of 16. The last block is moved back rather than cut, so that it
// reads no foreign row; where there are fewer than 16 rows in all, tiles read beyond the last.
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

// The tiles of sums += rows of the term's `left`, from the group's blocks on, times its panel or a
// half of it. Calls slice() after each block of k.
template <int columns, int row_blocks, class Slice>
SEQMEM_INLINE void add_term(const Term& term, int half, const RowGroup& g, const Slice& slice) {
  const bf16* a = term.left + g.block[0] * term.stride;
  const bf16* b = term.left + g.block[1] * term.stride;
  const bf16* w = term.panels.tile(term.panel, 0, 2 * half);
  for (int64_t k = 0; k < term.blocks; ++k, a += kDepth, b += kDepth, w += columns * kTile) {
    tile_load<4>(a, term.stride * 2);
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
    if constexpr (row_blocks == 2) {
      tile_load<5>(b, term.stride * 2);
      tile_product<2, 5, 6>();
      tile_product<3, 5, 7>();
    }
    slice();
  }
}

// to [rows from the group's first block on][64, or 32 of panels of one half] = from + the terms;
// zero for a null `from`. Calls slice() after each block of k.
template <int n, class Slice>
SEQMEM_INLINE void sum_products(const RowGroup& g, const Term (&terms)[n], const float* from,
                                int64_t from_stride, float* to, int64_t to_stride,
                                const Slice& slice) {
  const bool wide = terms[0].panels.wide;
  for (int half = 0; half < (wide ? 1 : terms[0].panels.halves); ++half) {
    if (from == nullptr)
      clear_sums();
    else
      load_sums(g, wide, half, from, from_stride);
    for (const Term& term : terms) {
      if (wide)
        add_term<4, 1>(term, half, g, slice);
      else if (g.two)
        add_term<2, 2>(term, half, g, slice);
      else
        add_term<2, 1>(term, half, g, slice);
    }
    store_sums(g, wide, half, to, to_stride);
  }
}

}  // namespace
}  // namespace seqmem
