// Tensors of heads as kernels take them (heads.h), and results that the next call finds again.
#pragma once

#include <ATen/core/Tensor.h>

#include "heads.h"
#include "kept_blocks.h"
#include "operand.h"
#include "scores.h"

namespace seqmem {

inline Heads heads_of(const OptionalTensor& t) {
  if (!t.has_value() || t->numel() == 0) return {};
  auto stride = [&](int64_t d) { return t->size(d) == 1 ? 0 : t->stride(d); };
  // A single feature is contiguous whatever its stride.
  return {t->const_data_ptr(), stride(0), stride(1), stride(2), t->size(3) == 1 ? 1 : t->stride(3)};
}

// [B] or [B, Tq] of integers, alive as long as this.
class BoundOperand {
 public:
  explicit BoundOperand(const OptionalTensor& t)
      : tensor_(t.has_value() ? t->to(at::kLong).contiguous() : at::Tensor()) {}
  Bounds bounds() const {
    if (!tensor_.defined()) return {};
    const bool each = tensor_.dim() == 2;
    return {tensor_.const_data_ptr<int64_t>(), each ? tensor_.size(1) : 1, each ? 1 : 0};
  }

 private:
  at::Tensor tensor_;
};

template <class Int>
at::Tensor large_result(const at::Tensor& like, std::initializer_list<Int> sizes) {
  if constexpr (std::is_same_v<Int, int64_t>) {
    constexpr int64_t kLarge = 8 << 20;
    return KeptBlocks::empty(sizes, like.options(), kLarge);
  } else {
    return empty_like_of<Int>(like, sizes);
  }
}

// Gradients of q, k and v; empty where not wanted.
inline Tensors<3> large_gradients(const std::array<bool, 3>& wanted, In q, In k, In v) {
  auto make = [&](int n, In like) {
    return wanted[n]
               ? large_result<int64_t>(q, {like.size(0), like.size(1), like.size(2), like.size(3)})
               : at::empty({0}, q.options());
  };
  return {make(0, q), make(1, k), make(2, v)};
}

// Null where there is nothing to write.
inline void* some_data(const at::Tensor& t) { return t.numel() > 0 ? data(t) : nullptr; }

inline Dropout dropout_of(double p, const OptionalTensor& seed) {
  return {p, p > 0 ? static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) : 0};
}

}  // namespace seqmem
