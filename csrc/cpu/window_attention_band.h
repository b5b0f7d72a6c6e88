// What window attention's forward and backward share: how a band is cut into tiles, and products
// over the keys that a tile's queries see.
//
// Under a dilation, queries and keys whose positions leave the same remainder see each other alone:
// such a class is an undilated window over every dilation-th query and key, and is treated as one.
#pragma once

#include "../common/dropout.h"
#include "../common/kernel_run.h"
#include "../common/normalizer_rows.h"
#include "window_attention_kernel.h"

namespace seqmem::window_attention {
namespace {

constexpr int64_t kPackedRows = 256;  // queries whose keys are packed at once, or as many as W

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

struct Tile {
  int64_t query;     // the class's query of row 0
  int64_t base;      // its key at column 0
  int64_t diagonal;  // row r's first column of the band; what it sees begins there or later
  Ranges band, global;
};

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

}  // namespace
}  // namespace seqmem::window_attention
