// A step's rows as left operands of products in bf16: rounded from float32, 32 or 16 at once times
// a panel of 64 columns.
#pragma once

#include "bf16_panels.h"
#include "machine_layout.h"

namespace seqmem::machine {
namespace {

// to[0..whole - 1] = from[0..n - 1], then zeros; `from` may be read up to a whole vector.
SEQMEM_INLINE void round_row(bf16* to, const float* from, int64_t n, int64_t whole) {
  constexpr int L = kLanes<float>;
  int64_t i = 0;
  for (; i < n; i += L) store(to + i, first_lanes(load(from + i), static_cast<int>(n - i)));
  for (; i < whole; i += L) store(to + i, Vec<float>{});
}

// Of the k-th pair of rows of a right operand, a vector of columns from column c on.
SEQMEM_INLINE void store_pair(const Panels& to, int64_t k, int64_t c, Vec<float> even,
                              Vec<float> odd) {
  bf16* tile = to.tile(c / kPanel, k / kBlock, static_cast<int>(c % kPanel / kBlock));
  const UintVec pairs = pairs_of(even, odd);
  __builtin_memcpy(tile + k % kBlock * kDepth + c % kBlock * 2, &pairs, sizeof pairs);
}

class RowsInBf16 {
  static constexpr int L = kLanes<float>;
  const int64_t rows, stride;
  bf16* left;      // [rows + 16][stride]
  float* staging;  // [32 rows][64]

 public:
  // For at most `most_rows` rows of `most_values` values.
  RowsInBf16(int64_t most_rows, int64_t most_values)
      : rows(most_rows), stride(ceil_div(most_values, kDepth) * kDepth) {}

  void place(Carver& take) {
    left = take.array<bf16>((rows + kBlock) * stride);
    staging = take.array<float>(kMostRows * kPanel);
  }

  // Calls leave(panel, first row, rows, sums [rows][64]) for each of `count` panels, with
  // sums = start + a[r] panel; `start` [64 a panel], or null for zero.
  template <class Leave>
  void multiply(int64_t n, const float* const* a, int64_t K, const Panels& panels, int64_t count,
                const float* start, const Leave& leave) {
    for (int64_t r = 0; r < n; ++r) round_row(left + r * stride, a[r], K, panels.depth * kDepth);
    configure(n);
    for (int64_t p = 0; p < count; ++p)
      for (int64_t first = 0; first < n;) {
        const RowGroup g = row_group(first, n, panels.wide);
        sum_products(g, {{panels, p, left, stride, panels.depth}},
                     start == nullptr ? nullptr : start + p * kPanel, 0, staging, kPanel, kNothing);
        leave(p, g.first, g.count, staging + (g.first - g.block[0]) * kPanel);
        first += g.count;
      }
    tiles_release();
  }

  // The same to result[r], `vectors` of them.
  void multiply_to(int64_t n, const float* const* a, int64_t K, const Panels& panels,
                   int64_t vectors, const float* start, float* const* result) {
    multiply(n, a, K, panels, ceil_div(vectors * L, kPanel), start,
             [&](int64_t p, int64_t first, int64_t count, const float* sums) {
               const int64_t width = min<int64_t>(kPanel, vectors * L - p * kPanel);
               for (int64_t r = 0; r < count; ++r)
                 copy(sums + r * kPanel, result[first + r] + p * kPanel, width);
             });
  }

  // Fills block `column`, 16 outputs, of a panel: line(i, to) writes output i's weights, zeros up
  // to whole blocks of 32.
  template <class Line>
  void pack_columns(const Panels& to, int64_t panel, int column, const Line& line) {
    for (int i = 0; i < kBlock; ++i) line(i, left + i * stride);
    for (int64_t k = 0; k < to.depth; ++k) {
      alignas(64) float square[kBlock][kBlock];
      for (int i = 0; i < kBlock; ++i)
        __builtin_memcpy(square[i], left + i * stride + k * kDepth, sizeof square[i]);
      transpose_tile(square, reinterpret_cast<float*>(to.tile(panel, k, column)), kBlock);
    }
  }
};

}  // namespace
}  // namespace seqmem::machine
