// Products of a tile of queries with keys of which each row sees a range of its own, and the rows
// of scores and weights that belong to it; for kernel sources compiled once per ISA.
#pragma once

#include "heads.h"
#include "packed.h"
#include "past_caches.h"

namespace seqmem {
namespace {

constexpr int64_t kMaxRows = 64;  // queries of a tile
constexpr int64_t kChunk = 128;   // keys whose values stay in the L1 cache

template <class C>
constexpr int64_t kPanel = 4 * kLanes<C>;  // keys of a panel

// Places begin..end-1 of a line.
struct Span {
  int64_t begin, end;
};

// The rows of a tile: row r sees columns lo[r]..hi[r]-1 of `columns`, an empty range where none.
struct Ranges {
  int64_t rows = 0, columns = 0;
  int64_t lo[kMaxRows], hi[kMaxRows];

  Span of(int64_t start, int64_t count) const {  // the union over some rows
    Span all = {columns, 0};
    for (int64_t r = start; r < start + count; ++r)
      if (lo[r] < hi[r]) all = {min(all.begin, lo[r]), max(all.end, hi[r])};
    return all;
  }
};

SEQMEM_INLINE int64_t bound(const Bounds& b, int64_t row, int64_t i, int64_t Tk,
                            int64_t otherwise) {
  if (b.data == nullptr) return otherwise;
  return max<int64_t>(min(b.data[row * b.row + i * b.query], Tk), 0);
}

// f(block, start) for blocks of rows: of one row each where `exact`. Products over a block's union
// of keys multiply keys that a row does not see by zero; where such a key holds NaN or infinity,
// that would reach the row.
template <class C, class F>
SEQMEM_INLINE void for_rows(int64_t rows, bool exact, F&& f) {
  if (exact) {
    for (int64_t r = 0; r < rows; ++r) f(std::integral_constant<int, 1>{}, r);
  } else {
    for_row_blocks<C>(rows, f);
  }
}

// out[r][x] = a[r] . row x of a matrix that pack_lanes has packed, at least where row r sees x;
// `panels` begin at column 0, `packed` of its rows are there.
template <class C>
void multiply_lanes(const Ranges& t, int64_t width, const C* a, int64_t a_stride, const C* panels,
                    int64_t packed, C* out, int64_t out_stride) {
  constexpr int64_t L = kLanes<C>, P = kPanel<C>;
  for (int64_t p = 0; p < t.columns; p += P) {
    const int64_t vectors = min<int64_t>(4, ceil_div(packed - p, L)), step = vectors * L;
    for_row_blocks<C>(t.rows, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      const Span seen = t.of(start, R);
      const int64_t first = max<int64_t>(seen.begin - p, 0) / L;
      const int64_t last = min(ceil_div(seen.end - p, L), vectors);
      if (first >= last) return;
      const C* from[R];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) from[r] = a + (start + r) * a_stride;
      for_count<4>(last - first, [&](auto count) {
        constexpr int V = decltype(count)::value;
        tile_multiply_into<R, V, C>(false, width, from, 1, panels + p * width + first * L, L, step,
                                    out + start * out_stride + p + first * L, out_stride);
      });
    });
  }
}

// out[r] (+)= sum_x a[r][x] b[x] over the columns that a block of rows sees, where column 0 is row
// `at` of the `packed` rows that pack_columns has packed.
template <class C>
void multiply_columns(const Ranges& t, bool exact, bool adds, int64_t width, const C* a,
                      int64_t a_stride, const C* panels, int64_t packed, int64_t at, C* out,
                      int64_t out_stride) {
  constexpr int L = kLanes<C>;
  for (int64_t x = 0; x < max<int64_t>(t.columns, 1); x += kChunk) {
    for_panels(0, width / L, [&](auto vectors, int64_t v) {
      constexpr int V = decltype(vectors)::value;
      const C* panel = panels + v * L * packed + at * V * L;
      for_rows<C>(t.rows, exact, [&](auto block, int64_t start) {
        constexpr int R = decltype(block)::value;
        const Span seen = t.of(start, R);
        const int64_t first = max(seen.begin, x), n = min(seen.end, x + kChunk) - first;
        if (n <= 0 && (adds || x > 0)) return;
        const C* from[R];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) from[r] = a + (start + r) * a_stride + first;
        tile_multiply_into<R, V, C>(adds || x > 0, n, from, 1, panel + first * V * L, L, V * L,
                                    out + start * out_stride + v * L, out_stride);
      });
    });
  }
}

