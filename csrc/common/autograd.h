// What every op's autograd room needs. With an op's forward and backward signatures (op.h),
//
//   class ScaledFunction : public torch::autograd::Function<ScaledFunction> {
//     // (a variable_list where there are several outputs)
//     static at::Tensor forward(AutogradContext* ctx, In input, Maybe mask, double scale) {
//       at::AutoDispatchBelowADInplaceOrView guard;
//       auto output = Forward::call(input, mask, scale);
//       ctx->set_materialize_grads(false);
//       ctx->save_for_backward({input, tensor(mask)});
//       note_present(ctx, input, mask, scale);
//       ctx->saved_data["scale"] = scale;
//       return output;
//     }
//     static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
//       const auto saved = ctx->get_saved_variables();
//       const Wanted wanted(ctx);
//       return wanted.list<Forward>(run_backward<Backward>(..., wanted.mask<2>()));
//     }
//   };
//   TORCH_LIBRARY_FRAGMENT(seqmem, m) { differentiate<Forward, ScaledFunction>(m); }
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "op.h"

namespace seqmem {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline OptionalTensor optional(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}
inline at::Tensor tensor(const OptionalTensor& t) { return t.has_value() ? *t : at::Tensor(); }

// An argument's tensor; null where it is absent or no tensor.
template <class Argument>
const at::Tensor* tensor_of(const Argument& argument) {
  if constexpr (std::is_same_v<Argument, at::Tensor> || std::is_same_v<Argument, OptionalTensor>) {
    return address(argument);
  } else {
    return nullptr;
  }
}

template <class Argument, class F>
bool any_of(const Argument& argument, const F& is) {
  if constexpr (std::is_same_v<Argument, OptionalTensor>) {
    return argument.has_value() && is(*argument);
  } else if constexpr (std::is_convertible_v<const Argument&, at::TensorList>) {  // or one tensor
    const at::TensorList tensors = argument;
    return std::any_of(tensors.begin(), tensors.end(), is);
  } else {
    return false;
  }
}

template <class... Args>
bool any_requires_grad(const Args&... args) {
  auto is = [](const at::Tensor& t) { return t.requires_grad(); };
  return at::GradMode::is_enabled() && (any_of(args, is) || ...);
}

// Autograd cannot record these, for they have no sizes; without it, the op refuses them.
template <class... Args>
bool any_nested(const Args&... args) {
  return (any_of(args, [](const at::Tensor& t) { return t.is_nested(); }) || ...);
}

// Backward of backward goes through the dispatcher, where Python differentiates the reference;
// a plain backward goes straight to the kernel.
template <class Op, class... Args>
auto run_backward(const Args&... args) {
  if (at::GradMode::is_enabled()) return Op::call(args...);
  at::AutoDispatchBelowADInplaceOrView guard;
  return Op::call(args...);
}

// Which of a forward's tensors are given, and which of the flags after them are true, for its
// backward: one bit for each argument, by position.
template <class... Args>
void note_present(AutogradContext* ctx, const Args&... args) {
  auto is = [](const auto& argument) {
    if constexpr (std::is_same_v<std::decay_t<decltype(argument)>, bool>) {
      return argument;
    } else {
      return tensor_of(argument) != nullptr;
    }
  };
  int64_t bits = 0, bit = 1;
  ((bits |= is(args) ? bit : 0, bit <<= 1), ...);
  ctx->saved_data["present"] = bits;
}

// Which gradients a backward is asked for, by the position of the forward's arguments. Absent
// optionals take no place among the edges that needs_input_grad counts, so the forward calls
// note_present.
class Wanted {
 public:
  explicit Wanted(AutogradContext* ctx) : ctx_(ctx), present_(ctx->saved_data["present"].toInt()) {}

  bool has(int position) const { return present_ >> position & 1; }
  bool operator()(int position) const {
    if (!has(position)) return false;
    return ctx_->needs_input_grad(__builtin_popcountll(present_ & ((int64_t(1) << position) - 1)));
  }
  at::Tensor operator()(int position, const at::Tensor& gradient) const {
    return (*this)(position) ? gradient : at::Tensor();
  }

  // Of the first n arguments.
  template <size_t n>
  std::array<bool, n> mask() const {
    std::array<bool, n> wanted;
    for (size_t k = 0; k < n; ++k) wanted[k] = (*this)(int(k));
    return wanted;
  }

