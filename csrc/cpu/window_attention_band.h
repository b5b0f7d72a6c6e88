// What window attention's forward and backward share: how a band is cut into tiles, and products
// over the keys that a tile's queries see.
//
// Under a dilation, queries and keys whose positions leave the same remainder see each other alone:
// such a class is an undilated window over every dilation-th query and key, and is treated as one.
#pragma once

#include "../common/entmax_rows.h"
#include "../common/packed.h"
#include "window_attention_kernel.h"

namespace seqmem::window_attention {
namespace {

constexpr int64_t kMaxRows = 64;      // queries of a tile
constexpr int64_t kChunk = 128;       // keys whose values stay in the L1 cache
constexpr int64_t kPackedRows = 256;  // queries whose keys are packed at once, or as many as W

template <class C>
constexpr int64_t kPanel = 4 * kLanes<C>;  // keys of a panel

// Query n of a class is query first_query + n * dilation, key m is key first_key + m * dilation;
// query n stands at key n + ahead.
struct Class {
  int64_t first_query, first_key, queries, keys, ahead;
};

SEQMEM_INLINE int64_t classes(const Shape& s) { return min(s.dilation, s.Tq); }

SEQMEM_INLINE Class class_of(const Shape& s, int64_t first_query) {
  const int64_t position = s.offset + first_query, first_key = position % s.dilation;
  return {first_query, first_key, ceil_div(s.Tq - first_query, s.dilation),
          s.Tk > first_key ? ceil_div(s.Tk - first_key, s.dilation) : 0, position / s.dilation};
}

// Keys begin..end-1 of a class.
struct Span {
  int64_t begin, end;
};

// A class in tiles of R queries, which begin where the band's first key begins a panel.
struct Tiling {
  const Shape& s;
  const Class c;
  const int64_t R, lead;

  Tiling(const Shape& s, const Class& c, int64_t R)
      : s(s), c(c), R(R), lead(((c.ahead - s.left) % R + R) % R) {}
  int64_t tiles() const { return ceil_div(c.queries + lead, R); }
  int64_t begin(int64_t tile) const { return max<int64_t>(tile * R - lead, 0); }
  int64_t end(int64_t tile) const { return min(tile * R + R - lead, c.queries); }

  // Keys that tiles first..last-1 may see, from the begin of a panel on.
  template <class C>
  Span keys(int64_t first, int64_t last) const {
    const int64_t from = max<int64_t>(begin(first) + c.ahead - s.left, 0);
    const int64_t to = min(end(last - 1) + c.ahead + s.right, c.keys);
    return {min(from, c.keys) / kPanel<C> * kPanel<C>, max(to, min(from, c.keys))};
  }
  // Most of them for so many tiles.
  template <class C>
  int64_t most_keys(int64_t count) const {
    return min(count * R + s.left + s.right + kPanel<C>, c.keys + kPanel<C>);
  }
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

struct Tile {
  int64_t query;     // the class's query of row 0
  int64_t base;      // its key at column 0
  int64_t diagonal;  // row r's first column of the band; what it sees begins there or later
  Ranges band, global;
};

SEQMEM_INLINE int64_t bound(const Bounds& b, int64_t row, int64_t i, int64_t Tk,
                            int64_t otherwise) {
  if (b.data == nullptr) return otherwise;
  return max<int64_t>(min(b.data[row * b.row + i * b.query], Tk), 0);
}

template <class C>
void set_tile(Tile& t, const Tiling& tiling, int64_t row, int64_t tile) {
  const Shape& s = tiling.s;
  const Class& c = tiling.c;
  const Span keys = tiling.keys<C>(tile, tile + 1);
  t.query = tiling.begin(tile);
  t.base = keys.begin;
  t.diagonal = t.query + c.ahead - s.left - t.base;
  t.band.rows = t.global.rows = tiling.end(tile) - t.query;
  t.band.columns = keys.end - keys.begin;
  t.global.columns = s.G;
  // The class's first key that is not before key j.
  auto place = [&](int64_t j) {
    return j <= c.first_key ? 0 : ceil_div(j - c.first_key, s.dilation);
  };
  for (int64_t r = 0; r < t.band.rows; ++r) {
    const int64_t i = c.first_query + (t.query + r) * s.dilation;
    const int64_t start = bound(s.start, row, i, s.Tk, 0), end = bound(s.end, row, i, s.Tk, s.Tk);
    const int64_t first = t.diagonal + r;
    t.band.lo[r] = max(max<int64_t>(first, 0), place(max(start, s.G)) - t.base);
    t.band.hi[r] = min(min(first + s.W(), t.band.columns), place(end) - t.base);
    t.global.lo[r] = start;
    t.global.hi[r] = min(end, s.G);
  }
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

// Whether anything among n elements, whole vectors, is NaN or infinite.
template <class C>
bool any_not_finite(const C* x, int64_t n) {
  Vec<C> zeros = {};
  for (int64_t i = 0; i < n; i += kLanes<C>) zeros += load(x + i) * C(0);
  return !(sum<C>(zeros) == C(0));
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

// A task: tiles begin..end-1 of a class of the queries of one head of keys.
struct Task {
  int64_t row, head, first_query, group;
};

SEQMEM_INLINE bool take_task(const Shape& s, const Plan& plan, Task& task) {
  int64_t k = __atomic_fetch_add(&plan.next, 1, __ATOMIC_RELAXED);
  if (k >= s.B * s.Hk * classes(s) * plan.groups) return false;
  task.group = k % plan.groups;
  k /= plan.groups;
  task.first_query = k % classes(s);
  k /= classes(s);
  task.head = k % s.Hk;
  task.row = k / s.Hk;
  return true;
}

SEQMEM_INLINE Span tiles_of(const Tiling& tiling, const Plan& plan, int64_t group) {
  const int64_t tiles = tiling.tiles();
  return {tiles * group / plan.groups, tiles * (group + 1) / plan.groups};
}

// Tiles whose keys are packed at once.
SEQMEM_INLINE int64_t packed_tiles(const Shape& s, int64_t R) {
  return ceil_div(max(kPackedRows, min(s.W(), s.Tk)), R);
}

// Queries of a tile: as many as `most`, but only so many that their rows fit `bytes` of a cache.
template <class C>
int64_t rows_of_tile(const Shape& s, int64_t most, int64_t bytes) {
  const int64_t width = min(s.W(), s.Tk) + s.G;
  int64_t rows = most;
  while (rows > 8 && rows * (width + rows) * int64_t(sizeof(C)) > bytes) rows /= 2;
  return rows;
}

// Rows first, first + dilation, ... of one head.
template <class S>
Rows<S> rows_of(const Heads& t, int64_t row, int64_t head, int64_t first, int64_t dilation) {
  if (t.data == nullptr) return {nullptr, 0, 0};
  return {static_cast<const S*>(t.data) + row * t.row + head * t.head + first * t.step,
          t.step * dilation, t.feature};
}

}  // namespace
}  // namespace seqmem::window_attention
