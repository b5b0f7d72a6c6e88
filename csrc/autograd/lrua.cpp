// The derivative and autocast of the memory with least recently used access.
//
// Backwards in time, with the memories of a segment recomputed from its checkpoint. Of one step:
//   reads    r_h = M^T w_h:              dw_h += M dr_h,   dM += w_h dr_h^T
//   content  w = softmax(beta cos(M, k)): see cpu/lrua_backward_kernel.cpp
//   writes   M = kept + sum_h v_h a_h^T:  dv_h = dM a_h,   da_h = dM^T v_h,  dkept = dM
//   erased slots pass no gradient on to the memory before
//   v_h = g_h w_h,t-1 + (1 - g_h) 1[s_h]: dw_h,t-1 = g_h dv_h,  dg_h = dv_h . w_h,t-1 - dv_h[s_h]
// then dp through the activations, dh += W_p^T dp, the controller's layers as in autograd/lstm.cpp
// (or dz = dh (1 - h^2)), and the operand's gradient splits into those of x, reads and h before.
// Weights: dW = dz [operand, 1]^T, summed over all steps and rows at once. Usage has no gradient.
#include <ATen/ops/empty.h>

#include "../common/autograd.h"
#include "../ops/lrua_check.h"

namespace seqmem::lrua {
namespace {

// All differentiable arguments in one list, in the order of the backward op's result: input, the
// state (6), head_weight, head_bias, initial (6 or none), controller.
constexpr int64_t kInput = 0, kState = 1, kHeadWeight = kState + kParts,
                  kHeadBias = kHeadWeight + 1, kInitial = kHeadBias + 1;

struct Sequence : torch::autograd::Function<Sequence> {
  static variable_list forward(AutogradContext* ctx, TensorList all, int64_t initial_count,
                               Maybe lengths, Maybe reset, bool lstm, bool own_add, bool strength,
                               bool erase_all, double gamma, bool trace) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [features, hidden, cell, memory, usage, read_weights, reads, usage_trace, write_trace,
          read_trace, slots, saved, checkpoints] =
        ForwardOp::call(all[kInput], all.slice(kState, kParts), all.slice(kInitial + initial_count),
                        all[kHeadWeight], all[kHeadBias], all.slice(kInitial, initial_count),
                        lengths, reset, lstm, own_add, strength, erase_all, gamma, trace, true);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable(trace ? variable_list{usage, usage_trace}
                                       : variable_list{usage, usage_trace, write_trace});
    variable_list kept = all.vec();
    for (const Tensor& t :
         {tensor(lengths), tensor(reset), features, read_trace, slots, saved, checkpoints})
      kept.push_back(t);
    ctx->save_for_backward(kept);
    ctx->saved_data["initial"] = initial_count;
    ctx->saved_data["lstm"] = lstm;
    ctx->saved_data["own_add"] = own_add;
    ctx->saved_data["strength"] = strength;
    ctx->saved_data["erase_all"] = erase_all;
    ctx->saved_data["gamma"] = gamma;
    ctx->saved_data["trace"] = trace;
    return {features,     hidden, cell,        memory,      usage,
            read_weights, reads,  usage_trace, write_trace, read_trace};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const variable_list saved = ctx->get_saved_variables();
    const auto all = TensorList(saved).slice(0, saved.size() - 7);
    const auto rest = TensorList(saved).slice(all.size());
    auto flag = [&](const char* name) { return ctx->saved_data[name].toBool(); };
    const int64_t initial_count = ctx->saved_data["initial"].toInt();
    const int64_t controller = kInitial + initial_count;
    const Mask mask = {
        any_wanted(ctx, kInput, kState), any_wanted(ctx, kState, kHeadWeight),
        any_wanted(ctx, kHeadWeight, kInitial) || any_wanted(ctx, controller, all.size()),
        any_wanted(ctx, kInitial, controller)};
    variable_list found = run_backward<BackwardOp>(
        optional(grad[0]), optional(grad[1]), optional(grad[2]), optional(grad[3]),
        optional(grad[5]), optional(grad[6]), flag("trace") ? optional(grad[8]) : std::nullopt,
        optional(grad[9]), all[kInput], all.slice(kState, kParts), all.slice(controller),
        all[kHeadWeight], all[kHeadBias], all.slice(kInitial, initial_count), optional(rest[0]),
        optional(rest[1]), rest[2], rest[3], rest[4], rest[5], rest[6], flag("lstm"),
        flag("own_add"), flag("strength"), flag("erase_all"), ctx->saved_data["gamma"].toDouble(),
        mask);
    found[kState + kUsage] = Tensor();
    if (initial_count > 0) found[kInitial + kUsage] = Tensor();
    return only_wanted(ctx, std::move(found), 9);
  }
};

Tensors<13> autograd(In input, TensorList state, TensorList controller, In head_weight,
                     In head_bias, TensorList initial, Maybe lengths, Maybe reset, bool lstm,
                     bool own_add, bool strength, bool erase_all, double gamma, bool trace,
                     bool save) {
  variable_list all = {input};
  all.insert(all.end(), state.begin(), state.end());
  all.insert(all.end(), {head_weight, head_bias});
  all.insert(all.end(), initial.begin(), initial.end());
  all.insert(all.end(), controller.begin(), controller.end());
  if (state.size() == kParts && any_requires_grad(all) && !any_nested(all, lengths, reset)) {
    auto out = Sequence::apply(TensorList(all), static_cast<int64_t>(initial.size()), lengths,
                               reset, lstm, own_add, strength, erase_all, gamma, trace);
    // What the backward needs stays with the graph.
    auto none = [&](at::ScalarType type) { return at::empty({0}, input.options().dtype(type)); };
    const auto wide = at::toOpMathType(input.scalar_type());
    return {out[0], out[1], out[2], out[3],          out[4],     out[5],    out[6],
            out[7], out[8], out[9], none(at::kLong), none(wide), none(wide)};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ForwardOp::call(input, state, controller, head_weight, head_bias, initial, lengths, reset,
                         lstm, own_add, strength, erase_all, gamma, trace, save);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  m.impl(kName, torch::dispatch(c10::DispatchKey::Autograd, TORCH_FN(autograd)));
  autocast<ForwardOp>(m);
}

}  // namespace seqmem::lrua
