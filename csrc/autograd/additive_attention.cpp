// Additive attention's derivative and autocast.
//
// With t_ija = tanh(q_ia + k_ja), e = t v (+ mask), W = softmax(e), O = W V and the gradients dO
// and dW of both outputs,
//   dP = dO V^T + dW,   de = W (dP - rowsum(W dP)), zero where the mask has replaced e,
//   dq_ia = v_a sum_j de_ij (1 - t_ija^2),   dk_ja = v_a sum_i de_ij (1 - t_ija^2),
//   dv_a = sum_ij de_ij t_ija,   dV = W^T dO,   dmask = de.
#include <torch/library.h>

#include "../common/autograd.h"

namespace seqmem::additive_attention {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Outputs = std::tuple<Tensor, Tensor>;
using Forward = Outputs(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const OptionalTensor&);
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = Gradients(const OptionalTensor&, const OptionalTensor&, const Tensor&,
                           const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                           const Tensor&, std::array<bool, 5>);

const auto& forward_op() {
  static const auto op = find_op<Forward>("seqmem::additive_attention");
  return op;
}
const auto& backward_op() {
  static const auto op = find_op<Backward>("seqmem::additive_attention_backward");
  return op;
}

enum Position { kQuery, kKey, kValue, kScoreWeight, kMask };

class AdditiveAttentionFunction : public torch::autograd::Function<AdditiveAttentionFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key,
                               const Tensor& value, const Tensor& score_weight,
                               const OptionalTensor& mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, weights] = forward_op().call(query, key, value, score_weight, mask);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({query, key, value, score_weight, tensor(mask), weights});
    ctx->saved_data["present"] = int64_t(mask.has_value() ? 31 : 15);
    return {output, weights};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx);
    const auto [query, key, value, score_weight, mask] =
        run_backward(backward_op(), optional(grad[0]), optional(grad[1]), saved[0], saved[1],
                     saved[2], saved[3], optional(saved[4]), saved[5],
                     std::array<bool, 5>{wanted(kQuery), wanted(kKey), wanted(kValue),
                                         wanted(kScoreWeight), wanted(kMask)});
    return {wanted(kQuery, query), wanted(kKey, key), wanted(kValue, value),
            wanted(kScoreWeight, score_weight), wanted(kMask, mask)};
  }
};

Outputs additive_attention_autograd(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& score_weight, const OptionalTensor& mask) {
  if (any_requires_grad(query, key, value, score_weight, mask)) {
    auto out = AdditiveAttentionFunction::apply(query, key, value, score_weight, mask);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return forward_op().call(query, key, value, score_weight, mask);
}

template <c10::DeviceType device, c10::DispatchKey key_set>
Outputs additive_attention_autocast(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& score_weight, const OptionalTensor& mask) {
  c10::impl::ExcludeDispatchKeyGuard guard(key_set);
  const Cast<device> cast;
  return forward_op().call(cast(query), cast(key), cast(value), cast(score_weight), cast(mask));
}

}  // namespace

TORCH_LIBRARY_IMPL(seqmem, Autograd, m) {
  m.impl("additive_attention", additive_attention_autograd);
}

TORCH_LIBRARY_IMPL(seqmem, AutocastCPU, m) {
  m.impl("additive_attention",
         additive_attention_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(seqmem, AutocastCUDA, m) {
  m.impl("additive_attention",
         additive_attention_autocast<c10::DeviceType::CUDA, c10::DispatchKey::Autocast>);
}

}  // namespace seqmem::additive_attention