// out[x] += sum_r a[r][x] b[r] for each column x, over the rows that may see it: row r has a zero
// at columns before diagonal + r and after it has seen W. `exact` as for_rows has it.
template <class C>
void multiply_transposed(const Ranges& t, bool exact, int64_t diagonal, int64_t W, int64_t width,
                         const C* a, int64_t a_stride, const C* b, int64_t b_stride, C* out) {
  constexpr int L = kLanes<C>;
  if (exact) {
    for (int64_t r = 0; r < t.rows; ++r)
      if (t.lo[r] < t.hi[r])
        matrix_multiply<true>(t.hi[r] - t.lo[r], 1, width, a + r * a_stride + t.lo[r], a_stride,
                              b + r * b_stride, b_stride, out + t.lo[r] * width, true);
    return;
  }
  const Span seen = t.of(0, t.rows);
  for_panels(0, width / L, [&](auto vectors, int64_t v) {
    constexpr int V = decltype(vectors)::value;
    for_row_blocks<C>(max<int64_t>(seen.end - seen.begin, 0), [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      const int64_t x = seen.begin + start;
      const int64_t first = max<int64_t>(x - diagonal - W + 1, 0);
      const int64_t n = min(t.rows, x + R - diagonal) - first;
      if (n <= 0) return;
      const C* from[R];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) from[r] = a + first * a_stride + x + r;
      tile_multiply_into<R, V, C>(true, n, from, a_stride, b + first * b_stride + v * L, L,
                                  b_stride, out + x * width + v * L, width);
    });
  });
}

// Whether anything among n elements, whole vectors, is NaN or infinite.
template <class C>
bool any_not_finite(const C* x, int64_t n) {
  Vec<C> zeros = {};
  for (int64_t i = 0; i < n; i += kLanes<C>) zeros += load(x + i) * C(0);
  return !(lane_sum<C>(zeros) == C(0));
}

// Sets what lies around a row's range to `value`, to whole vectors; the range in whole vectors.
template <class C>
SEQMEM_INLINE Span close_range(C* row, int64_t lo, int64_t hi, C value) {
  constexpr int64_t L = kLanes<C>;
  const Span whole = {lo / L * L, ceil_div(hi, L) * L};
  for (int64_t x = whole.begin; x < lo; ++x) row[x] = value;
  for (int64_t x = hi; x < whole.end; ++x) row[x] = value;
  return whole;
}

// row = 0 outside lo..hi-1, to the vector's end that holds column `columns` - 1.
template <class C>
SEQMEM_INLINE void clear_outside(C* row, int64_t lo, int64_t hi, int64_t columns) {
  constexpr int64_t L = kLanes<C>;
  if (lo >= hi) {
    for (int64_t x = 0; x < columns; x += L) store(row + x, Vec<C>{});
    return;
  }
  const Span whole = close_range(row, lo, hi, C(0));
  for (int64_t x = 0; x < whole.begin; x += L) store(row + x, Vec<C>{});
  for (int64_t x = whole.end; x < columns; x += L) store(row + x, Vec<C>{});
}

// to[0..width-1] = factor * row from column `first` on, where the row sees lo..hi-1; else zero.
// past_caches: `to` and the width are whole vectors.
template <class S, class C = compute_t<S>>
void write_range(S* to, int64_t width, const C* row, int64_t lo, int64_t hi, int64_t first,
                 C factor, bool past_caches) {
  constexpr int64_t L = kLanes<C>;
  if (past_caches && hi - lo == width) {
    for (int64_t j = 0; j < width; j += L)
      store_past_caches(to + j, factor * load(row + first + j));
    return;
  }
  if (lo >= hi) lo = hi = first;
  const int64_t begin = lo - first, end = hi - first, n = hi - lo;
  __builtin_memset(to, 0, begin * sizeof(S));
  __builtin_memset(to + end, 0, (width - end) * sizeof(S));
  to += begin;
  row += lo;
  for (int64_t j = 0; j + L <= n; j += L) store(to + j, factor * load(row + j));
  if (n % L != 0 && n > L) {
    store(to + n - L, factor * load(row + n - L));
  } else if (n % L != 0) {
    store_n(to, factor * load(row), static_cast<int>(n));
  }
}

// row[lo..hi-1] = the stored weights from[lo - first], ...; zero elsewhere up to `columns`.
template <class S, class C = compute_t<S>>
void read_range(C* row, const S* from, int64_t lo, int64_t hi, int64_t first, int64_t columns) {
  constexpr int64_t L = kLanes<C>;
  from += lo - first;
  int64_t x = lo;
  for (; x + L <= hi; x += L) store(row + x, load(from + x - lo));
  if (x < hi && hi - lo >= L) {
    store(row + hi - L, load(from + hi - lo - L));
  } else {
    for (; x < hi; ++x) row[x] = widen_one(from[x - lo]);
  }
  clear_outside(row, lo, hi, columns);
}

// Rows first, first + dilation, ... of one head.
template <class S>
Rows<S> rows_of(const Heads& t, int64_t row, int64_t head, int64_t first, int64_t dilation) {
  if (t.data == nullptr) return {nullptr, 0, 0};
  return {static_cast<const S*>(t.data) + row * t.row + head * t.head + first * t.step,
          t.step * dilation, t.feature};
}

}  // namespace
}  // namespace seqmem
