// Products by panels on vectors of dot products (AVX512-BF16), with the names and the layout of
// bf16_panels_on_tiles.h. 24 vectors of sums are in registers while k runs, of 64 columns (wide) or
// 32; between calls sums of up to 32 rows stay in L1.
//
// A sum runs over k in one order whatever the shape, so bits do not depend on it.
#pragma once

#include "bf16_blocks.h"
#include "bf16_dot.h"

namespace seqmem {
namespace {

// Rows are not bound to a tile's 16, so that a panel of 64 columns always serves.
SEQMEM_INLINE bool is_wide(int64_t) { return true; }
SEQMEM_INLINE void tiles_configure(int) {}
SEQMEM_INLINE void tiles_release() {}
SEQMEM_INLINE void tiles_fence() {}

// Up to 32 rows, in one block: passes of six at most over a panel, which L1 holds half of.
constexpr int64_t kMostRows = 32;
struct RowGroup {
  int64_t first, count;
  int64_t block[2];
  bool two;
};
SEQMEM_INLINE RowGroup row_group(int64_t first, int64_t rows, bool) {
  return {first, min(kMostRows, rows - first), {first, first}, false};
}

alignas(64) thread_local float dot_sums[2 * kBlock * kPanel];

SEQMEM_INLINE void clear_sums() { __builtin_memset(dot_sums, 0, sizeof dot_sums); }
SEQMEM_INLINE void load_sums(const RowGroup& g, bool wide, int half, const float* p,
                             int64_t stride) {
  p += half * 2 * kBlock;
  for (int64_t r = 0; r < g.count; ++r)
    __builtin_memcpy(dot_sums + r * kPanel, p + r * stride, (wide ? 4 : 2) * kBlock * sizeof *p);
}
SEQMEM_INLINE void store_sums(const RowGroup& g, bool wide, int half, float* p, int64_t stride) {
  p += half * 2 * kBlock;
  for (int64_t r = 0; r < g.count; ++r)
    __builtin_memcpy(p + r * stride, dot_sums + r * kPanel, (wide ? 4 : 2) * kBlock * sizeof *p);
}

// A right operand in panels of 64 columns: wide [panel][k][4 blocks], else [panel][half][k][2
// blocks].
class Panels {
 public:
  bf16* data;
  int64_t depth;  // blocks of k
  bool wide;

  bf16* tile(int64_t panel, int64_t k, int column) const {
    if (wide) return data + ((panel * depth + k) * 4 + column) * kTile;
    return data + (((panel * 2 + column / 2) * depth + k) * 2 + column % 2) * kTile;
  }

  // The sums += the group's rows of `left` times a panel or a half of it. Calls slice() once a k.
  template <class Slice>
  SEQMEM_INLINE void multiply(int64_t panel, int half, const RowGroup& g, const bf16* left,
                              int64_t stride, const Slice& slice) const {
    left += g.block[0] * stride;
    if (wide)
      run<4, true>(tile(panel, 0, 0), depth, g.count, left, stride, dot_sums, kPanel, slice);
    else
      run<2, true>(tile(panel, 0, 2 * half), depth, g.count, left, stride, dot_sums, kPanel, slice);
  }

  // to [the group's rows][64] = its rows of `left` times the first `blocks` blocks of a panel,
  // wide.
  template <class Slice>
  SEQMEM_INLINE void multiply_into(int64_t panel, const RowGroup& g, const bf16* left,
                                   int64_t stride, int64_t blocks, float* to, int64_t to_stride,
                                   const Slice& slice) const {
    run<4, false>(tile(panel, 0, 0), blocks, g.count, left + g.block[0] * stride, stride, to,
                  to_stride, slice);
  }

  // The same added to what stands there.
  SEQMEM_INLINE void multiply_onto(int64_t panel, const RowGroup& g, const bf16* left,
                                   int64_t stride, int64_t blocks, float* to,
                                   int64_t to_stride) const {
    run<4, true>(tile(panel, 0, 0), blocks, g.count, left + g.block[0] * stride, stride, to,
                 to_stride, [] {});
  }

 private:
  template <int columns, bool adds, class Slice>
  SEQMEM_INLINE void run(const bf16* w, int64_t blocks, int64_t rows, const bf16* left,
                         int64_t stride, float* sums, int64_t sums_stride,
                         const Slice& slice) const {
    constexpr int kMost = 24 / columns;
    const int64_t passes = ceil_div(rows, kMost);
    int64_t done = 0;
    for (int64_t i = 0; i < passes; ++i) {
      const int64_t begin = rows * i / passes, end = rows * (i + 1) / passes;
      run_rows<columns, adds, kMost>(end - begin, w, blocks, left + begin * stride, stride,
                                     sums + begin * sums_stride, sums_stride);
      for (; done < blocks * (i + 1) / passes; ++done) slice();
    }
  }

  template <int columns, bool adds, int R>
  static void run_rows(int64_t rows, const bf16* w, int64_t blocks, const bf16* left,
                       int64_t stride, float* sums, int64_t sums_stride) {
    if constexpr (R > 1)
      if (rows < R)
        return run_rows<columns, adds, R - 1>(rows, w, blocks, left, stride, sums, sums_stride);
    // Of each block of columns one vector at a time: all 16 of them where vectors are that long.
    constexpr int L = kLanes<float>;
    for (int part = 0; part < kBlock; part += L) {
      Vec<float> acc[R][columns];
      start_sums(acc);
      if constexpr (adds) SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int v = 0; v < columns; ++v)
        acc[r][v] = load(sums + r * sums_stride + v * kBlock + part);
      const bf16 *a = left, *b = w + 2 * part;
      for (int64_t k = 0; k < blocks; ++k, a += kDepth, b += columns * kTile)
        multiply_pairs(kDepth / 2, a, stride, b, kTile, kDepth, acc);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int v = 0; v < columns; ++v)
        store(sums + r * sums_stride + v * kBlock + part, acc[r][v]);
    }
  }
};

}  // namespace
}  // namespace seqmem
