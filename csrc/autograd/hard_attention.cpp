// Hard attention's derivatives and autocast.
//
// With p = softmax(logits), log pi = log p_a for the action a, and H = -sum p log p:
//   d log pi = onehot(a) - p,   dH = -p (log p + H),
// so the loss -log pi (R - b) - w H has the gradient (p - onehot(a)) (R - b) + w p (log p + H).
// The action, the returns and the baseline are constants.
#include "../common/autograd.h"
#include "../ops/hard_attention_check.h"

namespace seqmem::hard_attention {
namespace {

struct SampleFunction : torch::autograd::Function<SampleFunction> {
  static variable_list forward(AutogradContext* ctx, In logits, In uniform) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [action, log_prob, entropy] = Sample::call(logits, uniform);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({action});
    ctx->save_for_backward({logits, action});
    return {action, log_prob, entropy};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    return {run_backward<SampleBackward>(optional(grad[1]), optional(grad[2]), saved[0], saved[1]),
            Tensor()};
  }
};

struct LossFunction : torch::autograd::Function<LossFunction> {
  static Tensor forward(AutogradContext* ctx, In logits, In action, In returns, Maybe baseline,
                        double entropy_weight, int64_t reduction) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({logits, action, returns, tensor(baseline)});
    ctx->saved_data["entropy_weight"] = entropy_weight;
    ctx->saved_data["reduction"] = reduction;
    return Loss::call(logits, action, returns, baseline, entropy_weight, reduction);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    variable_list gradients(Loss::arguments);
    gradients[0] = run_backward<LossBackward>(
        grad[0], saved[0], saved[1], saved[2], optional(saved[3]),
        ctx->saved_data["entropy_weight"].toDouble(), ctx->saved_data["reduction"].toInt());
    return gradients;
  }
};

Tensor loss_autograd(In logits, In action, In returns, Maybe baseline, double entropy_weight,
                     int64_t reduction) {
  if (any_requires_grad(logits) && !any_nested(logits, action, returns, baseline)) {
    const OptionalTensor constant = baseline.has_value() ? optional(baseline->detach()) : baseline;
    return LossFunction::apply(logits, action, returns.detach(), constant, entropy_weight,
                               reduction);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return Loss::call(logits, action, returns, baseline, entropy_weight, reduction);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  differentiate<Sample, SampleFunction, Float32>(m);
  m.impl(kLoss, torch::dispatch(c10::DispatchKey::Autograd, TORCH_FN(loss_autograd)));
  autocast<Loss, Float32>(m);
}

}  // namespace seqmem::hard_attention
