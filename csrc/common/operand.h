// Between tensors and raw pointers: what an op's CPU and Meta keys share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <initializer_list>
#include <optional>

#include "op.h"
#include "storage.h"

namespace seqmem {

inline Storage storage_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return Storage::Double;
    case at::kBFloat16: return Storage::BFloat16;
    case at::kHalf: return Storage::Half;
    default: return Storage::Float;
  }
}

inline const void* const_data(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr() : nullptr;
}
inline void* data(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// Contiguous and alive as long as the call; null where absent.
class Operand {
 public:
  explicit Operand(const at::Tensor& t) : tensor_(t.expect_contiguous()) {}
  explicit Operand(const OptionalTensor& t)
      : tensor_(t.has_value() && t->defined() ? t->expect_contiguous()
                                              : c10::MaybeOwned<at::Tensor>::owned(at::Tensor())) {}
  const void* data() const { return const_data(*tensor_); }

 private:
  c10::MaybeOwned<at::Tensor> tensor_;
};

template <class Int>
at::Tensor empty_of(const at::TensorOptions& options, std::initializer_list<Int> sizes) {
  if constexpr (std::is_same_v<Int, int64_t>) {
    return at::empty(at::IntArrayRef(sizes), options);
  } else {
    return at::empty_symint(c10::SymIntArrayRef(sizes), options);
  }
}
template <class Int>
at::Tensor empty_like_of(const at::Tensor& like, std::initializer_list<Int> sizes) {
  return empty_of<Int>(like.options(), sizes);
}

}  // namespace seqmem
