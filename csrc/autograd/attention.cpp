// Attention's derivative and autocast.
//
// With W = softmax(S), S = scale Q K^T (+ mask), O = W V and gradients dO, dW of both outputs,
//   dP = dO V^T + dW,   dS = W (dP - rowsum(dP W)), zero where the mask has replaced S,
//   (entmax: with S' = W^(2 - alpha) on W's support, dS = S' (dP - rowsum(dP S') / rowsum(S')))
//   dQ = scale dS K,   dK = scale dS^T Q,   dV = W^T dO,   dmask = dS.
#include "../common/autograd.h"
#include "../ops/attention_check.h"

namespace seqmem::attention {
namespace {

constexpr char kCheckName[] = "seqmem::check_attention";
using CheckOnly = Op<kCheckName, void(In, In, In, Maybe, std::optional<double>, bool, double)>;

struct Attention : torch::autograd::Function<Attention> {
  static variable_list forward(AutogradContext* ctx, In query, In key, In value, Maybe mask,
                               std::optional<double> scale, bool is_causal, double alpha) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, weights] = ForwardOp::call(query, key, value, mask, scale, is_causal, alpha);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({query, key, value, tensor(mask), weights});
    note_present(ctx, query, key, value, mask);
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["is_causal"] = is_causal;
    ctx->saved_data["alpha"] = alpha;
    return {output, weights};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx);
    return wanted.list<ForwardOp>(run_backward<BackwardOp>(
        optional(grad[0]), optional(grad[1]), saved[0], saved[1], saved[2], optional(saved[3]),
        saved[4], ctx->saved_data["scale"].toOptional<double>(),
        ctx->saved_data["is_causal"].toBool(), ctx->saved_data["alpha"].toDouble(),
        wanted.mask<4>()));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  differentiate<ForwardOp, Attention>(m);
  autocast<CheckOnly>(m);
}

}  // namespace seqmem::attention
