// Operands of attention's products, copied into panels that register tiles read in order, for
// kernel sources compiled once per ISA.
#pragma once

#include "gemm.h"
#include "kernel_util.h"

namespace seqmem {
namespace {

// Elements from one score row to the next: whole steps of four vectors, and no power of two, whose
// rows would share cache sets.
template <class C>
SEQMEM_INLINE int64_t score_stride(int64_t Tk) {
  return ceil_div(Tk, 4 * kLanes<C>) * 4 * kLanes<C> + 64 / int64_t(sizeof(C));
}

// to[0..padded(n)-1] = factor * row, zero beyond n.
template <class S, class C = compute_t<S>>
void copy_row(C* to, const S* from, int64_t stride, int64_t n, C factor) {
  constexpr int L = kLanes<C>;
  if (stride == 1 && n >= L) {  // the last vector ends where the row ends
    store(to + padded<C>(n) - L, Vec<C>{});
    for (int64_t i = 0; i + L <= n; i += L) store(to + i, factor * load(from + i));
    store(to + n - L, factor * load(from + n - L));
    return;
  }
  for (int64_t i = 0; i < n; i += L)
    store(to + i, factor * load_strided(from + i * stride, stride,
                                        static_cast<int>(min<int64_t>(n - i, L))));
}

// to[0..n-1] = factor * row.
template <class S, class C = compute_t<S>>
SEQMEM_INLINE void store_scaled(S* to, const C* row, int64_t n, C factor) {
  constexpr int L = kLanes<C>;
  for (int64_t i = 0; i < n; i += L)
    store_n(to + i, factor * load(row + i), static_cast<int>(min<int64_t>(L, n - i)));
}

// A matrix by its strides, or number n of a table of them (Matrices).
template <class S>
struct Rows {
  const S* data;
  int64_t rows, columns;

  Rows(const S* data, int64_t rows, int64_t columns) : data(data), rows(rows), columns(columns) {}
  template <class Matrices>
  Rows(const Matrices& m, int64_t n)
      : data(m.data == nullptr ? nullptr : static_cast<const S*>(m.data) + m.offset[n]),
        rows(m.rows),
        columns(m.columns) {}
  const S* row(int64_t i) const { return data + i * rows; }
};

// Rows one after the other, as copy_row has each.
template <class S, class C = compute_t<S>>
void copy_rows(C* to, const Rows<S>& from, int64_t rows, int64_t width, C factor) {
  for (int64_t i = 0; i < rows; ++i)
    copy_row<S>(to + i * padded<C>(width), from.row(i), from.columns, width, factor);
}

// Rows in SIMD lanes: the panel of rows 4 L p ... is [width][vectors * L], where the last panel has
// as many vectors as it needs; lanes beyond the last row repeat it or are zero.
template <class S, class C = compute_t<S>>
void pack_lanes(C* to, const Rows<S>& m, int64_t rows, int64_t width) {
  constexpr int L = kLanes<C>;
  for (int64_t first = 0; first < rows; first += 4 * L) {
    const int64_t vectors = min<int64_t>(4, ceil_div(rows - first, L)), step = vectors * L;
    for (int64_t v = 0; v < vectors; ++v) {
      C* panel = to + first * width + v * L;
      const int64_t start = first + v * L;
      if (m.columns == 1 && width >= L) {
        const S* from[L];
        SEQMEM_UNROLL
        for (int l = 0; l < L; ++l) from[l] = m.row(min(start + l, rows - 1));
        // The last square ends where the rows end, and overlaps the one before.
        for (int64_t next = 0; next < width; next += L) {
          const int64_t k = min(next, width - L);
          Vec<C> square[L];
          SEQMEM_UNROLL
          for (int l = 0; l < L; ++l) square[l] = load(from[l] + k);
          transpose<C>(square);
          SEQMEM_UNROLL
          for (int i = 0; i < L; ++i) store(panel + (k + i) * step, square[i]);
        }
        continue;
      }
      for (int64_t k = 0; k < width; ++k)
        store(panel + k * step, load_strided(m.row(start) + k * m.columns, m.rows,
                                             static_cast<int>(min<int64_t>(L, rows - start))));
    }
  }
}

// Columns in SIMD lanes: the panel of columns 4 L p ... is [rows][vectors * L].
template <class S, class C = compute_t<S>>
void pack_columns(C* to, const Rows<S>& m, int64_t rows, int64_t width) {
  constexpr int L = kLanes<C>;
  for (int64_t first = 0; first < width; first += 4 * L) {
    const int64_t vectors = min<int64_t>(4, ceil_div(width - first, L));
    C* panel = to + first * rows;
    if (m.columns == 1 && width - first >= 4 * L) {
      for (int64_t r = 0; r < rows; ++r) SEQMEM_UNROLL
      for (int v = 0; v < 4; ++v) store(panel + (r * 4 + v) * L, load(m.row(r) + first + v * L));
      continue;
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t start = first + v * L;
        store(panel + (r * vectors + v) * L,
              load_strided(m.row(r) + start * m.columns, m.columns,
                           static_cast<int>(min<int64_t>(L, width - start))));
      }
  }
}

}  // namespace
}  // namespace seqmem
