// Rows of scores to weights and back, by any normaliser, where a row sees a range of columns; for
// kernel sources compiled once per ISA.
#pragma once

#include "entmax_rows.h"
#include "exponentials.h"
#include "seen_keys.h"

namespace seqmem {
namespace {

template <class C>
C highest(const C* row, Span span) {
  constexpr int64_t L = kLanes<C>;
  Vec<C> top[4];
  for (int v = 0; v < 4; ++v) top[v] = splat(-kInfinity<C>);
  int64_t x = span.begin;
  auto step = [&](int v) { top[v] = entmax::larger<C>(load(row + x + v * L), top[v]); };
  for (; x + 4 * L <= span.end; x += 4 * L) SEQMEM_UNROLL
  for (int v = 0; v < 4; ++v) step(v);
  for (; x < span.end; x += L) step(0);
  for (int v = 1; v < 4; ++v) top[0] = entmax::larger<C>(top[v], top[0]);
  return largest_lane<C>(top[0]);
}

// softmax of n > 0 scores, in place; zero from there on to whole vectors.
template <class C>
void softmax_row(C* row, int64_t n) {
  constexpr int64_t L = kLanes<C>;
  if (n <= L) {  // in registers: such a row's time is in its loads and stores
    Vec<C> x[1] = {lane_numbers<C>() < static_cast<int>(n) ? load(row) : splat(-kInfinity<C>)};
    to_exponentials<C>(x, largest_lane<C>(entmax::larger<C>(x[0], splat(-kInfinity<C>))));
    store(row, x[0] * (C(1) / lane_sum<C>(x[0])));
    return;
  }
  const Span all = close_range(row, 0, n, -kInfinity<C>);
  const C inverse = C(1) / exponentials<C>(row, all.end, highest(row, all));
  for (int64_t x = 0; x < n; x += L) store(row + x, inverse * load(row + x));
}

// Columns of a line for entmax_row, whole vectors of any type, and the bytes of its buffer.
SEQMEM_INLINE int64_t longest_line(int64_t columns) { return ceil_div(columns, 64) * 64; }
SEQMEM_INLINE int64_t line_bytes(int64_t columns) {
  return 2 * longest_line(columns) * int64_t(sizeof(double));
}

// What f returns of the rows that compute entmax of n scores of the at most `columns` of a row.
template <class C, class F>
SEQMEM_INLINE int64_t with_entmax(int64_t n, double alpha, char* buffer, int64_t columns, F&& f) {
  const int64_t bytes = line_bytes(columns) / 2;
  if (alpha < entmax::kSteep)
    return f(entmax::Rows<C, entmax::Kind::Any, double>(n, buffer, bytes));
  return entmax::with_kind(
      nullptr, alpha, [&](auto kind) { return f(entmax::Rows<C, kind, C>(n, buffer, bytes)); });
}

// n scores -> their weights by entmax, in place; returns how many are not zero.
template <class C>
int64_t entmax_row(C* row, int64_t n, double alpha, char* buffer, int64_t columns) {
  if (n == 0) return 0;
  return with_entmax<C>(n, alpha, buffer, columns,
                        [&](auto rows) { return rows.forward(row, row, alpha); });
}

// The same of a row that is -inf from n on to whole vectors; `top` is the highest of its scores
// that are not NaN.
template <class C>
int64_t entmax_row(C* row, int64_t n, C top, double alpha, char* buffer, int64_t columns) {
  return with_entmax<C>(n, alpha, buffer, columns,
                        [&](auto rows) { return rows.in_place(row, top, alpha); });
}

// Of the vectors that hold columns lo..hi-1, as all below: weights -> weights^(2 - alpha) where not
// zero; their sum.
template <class C>
C to_slopes(C* row, int64_t lo, int64_t hi, double alpha) {
  return entmax::with_kind(nullptr, alpha, [&](auto kind) {
    constexpr int64_t L = kLanes<C>;
    Vec<C> total = {};
    for (int64_t x = lo / L * L; x < hi; x += L) {
      const Vec<C> slope = entmax::Rows<C, kind>::slopes(load(row + x), C(2 - alpha));
      store(row + x, slope);
      total += slope;
    }
    return lane_sum<C>(total);
  });
}

// sum of slope * weight.
template <class C>
C dot_of(const C* slope, const C* weight, int64_t lo, int64_t hi) {
  constexpr int64_t L = kLanes<C>;
  Vec<C> total[4] = {};
  int64_t x = lo / L * L;
  for (; x + 4 * L <= hi; x += 4 * L) SEQMEM_UNROLL
  for (int v = 0; v < 4; ++v) total[v] += load(slope + x + v * L) * load(weight + x + v * L);
  for (; x < hi; x += L) total[0] += load(slope + x) * load(weight + x);
  return lane_sum<C>((total[0] + total[1]) + (total[2] + total[3]));
}

// slope = weight (slope - mean), zero in the other columns.
template <class C>
void scale_slopes(C* slope, const C* weight, int64_t lo, int64_t hi, C mean, int64_t columns) {
  constexpr int64_t L = kLanes<C>;
  for (int64_t x = lo / L * L; x < hi; x += L)
    store(slope + x, load(weight + x) * (load(slope + x) - mean));
  clear_outside(slope, lo, hi, columns);
}

}  // namespace
}  // namespace seqmem
