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
#include <torch/library.h>

#include "../common/autograd.h"

namespace seqmem::dynamic_memory {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Outputs = std::tuple<Tensor, Tensor, Tensor>;
using Forward = Outputs(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t, bool,
                        bool);
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = Gradients(const OptionalTensor&, const OptionalTensor&, const Tensor&,
                           const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                           const Tensor&, const OptionalTensor&, const OptionalTensor&,
                           const Tensor&, const Tensor&, std::array<bool, 4>);

const auto& dynamic_memory() {
  static const auto op = find_op<Forward>("seqmem::dynamic_memory");
  return op;
}
const auto& dynamic_memory_backward() {
  static const auto op = find_op<Backward>("seqmem::dynamic_memory_backward");
  return op;
}

enum Position { kQuery, kMemory, kGateWeight, kGateBias, kWriteWeight, kWriteBias, kScoreQuery };

class Function : public torch::autograd::Function<Function> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& memory,
                               const Tensor& gate_weight, const Tensor& gate_bias,
                               const Tensor& write_weight, const Tensor& write_bias,
                               const OptionalTensor& score_query, const OptionalTensor& mask,
                               int64_t num_hops, bool return_memory) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [final_memory, attention, saved] =
        dynamic_memory().call(query, memory, gate_weight, gate_bias, write_weight, write_bias,
                              score_query, mask, num_hops, return_memory, true);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({saved});
    ctx->save_for_backward({query, memory, gate_weight, gate_bias, write_weight, write_bias,
                            tensor(score_query), tensor(mask), attention, saved});
    ctx->saved_data["present"] = int64_t((1 << kScoreQuery) - 1) | int64_t(score_query.has_value())
                                                                       << kScoreQuery;
    ctx->saved_data["return_memory"] = return_memory;
    return {final_memory, attention, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx);
    const bool weights =
        wanted(kGateWeight) || wanted(kGateBias) || wanted(kWriteWeight) || wanted(kWriteBias);
    const bool has_memory = ctx->saved_data["return_memory"].toBool();
    const auto [query, memory, gate_weight, gate_bias, write_weight, write_bias, score_query] =
        run_backward(
            dynamic_memory_backward(), has_memory ? optional(grad[0]) : OptionalTensor(),
            optional(grad[1]), saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
            optional(saved[6]), optional(saved[7]), saved[8], saved[9],
            std::array<bool, 4>{wanted(kQuery), wanted(kMemory), weights, wanted(kScoreQuery)});
    const Tensor none;  // mask, num_hops, return_memory
    return {wanted(kQuery, query),
            wanted(kMemory, memory),
            wanted(kGateWeight, gate_weight),
            wanted(kGateBias, gate_bias),
            wanted(kWriteWeight, write_weight),
            wanted(kWriteBias, write_bias),
            wanted(kScoreQuery, score_query),
            none,
            none,
            none};
  }
};

Outputs autograd(const Tensor& query, const Tensor& memory, const Tensor& gate_weight,
                 const Tensor& gate_bias, const Tensor& write_weight, const Tensor& write_bias,
                 const OptionalTensor& score_query, const OptionalTensor& mask, int64_t num_hops,
                 bool return_memory, bool save) {
  if (any_requires_grad(query, memory, gate_weight, gate_bias, write_weight, write_bias,
                        score_query)) {
    auto out = Function::apply(query, memory, gate_weight, gate_bias, write_weight, write_bias,
                               score_query, mask, num_hops, return_memory);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return dynamic_memory().call(query, memory, gate_weight, gate_bias, write_weight, write_bias,
                               score_query, mask, num_hops, return_memory, save);
}

template <c10::DeviceType device, c10::DispatchKey key>
Outputs autocast(const Tensor& query, const Tensor& memory, const Tensor& gate_weight,
                 const Tensor& gate_bias, const Tensor& write_weight, const Tensor& write_bias,
                 const OptionalTensor& score_query, const OptionalTensor& mask, int64_t num_hops,
                 bool return_memory, bool save) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const Cast<device> cast;
  return dynamic_memory().call(cast(query), cast(memory), cast(gate_weight), cast(gate_bias),
                               cast(write_weight), cast(write_bias), cast(score_query), mask,
                               num_hops, return_memory, save);
}

}  // namespace

TORCH_LIBRARY_IMPL(seqmem, Autograd, m) { m.impl("dynamic_memory", autograd); }

TORCH_LIBRARY_IMPL(seqmem, AutocastCPU, m) {
  m.impl("dynamic_memory", autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(seqmem, AutocastCUDA, m) {
  m.impl("dynamic_memory", autocast<c10::DeviceType::CUDA, c10::DispatchKey::Autocast>);
}

}  // namespace seqmem::dynamic_memory
