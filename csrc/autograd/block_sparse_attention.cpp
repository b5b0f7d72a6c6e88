// Block-sparse attention's derivative and autocast.
//
// For one query, over the keys that it sees: with P = softmax(S), S = scale q K^T, o = P V and
// gradients do, dP' of the outputs,
//   dP = do V^T + dP',   dS = P (dP - sum(dP P)),
// (entmax: with S' = P^(2 - alpha) on P's support, dS = S' (dP - sum(dP S') / sum(S')))
//   dq = scale dS K,   dK = scale dS^T q,   dV = P^T do, added up over queries and over the heads
// that read one head of keys.
// Under dropout, with K = 1 / (1 - p) where a weight is kept and 0 elsewhere, K P stands in P's
// place in o and dV, and K do V^T in do V^T's. Weights come back as P, with a minus sign where
// dropped.
#include "../common/autograd.h"
#include "../ops/block_sparse_attention_check.h"

namespace seqmem::block_sparse_attention {
namespace {

struct BlockSparseAttention : torch::autograd::Function<BlockSparseAttention> {
  static variable_list forward(AutogradContext* ctx, In q, In k, In v, In blocks,
                               int64_t block_queries, int64_t block_keys, bool is_causal,
                               Maybe key_end, Scale scale, double alpha, double dropout, Maybe seed,
                               bool) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, weights] = ForwardOp::call(q, k, v, blocks, block_queries, block_keys, is_causal,
                                             key_end, scale, alpha, dropout, seed, true);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({q, k, v, blocks, tensor(key_end), weights, tensor(seed)});
    note_present(ctx, q, k, v, blocks);
    ctx->saved_data["numbers"] = std::vector<int64_t>{block_queries, block_keys, is_causal};
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["alpha"] = alpha;
    ctx->saved_data["dropout"] = dropout;
    return {output, weights};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const auto numbers = ctx->saved_data["numbers"].toIntVector();
    const Wanted wanted(ctx);
    return wanted.list<ForwardOp>(run_backward<BackwardOp>(
        optional(grad[0]), optional(grad[1]), saved[0], saved[1], saved[2], saved[3], numbers[0],
        numbers[1], numbers[2] != 0, optional(saved[4]),
        ctx->saved_data["scale"].toOptional<double>(), ctx->saved_data["alpha"].toDouble(),
        ctx->saved_data["dropout"].toDouble(), optional(saved[6]), saved[5], wanted.mask<3>()));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) { differentiate<ForwardOp, BlockSparseAttention>(m); }

}  // namespace seqmem::block_sparse_attention
