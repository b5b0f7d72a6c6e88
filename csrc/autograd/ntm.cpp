// The whole-sequence NTM's derivative and autocast.
//
// Backwards in time, with the memories of a segment recomputed from its checkpoint. Of one step,
// the heads in reverse:
//   read   r = M^T w:                 dw += M dr,                 dM += w dr^T
//   write  M' = M (1 - w e^T) + w a^T: dw += (dM' (a - e M)) 1,    dM = dM' (1 - w e^T),
//                                     da = dM'^T w,  de = -(dM' M)^T w
//   w from M, key, beta, gate, shift, gamma and the weighting before: see
//   cpu/ntm_memory_backward.h
// then dp through the activations, dh += W_p^T dp, the controller's layers as in autograd/lstm.cpp
// (or dz = dh (1 - h^2)), and the operand's gradient splits into those of x, reads and h before.
// Weights: dW = dz [operand, 1]^T, summed over all steps and rows at once.
#include <ATen/ops/empty.h>

#include "../common/autograd.h"
#include "../ops/ntm_check.h"

namespace seqmem::ntm {
namespace {

// All differentiable arguments in one list, in the order of the backward op's result: input, the
// state (5), head_weight, head_bias, initial (5 or none), controller.
enum Position { kInput, kState, kHeadWeight = kState + 5, kHeadBias, kInitial };

struct Sequence : torch::autograd::Function<Sequence> {
  static variable_list forward(AutogradContext* ctx, TensorList all, int64_t initial_count,
                               Maybe lengths, Maybe reset, const std::string& heads,
                               int64_t shift_range, bool lstm, bool squash) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [features, hidden, cell, memory, weightings, reads, trace, saved, checkpoints] =
        ForwardOp::call(all[0], all[1], all[2], all[3], all[4], all[5],
                        all.slice(kInitial + initial_count), all[kHeadWeight], all[kHeadBias],
                        all.slice(kInitial, initial_count), lengths, reset, heads, shift_range,
                        lstm, squash, true, true);
    ctx->set_materialize_grads(false);
    variable_list kept = all.vec();
    for (const Tensor& t : {tensor(lengths), tensor(reset), features, trace, saved, checkpoints})
      kept.push_back(t);
    ctx->save_for_backward(kept);
    ctx->saved_data["initial"] = initial_count;
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["shift_range"] = shift_range;
    ctx->saved_data["lstm"] = lstm;
    ctx->saved_data["squash"] = squash;
    return {features, hidden, cell, memory, weightings, reads, trace};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const variable_list saved = ctx->get_saved_variables();
    const auto all = TensorList(saved).slice(0, saved.size() - 6);
    const auto rest = TensorList(saved).slice(all.size());
    const int64_t initial_count = ctx->saved_data["initial"].toInt();
    const int64_t controller = kInitial + initial_count;
    const Mask mask = {
        any_wanted(ctx, kInput, kState), any_wanted(ctx, kState, kHeadWeight),
        any_wanted(ctx, kHeadWeight, kInitial) || any_wanted(ctx, controller, all.size()),
        any_wanted(ctx, kInitial, controller)};
    variable_list found = run_backward<BackwardOp>(
        optional(grad[0]), optional(grad[1]), optional(grad[2]), optional(grad[3]),
        optional(grad[4]), optional(grad[5]), optional(grad[6]), all[0], all[1], all[2], all[3],
        all[4], all[5], all.slice(controller), all[kHeadWeight], all[kHeadBias],
        all.slice(kInitial, initial_count), optional(rest[0]), optional(rest[1]), rest[2], rest[3],
        rest[4], rest[5], std::string_view(ctx->saved_data["heads"].toStringRef()),
        ctx->saved_data["shift_range"].toInt(), ctx->saved_data["lstm"].toBool(),
        ctx->saved_data["squash"].toBool(), mask);
    return only_wanted(ctx, std::move(found), 7);
  }
};

Tensors<9> autograd(In input, In hidden, In cell, In memory, In weightings, In reads,
                    TensorList controller, In head_weight, In head_bias, TensorList initial,
                    Maybe lengths, Maybe reset, std::string_view heads, int64_t shift_range,
                    bool lstm, bool squash, bool trace, bool save) {
  variable_list all = {input, hidden, cell, memory, weightings, reads, head_weight, head_bias};
  all.insert(all.end(), initial.begin(), initial.end());
  all.insert(all.end(), controller.begin(), controller.end());
  if (any_requires_grad(all) && !any_nested(all, lengths, reset)) {
    auto out = Sequence::apply(TensorList(all), static_cast<int64_t>(initial.size()), lengths,
                               reset, std::string(heads), shift_range, lstm, squash);
    // What the backward needs stays with the graph.
    auto none = [&] {
      return at::empty({0}, input.options().dtype(at::toOpMathType(input.scalar_type())));
    };
    return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], none(), none()};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ForwardOp::call(input, hidden, cell, memory, weightings, reads, controller, head_weight,
                         head_bias, initial, lengths, reset, heads, shift_range, lstm, squash,
                         trace, save);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  m.impl(kName, torch::dispatch(c10::DispatchKey::Autograd, TORCH_FN(autograd)));
  autocast<ForwardOp>(m);
}

}  // namespace seqmem::ntm
