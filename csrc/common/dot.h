// A product with a transposed matrix that is not packed, for kernel sources compiled once per ISA.
#pragma once

#include "gemm.h"
#include "kernel_util.h"

namespace seqmem {
namespace {

// out[r][w] (+)= sum_k a[r][k] * b[w][k], where b is not packed: for few rows.
template <class C, class S>
__attribute__((noinline)) void dot(int64_t rows, int64_t columns, int64_t K, const C* a,
                                   int64_t a_row, const S* b, int64_t b_row, C* out,
                                   int64_t out_row, bool accumulate) {
  for_row_blocks<C>(rows, [&](auto block, int64_t start) {
    constexpr int R = decltype(block)::value;
    constexpr int Q = R == 1 ? 2 : 1;  // fours of columns: one row needs more sums in flight
    const C* row[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) row[r] = a + (start + r) * a_row;
    for (int64_t w = 0; w < columns; w += 4 * Q) {
      const S* column[4 * Q];
      SEQMEM_UNROLL
      for (int i = 0; i < 4 * Q; ++i) column[i] = b + min(w + i, columns - 1) * b_row;
      Vec<C> sums[R][4 * Q];
      start_sums(sums);
      tile_dot<R, 4 * Q, C, S>(K, row, column, sums);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int q = 0; q < Q; ++q) {
        C four[4];
        const Vec<C> parts[4] = {sums[r][4 * q], sums[r][4 * q + 1], sums[r][4 * q + 2],
                                 sums[r][4 * q + 3]};
        store_sums4<C>(four, parts);
        C* to = out + (start + r) * out_row + w + 4 * q;
        for (int i = 0; i < 4 && w + 4 * q + i < columns; ++i)
          to[i] = accumulate ? to[i] + four[i] : four[i];
      }
    }
  });
}

}  // namespace
}  // namespace seqmem
