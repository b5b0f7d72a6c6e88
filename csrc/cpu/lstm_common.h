// What the LSTM's forward and backward kernels share.
#pragma once

#include "../common/vec_math.h"
#include "lstm_kernel.h"

namespace seqmem {
namespace {

template <class I>
SEQMEM_INLINE I min(I a, I b) {
  return b < a ? b : a;
}
template <class I>
SEQMEM_INLINE I max(I a, I b) {
  return a < b ? b : a;
}
SEQMEM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out 64-byte aligned arrays from one block; with a null block it only counts.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <class X>
  X* array(int64_t count) {
    const int64_t at = used_;
    used_ += (count * static_cast<int64_t>(sizeof(X)) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<X*>(base_ + at);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <class S>
SEQMEM_INLINE void store_row(S* to, const compute_t<S>* from, int64_t n) {
  constexpr int L = kLanes<compute_t<S>>;
  for (int64_t i = 0; i < n; i += L) store_n(to + i, load(from + i), static_cast<int>(n - i));
}

// Calls f with a value of the storage type.
template <class F>
SEQMEM_INLINE int64_t with_storage(lstm::Storage storage, F&& f) {
  switch (storage) {
    case lstm::Storage::Float: return f(float{});
    case lstm::Storage::Double: return f(double{});
    case lstm::Storage::BFloat16: return f(bf16{});
    case lstm::Storage::Half: return f(fp16{});
  }
  return 0;
}

}  // namespace
}  // namespace seqmem

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
