// The derivative and autocast of the Differentiable Neural Computer.
//
// Backwards in time, with memories and links of a segment formed again from its checkpoint. Of one
// step, with q = the read weightings before:
//   reads       r = M^T w:                    dw += M dr,  dM += w dr^T
//   w = pi_b L^T q + pi_c c + pi_f L q:       dpi_c = dw . c,  dc = pi_c dw,
//                                             dpi_f = (L^T dw) . q,  dpi_b = (L dw) . q,
//                                             dL += pi_f dw q^T + pi_b q dw^T,
//                                             dq = pi_f L^T dw + pi_b L dw
//   links       dL_t -> dL = dL_t (1 - w_i - w_j),  dw_i += dL_t (p_j - L),  dw_j -= dL_t L,
//               dp_j += dL_t w_i, nothing on the diagonal
//   precedence  dp = (1 - sum w) dp_t,  dw += dp_t - p . dp_t
//   memory      M' = M E + sum_h w_h v_h^T:   dM = dM' E,  dv = dM'^T w,  dw += dM' v,  dE = dM' M
//   w_h = g_w (g_a a_h + (1 - g_a) c_h), heads in reverse, with the usage that one leaves the next
//   allocation  from the last slot to the first, with P_j the product before j and D = 0:
//               dv = P_j (D - g_j),  D <- g_j (1 - v_j) + v_j D
//   content     K = D / (|M||k| + eps), softmax(beta K): as in autograd/ntm.cpp
//   usage       u = (u' + (1 - u') what) psi: du' = du psi (1 - what),  dpsi, dwhat if asked for
// then dp through the activations and the norm, dh += W_p^T dp, the controller's layers as in
// autograd/lstm.cpp (or dz = dh (1 - h^2)), and the operand's gradient splits into those of x,
// reads and h before. Weights: dW = dz [operand, 1]^T, summed over all steps and rows at once.
#include <ATen/ops/empty.h>

#include "../common/autograd.h"
#include "../ops/dnc_check.h"

namespace seqmem::dnc {
namespace {

constexpr int64_t kKept = 8;

// All differentiable arguments in one list, in the order of the backward op's result: input, the
// state (9), controller, interface_weight, interface_bias, norm, initial.
struct Positions {
  int64_t controller, interface, norm, initial, end;
  Positions(int64_t count, int64_t of_norm, int64_t of_initial)
      : controller(1 + kParts),
        interface(count - of_initial - of_norm - 2),
        norm(count - of_initial - of_norm),
        initial(count - of_initial),
        end(count) {}
};

struct Sequence : torch::autograd::Function<Sequence> {
  static variable_list forward(AutogradContext* ctx, TensorList all, int64_t of_norm,
                               int64_t of_initial, Maybe lengths, Maybe reset,
                               const std::string& options, double norm_floor, double eps,
                               double mask_min) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Positions at(all.size(), of_norm, of_initial);
    auto [features, hidden, cell, memory, usage, link, precedence, write_weights, read_weights,
          reads, usage_trace, write_trace, read_trace, saved, checkpoints] =
        ForwardOp::call(all[0], all.slice(1, kParts),
                        all.slice(at.controller, at.interface - at.controller), all[at.interface],
                        all[at.interface + 1], all.slice(at.norm, of_norm), all.slice(at.initial),
                        lengths, reset, options, norm_floor, eps, mask_min, true, true);
    ctx->set_materialize_grads(false);
    variable_list kept = all.vec();
    for (const Tensor& t : {tensor(lengths), tensor(reset), features, usage_trace, write_trace,
                            read_trace, saved, checkpoints})
      kept.push_back(t);
    ctx->save_for_backward(kept);
    ctx->saved_data["norm"] = of_norm;
    ctx->saved_data["initial"] = of_initial;
    ctx->saved_data["options"] = options;
    ctx->saved_data["norm_floor"] = norm_floor;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["mask_min"] = mask_min;
    return {features,      hidden,       cell,  memory,      usage,       link,      precedence,
            write_weights, read_weights, reads, usage_trace, write_trace, read_trace};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const variable_list saved = ctx->get_saved_variables();
    const auto all = TensorList(saved).slice(0, saved.size() - kKept);
    const auto rest = TensorList(saved).slice(all.size());
    const int64_t of_norm = ctx->saved_data["norm"].toInt();
    const Positions at(all.size(), of_norm, ctx->saved_data["initial"].toInt());
    const Mask mask = {any_wanted(ctx, 0, 1), any_wanted(ctx, 1, at.controller),
                       any_wanted(ctx, at.controller, at.initial),
                       any_wanted(ctx, at.initial, at.end)};
    auto number = [&](const char* name) { return ctx->saved_data[name].toDouble(); };
    variable_list found = run_backward<BackwardOp>(
        optional(grad[0]), optional(grad[1]), optional(grad[2]), optional(grad[3]),
        optional(grad[4]), optional(grad[5]), optional(grad[6]), optional(grad[7]),
        optional(grad[8]), optional(grad[9]), optional(grad[10]), optional(grad[11]),
        optional(grad[12]), all[0], all.slice(1, kParts),
        all.slice(at.controller, at.interface - at.controller), all[at.interface],
        all[at.interface + 1], all.slice(at.norm, of_norm), all.slice(at.initial),
        optional(rest[0]), optional(rest[1]), rest[2], rest[3], rest[4], rest[5], rest[6], rest[7],
        std::string_view(ctx->saved_data["options"].toStringRef()), number("norm_floor"),
        number("eps"), number("mask_min"), mask);
    return only_wanted(ctx, std::move(found), 8);
  }
};

Tensors<15> autograd(In input, TensorList state, TensorList controller, In interface_weight,
                     In interface_bias, TensorList norm, TensorList initial, Maybe lengths,
                     Maybe reset, std::string_view options, double norm_floor, double eps,
                     double mask_min, bool trace, bool save) {
  variable_list all = {input};
  auto add = [&](TensorList tensors) { all.insert(all.end(), tensors.begin(), tensors.end()); };
  add(state);
  add(controller);
  add({interface_weight, interface_bias});
  add(norm);
  add(initial);
  if (state.size() == kParts && any_requires_grad(all) && !any_nested(all, lengths, reset)) {
    auto out = Sequence::apply(TensorList(all), static_cast<int64_t>(norm.size()),
                               static_cast<int64_t>(initial.size()), lengths, reset,
                               std::string(options), norm_floor, eps, mask_min);
    // What the backward needs stays with the graph.
    auto none = [&] {
      return at::empty({0}, input.options().dtype(at::toOpMathType(input.scalar_type())));
    };
    return {out[0], out[1], out[2],  out[3],  out[4],  out[5], out[6], out[7],
            out[8], out[9], out[10], out[11], out[12], none(), none()};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ForwardOp::call(input, state, controller, interface_weight, interface_bias, norm, initial,
                         lengths, reset, options, norm_floor, eps, mask_min, trace, save);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  m.impl(kName, torch::dispatch(c10::DispatchKey::Autograd, TORCH_FN(autograd)));
  autocast<ForwardOp>(m);
}

}  // namespace seqmem::dnc
