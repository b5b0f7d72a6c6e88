// Hard attention's derivatives and autocast.
//
// With p = softmax(logits), log pi = log p_a for the action a, and H = -sum p log p:
//   d log pi = onehot(a) - p,   dH = -p (log p + H),
// so the loss -log pi (R - b) - w H has the gradient (p - onehot(a)) (R - b) + w p (log p + H).
// The action, the returns and the baseline are constants.
#include <torch/library.h>

#include "../common/autograd.h"

namespace seqmem::hard_attention {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Sampled = std::tuple<Tensor, Tensor, Tensor>;
using Sample = Sampled(const Tensor&, const Tensor&);
using SampleBackward = Tensor(const OptionalTensor&, const OptionalTensor&, const Tensor&,
                              const Tensor&);
using Loss = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double,
                    int64_t);
using LossBackward = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const OptionalTensor&, double, int64_t);

const auto& categorical_sample() {
  static const auto op = find_op<Sample>("seqmem::categorical_sample");
  return op;
}
const auto& categorical_sample_backward() {
  static const auto op = find_op<SampleBackward>("seqmem::categorical_sample_backward");
  return op;
}
const auto& reinforce_loss() {
  static const auto op = find_op<Loss>("seqmem::reinforce_loss");
  return op;
}
const auto& reinforce_loss_backward() {
  static const auto op = find_op<LossBackward>("seqmem::reinforce_loss_backward");
  return op;
}

class SampleFunction : public torch::autograd::Function<SampleFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& uniform) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [action, log_prob, entropy] = categorical_sample().call(logits, uniform);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({action});
    ctx->save_for_backward({logits, action});
    return {action, log_prob, entropy};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    return {run_backward(categorical_sample_backward(), optional(grad[1]), optional(grad[2]),
                         saved[0], saved[1]),
            Tensor()};
  }
};

Sampled sample_autograd(const Tensor& logits, const Tensor& uniform) {
  if (any_requires_grad(logits)) {
    auto out = SampleFunction::apply(logits, uniform);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return categorical_sample().call(logits, uniform);
}

class LossFunction : public torch::autograd::Function<LossFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const Tensor& action,
                        const Tensor& returns, const OptionalTensor& baseline,
                        double entropy_weight, int64_t reduction) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({logits, action, returns, tensor(baseline)});
    ctx->saved_data["entropy_weight"] = entropy_weight;
    ctx->saved_data["reduction"] = reduction;
    return reinforce_loss().call(logits, action, returns, baseline, entropy_weight, reduction);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Tensor none;
    return {run_backward(reinforce_loss_backward(), grad[0], saved[0], saved[1], saved[2],
                         optional(saved[3]), ctx->saved_data["entropy_weight"].toDouble(),
                         ctx->saved_data["reduction"].toInt()),
            none,
            none,
            none,
            none,
            none};
  }
};

Tensor loss_autograd(const Tensor& logits, const Tensor& action, const Tensor& returns,
                     const OptionalTensor& baseline, double entropy_weight, int64_t reduction) {
  const OptionalTensor constant = baseline.has_value() ? optional(baseline->detach()) : baseline;
  if (any_requires_grad(logits))
    return LossFunction::apply(logits, action, returns.detach(), constant, entropy_weight,
                               reduction);
  at::AutoDispatchBelowADInplaceOrView guard;
  return reinforce_loss().call(logits, action, returns, baseline, entropy_weight, reduction);
}

// Probabilities and losses are computed in float32, as torch's autocast has it for softmax and
// losses; float64 is left alone.
template <c10::DeviceType device>
Tensor widened(const Tensor& t) {
  return at::autocast::cached_cast(at::kFloat, t, device);
}

template <c10::DeviceType device, c10::DispatchKey key>
Sampled sample_autocast(const Tensor& logits, const Tensor& uniform) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  return categorical_sample().call(widened<device>(logits), uniform);
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor loss_autocast(const Tensor& logits, const Tensor& action, const Tensor& returns,
                     const OptionalTensor& baseline, double entropy_weight, int64_t reduction) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  return reinforce_loss().call(
      widened<device>(logits), action, widened<device>(returns),
      baseline.has_value() ? optional(widened<device>(*baseline)) : baseline, entropy_weight,
      reduction);
}

}  // namespace

TORCH_LIBRARY_IMPL(seqmem, Autograd, m) {
  m.impl("categorical_sample", sample_autograd);
  m.impl("reinforce_loss", loss_autograd);
}

TORCH_LIBRARY_IMPL(seqmem, AutocastCPU, m) {
  m.impl("categorical_sample",
         sample_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
  m.impl("reinforce_loss", loss_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(seqmem, AutocastCUDA, m) {
  m.impl("categorical_sample", sample_autocast<c10::DeviceType::CUDA, c10::DispatchKey::Autocast>);
  m.impl("reinforce_loss", loss_autocast<c10::DeviceType::CUDA, c10::DispatchKey::Autocast>);
}

}  // namespace seqmem::hard_attention
