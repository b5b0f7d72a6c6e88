// Window attention's derivative and autocast.
//
// For one query, over the keys that it sees, of the band and the global ones together: with
// P = softmax(S), S = scale q K^T, o = P V and gradients do, dP' of the outputs,
//   dP = do V^T + dP',   dS = P (dP - sum(dP P)),
// (entmax: with S' = P^(2 - alpha) on P's support, dS = S' (dP - sum(dP S') / sum(S')))
//   dq = scale dS K,   dK = scale dS^T q,   dV = P^T do, added up over queries and over the heads
// that read one head of keys.
// Under dropout, with K = 1 / (1 - p) where a weight is kept and 0 elsewhere, K P stands in P's
// place in o and dV, and K do V^T in do V^T's. Weights come back as P, with a minus sign where
// dropped.
#include "../common/autograd.h"
#include "../ops/window_attention_check.h"

namespace seqmem::window_attention {
namespace {

struct WindowAttention : torch::autograd::Function<WindowAttention> {
  static variable_list forward(AutogradContext* ctx, In q, In k, In v, int64_t left, int64_t right,
                               int64_t dilation, int64_t offset, Maybe key_start, Maybe key_end,
                               int64_t global_keys, Scale scale, double alpha, double dropout,
                               Maybe seed, bool) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, weights, global_weights] =
        ForwardOp::call(q, k, v, left, right, dilation, offset, key_start, key_end, global_keys,
                        scale, alpha, dropout, seed, true);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(
        {q, k, v, tensor(key_start), tensor(key_end), weights, global_weights, tensor(seed)});
    note_present(ctx, q, k, v);
    ctx->saved_data["numbers"] = std::vector<int64_t>{left, right, dilation, offset, global_keys};
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["alpha"] = alpha;
    ctx->saved_data["dropout"] = dropout;
    return {output, weights, global_weights};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const auto numbers = ctx->saved_data["numbers"].toIntVector();
    const Wanted wanted(ctx);
    return wanted.list<ForwardOp>(run_backward<BackwardOp>(
        optional(grad[0]), optional(grad[1]), optional(grad[2]), saved[0], saved[1], saved[2],
        numbers[0], numbers[1], numbers[2], numbers[3], optional(saved[3]), optional(saved[4]),
        numbers[4], ctx->saved_data["scale"].toOptional<double>(),
        ctx->saved_data["alpha"].toDouble(), ctx->saved_data["dropout"].toDouble(),
        optional(saved[7]), saved[5], saved[6], wanted.mask<3>()));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) { differentiate<ForwardOp, WindowAttention>(m); }

}  // namespace seqmem::window_attention
