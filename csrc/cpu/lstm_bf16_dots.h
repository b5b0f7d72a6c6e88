// The products of the LSTM's kernels in bf16 on vectors of dot products (AVX512-BF16), with the
// names and the weights' layout of lstm_bf16_tiles.h. Sums of up to 32 rows by 64 columns (wide) or
// 32 (not wide) stay in L1; 24 vectors of them at a time are in registers while k runs.
//
// A sum runs over k in one order whatever the shape, so bits do not depend on it.
#pragma once

#include "../common/bf16_dot.h"
#include "lstm_bf16_blocks.h"

namespace seqmem::lstm {
namespace {

// Rows are not bound to a tile's 16, so that a panel of 64 columns always serves.
SEQMEM_INLINE bool is_wide(int64_t) { return true; }
SEQMEM_INLINE void tiles_configure(int) {}
SEQMEM_INLINE void tiles_release() {}
SEQMEM_INLINE void tiles_fence() {}

// Up to 24 rows, in one block: four passes of six over a panel, which L1 holds half of.
struct RowGroup {
  int64_t first, count;
  int64_t block[2];
  bool two;
};
SEQMEM_INLINE RowGroup row_group(int64_t first, int64_t rows, bool) {
  return {first, min<int64_t>(24, rows - first), {first, first}, false};
}

thread_local Vec<float> dot_sums[2 * kBlock][kPanel / kLanes<float>];

SEQMEM_INLINE void clear_sums() { __builtin_memset(dot_sums, 0, sizeof dot_sums); }
SEQMEM_INLINE void load_sums(const RowGroup& g, bool wide, int half, const float* p,
                             int64_t stride) {
  p += half * 2 * kBlock;
  for (int64_t r = 0; r < g.count; ++r)
    __builtin_memcpy(dot_sums[r], p + r * stride, (wide ? 4 : 2) * kBlock * sizeof(float));
}
SEQMEM_INLINE void store_sums(const RowGroup& g, bool wide, int half, float* p, int64_t stride) {
  p += half * 2 * kBlock;
  for (int64_t r = 0; r < g.count; ++r)
    __builtin_memcpy(p + r * stride, dot_sums[r], (wide ? 4 : 2) * kBlock * sizeof(float));
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
      run<4>(tile(panel, 0, 0), g.count, left, stride, slice);
    else
      run<2>(tile(panel, 0, 2 * half), g.count, left, stride, slice);
  }

 private:
  template <int columns, class Slice>
  SEQMEM_INLINE void run(const bf16* w, int64_t rows, const bf16* left, int64_t stride,
                         const Slice& slice) const {
    constexpr int kMost = 24 / columns;
    const int64_t passes = ceil_div(rows, kMost);
    int64_t done = 0;
    for (int64_t i = 0; i < passes; ++i) {
      const int64_t begin = rows * i / passes, end = rows * (i + 1) / passes;
      run_rows<columns, kMost>(end - begin, left + begin * stride, stride, w, dot_sums + begin);
      for (; done < depth * (i + 1) / passes; ++done) slice();
    }
  }

  template <int columns, int R>
  void run_rows(int64_t rows, const bf16* left, int64_t stride, const bf16* w,
                Vec<float> (*sums)[kPanel / kLanes<float>]) const {
    if constexpr (R > 1)
      if (rows < R) return run_rows<columns, R - 1>(rows, left, stride, w, sums);
    // Of each block of columns one vector at a time: all 16 of them where vectors are that long.
    constexpr int L = kLanes<float>, kVectors = kBlock / L;
    for (int part = 0; part < kVectors; ++part) {
      Vec<float> acc[R][columns];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int v = 0; v < columns; ++v) acc[r][v] = sums[r][v * kVectors + part];
      const bf16 *a = left, *b = w + 2 * part * L;
      for (int64_t k = 0; k < depth; ++k, a += kDepth, b += columns * kTile)
        multiply_pairs(kDepth / 2, a, stride, b, kTile, kDepth, acc);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int v = 0; v < columns; ++v) sums[r][v * kVectors + part] = acc[r][v];
    }
  }
};

}  // namespace
}  // namespace seqmem::lstm
