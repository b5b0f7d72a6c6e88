// What the LSTM's forward and backward kernels share.
#pragma once

#include "../common/gemm.h"
#include "../common/kernel_run.h"
#include "../common/kernel_util.h"
#include "lstm_kernel.h"

namespace seqmem::lstm {
namespace {

// Row r of an optional tensor, or null.
template <class S>
SEQMEM_INLINE const S* optional_row(const void* base, int64_t r, int64_t width) {
  return base == nullptr ? nullptr : static_cast<const S*>(base) + r * width;
}

// The rows of one thread, and their positions in memory.
struct Walk : ThreadOf<Shape, Plan> {
  const int64_t row_begin = plan.by_rows ? thread : 0, row_step = plan.by_rows ? threads : 1;
  const int64_t most_rows = plan.by_rows ? ceil_div(s.B, threads) : s.B;

  // Which of `units` vectors or blocks of units it computes.
  Share units_of(int64_t units) const {
    return plan.by_rows ? Share{0, units} : share(units, thread, threads);
  }
  // Where threads share units each waits for what the others have computed.
  void meet() const {
    if (!plan.by_rows) barrier.wait();
  }

  int64_t time_of(int64_t step) const { return s.reverse ? s.T - 1 - step : step; }
  int64_t row(int64_t j) const { return row_begin + j * row_step; }
  int64_t index(int64_t t, int64_t r) const { return s.step_row[t] + s.order[r] * s.row_stride; }
  // How many of this thread's rows are active at time t.
  int64_t active(int64_t t) const {
    const int64_t n = s.active[t] - row_begin;
    return n <= 0 ? 0 : ceil_div(n, row_step);
  }

  // Row r's state before time t: in the sequence tensor, or the initial one (null if zero).
  template <class S>
  const S* previous(const void* sequence, const void* initial, int64_t t, int64_t r,
                    int64_t width) const {
    const bool begins = s.reverse ? r >= s.active[t + 1] : t == 0;
    if (begins) return optional_row<S>(initial, s.order[r], width);
    return static_cast<const S*>(sequence) + index(s.reverse ? t + 1 : t - 1, r) * width;
  }
};

// to[0..padded(n)-1] = from[0..n-1], then zeros; all zeros where from is null.
template <class S>
SEQMEM_INLINE void load_row_or_zero(compute_t<S>* to, const S* from, int64_t n) {
  using C = compute_t<S>;
  for (int64_t i = 0; i < n; i += kLanes<C>)
    store(to + i, from == nullptr ? Vec<C>{} : load_n(from + i, static_cast<int>(n - i)));
}

// The i-th of n blocks, from the other end at every second step: a pass over weights that are too
// large for a cache then begins with those that the step before left in it.
SEQMEM_INLINE int64_t zigzag(int64_t step, int64_t i, int64_t n) {
  return step & 1 ? n - 1 - i : i;
}

// Whether row r's state is zeroed before it enters time t. A reset at t cuts the link between
// t-1 and t, whichever way time runs.
SEQMEM_INLINE bool is_cut(const Shape& s, int64_t t, int64_t r) {
  if (s.reset == nullptr) return false;
  if (!s.reverse) return s.reset[s.step_row[t] + s.order[r] * s.row_stride];
  return r < s.active[t + 1] && s.reset[s.step_row[t + 1] + s.order[r] * s.row_stride];
}

// Whether time t is the last that row r goes through.
SEQMEM_INLINE bool is_last(const Shape& s, int64_t t, int64_t r) {
  return s.reverse ? t == 0 : r >= s.active[t + 1];
}

}  // namespace
}  // namespace seqmem::lstm
