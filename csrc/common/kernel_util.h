// Small things that every kernel source needs: dispatch on the storage type, scratch arrays.
#pragma once

#include "storage.h"
#include "vec_math.h"

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
SEQMEM_INLINE int64_t with_storage(Storage storage, F&& f) {
  switch (storage) {
    case Storage::Float: return f(float{});
    case Storage::Double: return f(double{});
    case Storage::BFloat16: return f(bf16{});
    case Storage::Half: return f(fp16{});
  }
  return 0;
}

}  // namespace
}  // namespace seqmem
