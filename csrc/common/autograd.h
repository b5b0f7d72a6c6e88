// What every op's autograd room needs.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

namespace seqmem {

using OptionalTensor = std::optional<at::Tensor>;

template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline OptionalTensor optional(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}
inline at::Tensor tensor(const OptionalTensor& t) { return t.has_value() ? *t : at::Tensor(); }

template <class... Tensors>
bool any_requires_grad(const Tensors&... tensors) {
  auto one = [](const auto& t) {
    if constexpr (std::is_same_v<std::decay_t<decltype(t)>, at::Tensor>) {
      return t.requires_grad();
    } else {
      return t.has_value() && t->requires_grad();
    }
  };
  return at::GradMode::is_enabled() && (one(tensors) || ...);
}

// Backward of backward goes through the dispatcher, where Python differentiates the reference;
// a plain backward goes straight to the kernel.
template <class Op, class... Args>
auto run_backward(const Op& op, const Args&... args) {
  if (at::GradMode::is_enabled()) return op.call(args...);
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(args...);
}

// Which gradients a backward is asked for, by the position of the forward's tensor arguments.
// Absent optionals take no place among the edges that needs_input_grad counts, so the forward
// leaves a bit mask of the present ones in saved_data["present"].
class Wanted {
 public:
  explicit Wanted(torch::autograd::AutogradContext* ctx)
      : ctx_(ctx), present_(ctx->saved_data["present"].toInt()) {}

  bool has(int position) const { return present_ >> position & 1; }
  bool operator()(int position) const {
    if (!has(position)) return false;
    return ctx_->needs_input_grad(__builtin_popcountll(present_ & ((int64_t(1) << position) - 1)));
  }
  at::Tensor operator()(int position, const at::Tensor& gradient) const {
    return (*this)(position) ? gradient : at::Tensor();
  }

 private:
  torch::autograd::AutogradContext* ctx_;
  int64_t present_;
};

// Everything floating is cast to autocast's dtype, as torch does for nn.LSTM.
template <c10::DeviceType device>
struct Cast {
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  at::Tensor operator()(const at::Tensor& t) const {
    return at::autocast::cached_cast(type, t, device);
  }
  OptionalTensor operator()(const OptionalTensor& t) const {
    return t.has_value() ? OptionalTensor((*this)(*t)) : std::nullopt;
  }
};

}  // namespace seqmem
