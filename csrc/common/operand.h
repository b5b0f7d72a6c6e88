// Between tensors and raw pointers: what an op's CPU and Meta keys share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <initializer_list>
#include <optional>
#include <vector>

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

// Tensors in the kernels' type and contiguous, alive as long as this.
class Operands {
 public:
  explicit Operands(at::ScalarType type) : type_(type) {}
  const void* operator()(const at::Tensor& t) {
    kept_.push_back(t.to(type_).contiguous());
    return kept_.back().const_data_ptr();
  }
  const void* operator()(const OptionalTensor& t) {
    return t.has_value() && t->defined() ? (*this)(*t) : nullptr;
  }
  std::vector<const void*> operator()(at::TensorList tensors) {
    std::vector<const void*> pointers;
    for (const at::Tensor& t : tensors) pointers.push_back((*this)(t));
    return pointers;
  }

 private:
  at::ScalarType type_;
  std::vector<at::Tensor> kept_;
};

template <class Int>
at::Tensor empty_of(const at::TensorOptions& options, c10::ArrayRef<Int> sizes) {
  if constexpr (std::is_same_v<Int, int64_t>) {
    return at::empty(sizes, options);
  } else {
    return at::empty_symint(sizes, options);
  }
}
template <class Int>
at::Tensor empty_of(const at::TensorOptions& options, std::initializer_list<Int> sizes) {
  return empty_of<Int>(options, c10::ArrayRef<Int>(sizes));
}
template <class Int>
at::Tensor empty_like_of(const at::Tensor& like, std::initializer_list<Int> sizes) {
  return empty_of<Int>(like.options(), sizes);
}

}  // namespace seqmem
