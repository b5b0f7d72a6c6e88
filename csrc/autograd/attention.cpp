// Attention's derivative and autocast.
//
// With W = softmax(S), S = scale Q K^T (+ mask), O = W V and gradients dO, dW of both outputs,
//   dP = dO V^T + dW,   dS = W (dP - rowsum(dP W)), zero where the mask has replaced S,
//   dQ = scale dS K,   dK = scale dS^T Q,   dV = W^T dO,   dmask = dS.
#include <torch/library.h>

#include "../common/autograd.h"

namespace seqmem::attention {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Outputs = std::tuple<Tensor, Tensor>;
using Forward = Outputs(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                        std::optional<double>, bool);
using CheckOnly = void(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                       std::optional<double>, bool);
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = Gradients(const OptionalTensor&, const OptionalTensor&, const Tensor&,
                           const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                           std::optional<double>, bool, std::array<bool, 4>);

const auto& attention() {
  static const auto op = find_op<Forward>("seqmem::attention");
  return op;
}
const auto& check_attention() {
  static const auto op = find_op<CheckOnly>("seqmem::check_attention");
  return op;
}
const auto& attention_backward() {
  static const auto op = find_op<Backward>("seqmem::attention_backward");
  return op;
}

enum Position { kQuery, kKey, kValue, kMask };

class AttentionFunction : public torch::autograd::Function<AttentionFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key,
                               const Tensor& value, const OptionalTensor& mask,
                               std::optional<double> scale, bool is_causal) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, weights] = attention().call(query, key, value, mask, scale, is_causal);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({query, key, value, tensor(mask), weights});
    ctx->saved_data["present"] = int64_t(mask.has_value() ? 15 : 7);
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["is_causal"] = is_causal;
    return {output, weights};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx);
    const std::array<bool, 4> mask = {wanted(kQuery), wanted(kKey), wanted(kValue), wanted(kMask)};
    const auto [grad_query, grad_key, grad_value, grad_mask] = run_backward(
        attention_backward(), optional(grad[0]), optional(grad[1]), saved[0], saved[1], saved[2],
        optional(saved[3]), saved[4], ctx->saved_data["scale"].toOptional<double>(),
        ctx->saved_data["is_causal"].toBool(), mask);
    return {wanted(kQuery, grad_query),
            wanted(kKey, grad_key),
            wanted(kValue, grad_value),
            wanted(kMask, grad_mask),
            Tensor(),
            Tensor()};
  }
};

Outputs attention_autograd(const Tensor& query, const Tensor& key, const Tensor& value,
                           const OptionalTensor& mask, std::optional<double> scale,
                           bool is_causal) {
  if (any_requires_grad(query, key, value, mask)) {
    auto out = AttentionFunction::apply(query, key, value, mask, scale, is_causal);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return attention().call(query, key, value, mask, scale, is_causal);
}

template <c10::DeviceType device, c10::DispatchKey key_set>
Outputs attention_autocast(const Tensor& query, const Tensor& key, const Tensor& value,
                           const OptionalTensor& mask, std::optional<double> scale,
                           bool is_causal) {
  c10::impl::ExcludeDispatchKeyGuard guard(key_set);
  const Cast<device> cast;
  return attention().call(cast(query), cast(key), cast(value), cast(mask), scale, is_causal);
}

template <c10::DeviceType device, c10::DispatchKey key_set>
void check_autocast(const Tensor& query, const Tensor& key, const Tensor& value,
                    const OptionalTensor& mask, std::optional<double> scale, bool is_causal) {
  c10::impl::ExcludeDispatchKeyGuard guard(key_set);
  const Cast<device> cast;
  check_attention().call(cast(query), cast(key), cast(value), cast(mask), scale, is_causal);
}

}  // namespace

TORCH_LIBRARY_IMPL(seqmem, Autograd, m) { m.impl("attention", attention_autograd); }

TORCH_LIBRARY_IMPL(seqmem, AutocastCPU, m) {
  m.impl("attention", attention_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
  m.impl("check_attention", check_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(seqmem, AutocastCUDA, m) {
  m.impl("attention", attention_autocast<c10::DeviceType::CUDA, c10::DispatchKey::Autocast>);
  m.impl("check_attention", check_autocast<c10::DeviceType::CUDA, c10::DispatchKey::Autocast>);
}

}  // namespace seqmem::attention
