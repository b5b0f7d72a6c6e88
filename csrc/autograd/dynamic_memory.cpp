// The dynamic memory's derivatives and autocast.
//
// (A row whose mask leaves no slot has a_k = 0 and r_k = 0.)
// With M_k = A_k * M_0 + B_k, p_k = A_k * s, a_k = softmax(M_0 p_k), u_k = M_0^T a_k,
// r_k = A_k * u_k + B_k, z = W [r_k; q] + b, g = sigmoid z_gate, w = tanh z_write,
//   A_{k+1} = (1 - g) * A_k,  B_{k+1} = (1 - g) * B_k + g * w,
// the gradients start from the final memory's, G [N, m],
//   dA = sum_n G * M_0,  dB = sum_n G,  dM_0 = G * A,
// and run backwards over the hops:
//   dz_gate = (dB * (w - B_k) - dA * A_k) * g * (1 - g),  dz_write = dB * g * (1 - w^2),
//   dA = (1 - g) * dA,  dB = (1 - g) * dB,
//   [dr; dq] = W^T dz,  dA += dr * u_k,  dB += dr,  du = dr * A_k,
//   da = da_given + M_0 du,  de = a_k * (da - a_k . da),  dp = M_0^T de,
//   dA += dp * s,  ds += dp * A_k,  dM_0 += a_k du^T + de p_k^T,  dW = dz [r_k; q]^T,  db = dz.
#include "../common/autograd.h"

namespace seqmem::dynamic_memory {
namespace {

using Mask = std::array<bool, 4>;

constexpr char kName[] = "seqmem::dynamic_memory";
constexpr char kBackwardName[] = "seqmem::dynamic_memory_backward";
using Forward = Op<kName, Tensors<3>(In, In, In, In, In, In, Maybe, Maybe, int64_t, bool, bool)>;
using Backward =
    Op<kBackwardName, Tensors<7>(Maybe, Maybe, In, In, In, In, In, In, Maybe, Maybe, In, In, Mask)>;

struct DynamicMemory : torch::autograd::Function<DynamicMemory> {
  static variable_list forward(AutogradContext* ctx, In query, In memory, In gate_weight,
                               In gate_bias, In write_weight, In write_bias, Maybe score_query,
                               Maybe mask, int64_t num_hops, bool return_memory, bool) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [final_memory, attention, saved] =
        Forward::call(query, memory, gate_weight, gate_bias, write_weight, write_bias, score_query,
                      mask, num_hops, return_memory, true);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({saved});
    ctx->save_for_backward({query, memory, gate_weight, gate_bias, write_weight, write_bias,
                            tensor(score_query), tensor(mask), attention, saved});
    note_present(ctx, query, memory, gate_weight, gate_bias, write_weight, write_bias, score_query,
                 mask);
    ctx->saved_data["return_memory"] = return_memory;
    return {final_memory, attention, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx);
    const auto [query, memory, gate_weight, gate_bias, write_weight, write_bias, score_query] =
        wanted.mask<7>();
    const Mask mask = {query, memory, gate_weight || gate_bias || write_weight || write_bias,
                       score_query};
    const bool has_memory = ctx->saved_data["return_memory"].toBool();
    return wanted.list<Forward>(
        run_backward<Backward>(has_memory ? optional(grad[0]) : OptionalTensor(), optional(grad[1]),
                               saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
                               optional(saved[6]), optional(saved[7]), saved[8], saved[9], mask));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) { differentiate<Forward, DynamicMemory>(m); }

}  // namespace seqmem::dynamic_memory
