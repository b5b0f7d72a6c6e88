// Indexed attention's derivative and autocast.
//
// For one query, over the keys that its list names: with P = softmax(S), S = scale q K^T, o = P V
// and gradients do, dP' of the outputs,
//   dP = do V^T + dP',   dS = P (dP - sum(dP P)),
// (entmax: with S' = P^(2 - alpha) on P's support, dS = S' (dP - sum(dP S') / sum(S')))
//   dq = scale dS K,   dK = scale dS^T q,   dV = P^T do, added up over queries and over the heads
// that read one head of keys. The selection of keys has no derivative.
// Under dropout, with K = 1 / (1 - p) where a weight is kept and 0 elsewhere, K P stands in P's
// place in o and dV, and K do V^T in do V^T's. Weights come back as P, with a minus sign where
// dropped.
#include "../common/autograd.h"
#include "../ops/indexed_attention_check.h"

namespace seqmem::indexed_attention {
namespace {

struct IndexedAttention : torch::autograd::Function<IndexedAttention> {
  static variable_list forward(AutogradContext* ctx, In q, In k, In v, In index, Scale scale,
                               double alpha, double dropout, Maybe seed, bool) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, weights] = ForwardOp::call(q, k, v, index, scale, alpha, dropout, seed, true);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({q, k, v, index, weights, tensor(seed)});
    note_present(ctx, q, k, v, index);
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["alpha"] = alpha;
    ctx->saved_data["dropout"] = dropout;
    return {output, weights};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx);
    return wanted.list<ForwardOp>(run_backward<BackwardOp>(
        optional(grad[0]), optional(grad[1]), saved[0], saved[1], saved[2], saved[3],
        ctx->saved_data["scale"].toOptional<double>(), ctx->saved_data["alpha"].toDouble(),
        ctx->saved_data["dropout"].toDouble(), optional(saved[5]), saved[4], wanted.mask<3>()));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  differentiate<ForwardOp, IndexedAttention>(m);
  // Nested tensors reach the op, which refuses them.
  m.impl(kSelectionName,
         torch::dispatch(c10::DispatchKey::Autograd, torch::CppFunction::makeFallthrough()));
  autocast<SelectionOp>(m);
}

}  // namespace seqmem::indexed_attention
