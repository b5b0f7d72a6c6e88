// Operands of attention's products in bf16: rows on the left, matrices in panels on the right.
#pragma once

#include "../common/bf16_panels.h"
#include "attention_common.h"

namespace seqmem::attention {
namespace {

// `count` elements of a row from `first` on, in one piece: where they are, or in `buffer`.
SEQMEM_INLINE const bf16* in_one_piece(const Rows<bf16>& m, int64_t row, int64_t first,
                                       int64_t count, bf16* buffer) {
  const bf16* from = m.row(row) + first * m.columns;
  if (m.columns == 1) return from;
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i * m.columns];
  return buffer;
}

// A left operand: rows first.. of m, `width` elements each, then zeros up to `whole`.
SEQMEM_INLINE void copy_left(bf16* to, int64_t stride, const Rows<bf16>& m, int64_t first,
                             int64_t rows, int64_t width, int64_t whole) {
  for (int64_t r = 0; r < rows; ++r, to += stride) {
    const bf16* from = in_one_piece(m, first + r, 0, width, to);
    if (from != to) __builtin_memcpy(to, from, width * sizeof *to);
    __builtin_memset(static_cast<void*>(to + width), 0, (whole - width) * sizeof *to);
  }
}

// The right operand of x m^T: m's rows are its columns, their elements transposed by pairs.
inline void pack_as_columns(const Panels& to, const Rows<bf16>& m, int64_t rows, int64_t width) {
  for (int64_t j = 0; j < ceil_div(rows, kPanel) * kPanel; j += kBlock)
    for (int64_t k = 0; k < to.depth; ++k) {
      alignas(64) float square[kBlock][kBlock] = {};
      bf16 buffer[kDepth];
      const int64_t n = min<int64_t>(kDepth, width - k * kDepth);
      for (int64_t i = 0; i < min<int64_t>(kBlock, rows - j); ++i)
        __builtin_memcpy(square[i], in_one_piece(m, j + i, k * kDepth, n, buffer),
                         n * sizeof *buffer);
      bf16* tile = to.tile(j / kPanel, k, static_cast<int>(j % kPanel / kBlock));
      transpose_tile(square, reinterpret_cast<float*>(tile), kBlock);
    }
}

// The right operand of x m: pairs of m's rows.
inline void pack_as_rows(const Panels& to, const Rows<bf16>& m, int64_t rows, int64_t width,
                         int64_t panels) {
  bf16 buffers[2][kBlock];
  for (int64_t j = 0; j < panels * kPanel; j += kBlock)
    for (int64_t k = 0; k < to.depth; ++k) {
      bf16* tile = to.tile(j / kPanel, k, static_cast<int>(j % kPanel / kBlock));
      const int64_t n = min<int64_t>(kBlock, width - j);
      const auto row = [&](int64_t i) {
        return i < rows && n > 0 ? in_one_piece(m, i, j, n, buffers[i % 2]) : nullptr;
      };
      for (int i = 0; i < kBlock; ++i)
        store_pairs(tile + i * kDepth, row(k * kDepth + 2 * i), row(k * kDepth + 2 * i + 1), n);
    }
}

}  // namespace
}  // namespace seqmem::attention
