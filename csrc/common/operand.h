// Between tensors and raw pointers: what an op's CPU and Meta keys share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <tuple>

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

// Where no kernel exists (sparse, quantized, other devices): the error of the op's own check,
// which takes the same arguments, or a plain one.
template <const char* op, auto check_op, class Out>
struct Unsupported;
template <const char* op, class Out, class... Args, void (*check_op)(Args...)>
struct Unsupported<op, check_op, Out> {
  static Out call(Args... args) {
    check_op(args...);
    const at::Tensor& first = std::get<0>(std::tie(args...));
    TORCH_CHECK_TYPE(false, op, ": expected tensors on cpu, cuda or meta, got ", first.device(),
                     " (layout ", first.layout(), ")");
  }
};

}  // namespace seqmem
