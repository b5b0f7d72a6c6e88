// Additive attention's derivative and autocast.
//
// With t_ija = tanh(q_ia + k_ja), e = t v (+ mask), W = softmax(e), O = W V and the gradients dO
// and dW of both outputs,
//   dP = dO V^T + dW,   de = W (dP - rowsum(W dP)), zero where the mask has replaced e,
//   dq_ia = v_a sum_j de_ij (1 - t_ija^2),   dk_ja = v_a sum_i de_ij (1 - t_ija^2),
//   dv_a = sum_ij de_ij t_ija,   dV = W^T dO,   dmask = de.
#include "../common/autograd.h"

namespace seqmem::additive_attention {
namespace {

constexpr char kName[] = "seqmem::additive_attention";
constexpr char kBackwardName[] = "seqmem::additive_attention_backward";
using Forward = Op<kName, Tensors<2>(In, In, In, In, Maybe)>;
using Backward =
    Op<kBackwardName, Tensors<5>(Maybe, Maybe, In, In, In, In, Maybe, In, std::array<bool, 5>)>;

struct AdditiveAttention : torch::autograd::Function<AdditiveAttention> {
  static variable_list forward(AutogradContext* ctx, In query, In key, In value, In score_weight,
                               Maybe mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, weights] = Forward::call(query, key, value, score_weight, mask);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({query, key, value, score_weight, tensor(mask), weights});
    note_present(ctx, query, key, value, score_weight, mask);
    return {output, weights};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx);
    return wanted.list<Forward>(
        run_backward<Backward>(optional(grad[0]), optional(grad[1]), saved[0], saved[1], saved[2],
                               saved[3], optional(saved[4]), saved[5], wanted.mask<5>()));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) { differentiate<Forward, AdditiveAttention>(m); }

}  // namespace seqmem::additive_attention
