// The delta memory's derivative and autocast.
//
// With P_t = e^{g_t} S_{t-1}, x_t = v_t - P_t^T k_t, u_t = beta_t x_t, S_t = P_t + k_t u_t^T and
// o_t = scale S_t^T q_t, and dS the gradient of S_t, backwards over the steps:
//   dS += scale q_t do_t^T,  dq_t = scale S_t do_t,  du = dS^T k_t,  dbeta_t = du . x_t,
//   dv_t = dx = beta_t du,  dk_t = dS u_t - P_t dx,  dP = dS - k_t dx^T,
//   dg_t = dP * P_t (summed over the values, and over the features where g has one for a head),
//   dS of the step before = e^{g_t} dP, and 0 where the memory was empty.
// Norms: with q' = q / n, n = sqrt(q . q + 1e-6):  dq = (dq' - q' (q' . dq')) / n.
#include "../common/autograd.h"

namespace seqmem::delta_memory {
namespace {

using Mask = std::array<bool, 6>;
using Scale = std::optional<double>;

constexpr char kName[] = "seqmem::delta_memory";
constexpr char kBackwardName[] = "seqmem::delta_memory_backward";
using Forward =
    Op<kName, Tensors<3>(In, In, In, In, Maybe, Maybe, Scale, bool, Maybe, Maybe, bool)>;
using Backward = Op<kBackwardName, Tensors<6>(Maybe, Maybe, In, In, In, In, Maybe, Maybe, Scale,
                                              bool, Maybe, Maybe, In, Mask)>;

struct DeltaMemory : torch::autograd::Function<DeltaMemory> {
  static variable_list forward(AutogradContext* ctx, In q, In k, In v, In beta, Maybe log_decay,
                               Maybe state, Scale scale, bool qk_l2norm, Maybe lengths, Maybe reset,
                               bool) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, final_state, states] =
        Forward::call(q, k, v, beta, log_decay, state, scale, qk_l2norm, lengths, reset, true);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({states});
    ctx->save_for_backward(
        {q, k, v, beta, tensor(log_decay), tensor(state), tensor(lengths), tensor(reset), states});
    note_present(ctx, q, k, v, beta, log_decay, state);
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["qk_l2norm"] = qk_l2norm;
    return {output, final_state, states};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx);
    return wanted.list<Forward>(run_backward<Backward>(
        optional(grad[0]), optional(grad[1]), saved[0], saved[1], saved[2], saved[3],
        optional(saved[4]), optional(saved[5]), ctx->saved_data["scale"].toOptional<double>(),
        ctx->saved_data["qk_l2norm"].toBool(), optional(saved[6]), optional(saved[7]), saved[8],
        wanted.mask<6>()));
  }
};

// q, k and v as other ops' arguments; what the memory is made of stays in float32.
template <c10::DeviceType device, c10::DispatchKey key>
Tensors<3> autocast_wide(In q, In k, In v, In beta, Maybe log_decay, Maybe state, Scale scale,
                         bool qk_l2norm, Maybe lengths, Maybe reset, bool save) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const Cast<device> cast, wide{at::kFloat};
  return Forward::call(cast(q), cast(k), cast(v), wide(beta), wide(log_decay), wide(state), scale,
                       qk_l2norm, lengths, reset, save);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  using c10::DeviceType;
  using c10::DispatchKey;
  const auto autograd = TORCH_FN(AutogradKeys<Forward>::autograd<DeltaMemory>);
  m.impl(kName, torch::dispatch(DispatchKey::Autograd, autograd));
  m.impl(kName, torch::dispatch(DispatchKey::AutocastCPU,
                                autocast_wide<DeviceType::CPU, DispatchKey::AutocastCPU>));
  m.impl(kName, torch::dispatch(DispatchKey::AutocastCUDA,
                                autocast_wide<DeviceType::CUDA, DispatchKey::AutocastCUDA>));
}

}  // namespace seqmem::delta_memory
