// What the LSTM's forward and backward kernels share.
#pragma once

#include "../common/kernel_util.h"
#include "lstm_kernel.h"

namespace seqmem::lstm {
namespace {

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