  // What a Function's backward returns: the gradients of the forward's first arguments that are
  // wanted, and nothing for the rest.
  template <class Forward, class... Gradients>
  variable_list list(const std::tuple<Gradients...>& gradients) const {
    variable_list all(Forward::arguments);
    int k = 0;
    auto put = [&](const at::Tensor& gradient) {
      if ((*this)(k)) all[k] = gradient;
      ++k;
    };
    std::apply([&](const Gradients&... each) { (put(each), ...); }, gradients);
    return all;
  }

 private:
  AutogradContext* ctx_;
  int64_t present_;
};

// For a Function whose first arguments are one list of tensors, all of them given.
inline bool any_wanted(AutogradContext* ctx, int64_t first, int64_t end) {
  for (int64_t i = first; i < end; ++i)
    if (ctx->needs_input_grad(i)) return true;
  return false;
}
// What its backward returns: `gradients` of the list where wanted, nothing for the `rest` of its
// arguments.
inline variable_list only_wanted(AutogradContext* ctx, variable_list gradients, size_t rest) {
  for (size_t i = 0; i < gradients.size(); ++i)
    if (!ctx->needs_input_grad(i)) gradients[i] = at::Tensor();
  gradients.resize(gradients.size() + rest);
  return gradients;
}

// What an op's floating arguments are cast to under autocast: its dtype, as torch does for nn.LSTM.
struct AutocastType {
  template <class... Args>
  at::ScalarType operator()(c10::DeviceType device, const Args&...) const {
    return at::autocast::get_autocast_dtype(device);
  }
};

// For ops of probabilities and losses: float32, as torch's autocast has it for softmax and losses;
// float64 is left alone.
struct Float32 {
  template <class... Args>
  at::ScalarType operator()(c10::DeviceType, const Args&...) const {
    return at::kFloat;
  }
};

template <c10::DeviceType device>
struct Cast {
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  at::Tensor operator()(const at::Tensor& t) const {
    return at::autocast::cached_cast(type, t, device);
  }
  OptionalTensor operator()(const OptionalTensor& t) const {
    return t.has_value() ? OptionalTensor((*this)(*t)) : std::nullopt;
  }
  std::vector<at::Tensor> operator()(at::TensorList tensors) const {
    std::vector<at::Tensor> out;
    for (const at::Tensor& t : tensors) out.push_back((*this)(t));
    return out;
  }
  template <class Other>
  Other operator()(const Other& constant) const {
    return constant;
  }
};

template <class Op>
struct AutogradKeys;
template <const char* name, class Out, class... Args>
struct AutogradKeys<Op<name, Out(Args...)>> {
  using Forward = Op<name, Out(Args...)>;

  template <class Function>
  static Out autograd(Args... args) {
    if (any_requires_grad(args...) && !any_nested(args...)) {
      auto outputs = Function::apply(args...);
      if constexpr (std::is_same_v<Out, at::Tensor>) {
        return outputs;
      } else {
        return as_tuple(outputs, std::make_index_sequence<std::tuple_size_v<Out>>());
      }
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    return Forward::call(args...);
  }

  template <c10::DeviceType device, c10::DispatchKey key, class CastType>
  static Out autocast(Args... args) {
    c10::impl::ExcludeDispatchKeyGuard guard(key);
    const Cast<device> cast{CastType()(device, args...)};
    return Forward::call(cast(args)...);
  }

 private:
  template <size_t... k>
  static Out as_tuple(variable_list& outputs, std::index_sequence<k...>) {
    return {std::move(outputs[k])...};
  }
};

// Registers an op's autocast; CastType()(device, arguments...) is what floating ones are cast to.
template <class Op, class CastType = AutocastType>
void autocast(torch::Library& m) {
  using Keys = AutogradKeys<Op>;
  using c10::DeviceType;
  using c10::DispatchKey;
  auto cpu = Keys::template autocast<DeviceType::CPU, DispatchKey::AutocastCPU, CastType>;
  auto cuda = Keys::template autocast<DeviceType::CUDA, DispatchKey::AutocastCUDA, CastType>;
  m.impl(Op::full_name, torch::dispatch(DispatchKey::AutocastCPU, cpu));
  m.impl(Op::full_name, torch::dispatch(DispatchKey::AutocastCUDA, cuda));
}

// Registers an op's derivative, a torch::autograd::Function of its arguments, and its autocast.
template <class Op, class Function, class CastType = AutocastType>
void differentiate(torch::Library& m) {
  auto autograd = TORCH_FN(AutogradKeys<Op>::template autograd<Function>);
  m.impl(Op::full_name, torch::dispatch(c10::DispatchKey::Autograd, autograd));
  autocast<Op, CastType>(m);
}

}  // namespace seqmem
