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
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/autograd.h"

namespace seqmem::ntm {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using ForwardOp = Outputs(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor&, at::TensorList, const Tensor&, const Tensor&,
                          at::TensorList, const OptionalTensor&, const OptionalTensor&,
                          std::string_view, int64_t, bool, bool, bool, bool);
using BackwardOp = std::vector<Tensor>(const OptionalTensor&, const OptionalTensor&,
                                       const OptionalTensor&, const OptionalTensor&,
                                       const OptionalTensor&, const OptionalTensor&,
                                       const OptionalTensor&, const Tensor&, const Tensor&,
                                       const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                       at::TensorList, const Tensor&, const Tensor&, at::TensorList,
                                       const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                       const Tensor&, const Tensor&, const Tensor&,
                                       std::string_view, int64_t, bool, bool, std::array<bool, 4>);

const auto& ntm() {
  static const auto op = find_op<ForwardOp>("seqmem::ntm");
  return op;
}
const auto& ntm_backward() {
  static const auto op = find_op<BackwardOp>("seqmem::ntm_backward");
  return op;
}

// All differentiable arguments in one list, in the order of the backward op's result: input, the
// state (5), head_weight, head_bias, initial (5 or none), controller.
enum Position { kInput, kState, kHeadWeight = kState + 5, kHeadBias, kInitial };

class SequenceFunction : public torch::autograd::Function<SequenceFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, at::TensorList all, int64_t initial_count,
                               const OptionalTensor& lengths, const OptionalTensor& reset,
                               const std::string& heads, int64_t shift_range, bool lstm,
                               bool squash) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto initial = all.slice(kInitial, initial_count);
    const auto controller = all.slice(kInitial + initial_count);
    auto [features, hidden, cell, memory, weightings, reads, trace, saved, checkpoints] =
        ntm().call(all[0], all[1], all[2], all[3], all[4], all[5], controller, all[kHeadWeight],
                   all[kHeadBias], initial, lengths, reset, heads, shift_range, lstm, squash, true,
                   true);
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
    const auto all = at::TensorList(saved).slice(0, saved.size() - 6);
    const auto rest = at::TensorList(saved).slice(all.size());
    const int64_t initial_count = ctx->saved_data["initial"].toInt();
    const int64_t controller_at = kInitial + initial_count, count = all.size();
    auto any = [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i)
        if (ctx->needs_input_grad(i)) return true;
      return false;
    };
    const std::array<bool, 4> mask = {any(kInput, kState), any(kState, kHeadWeight),
                                      any(kHeadWeight, kInitial) || any(controller_at, count),
                                      any(kInitial, controller_at)};
    const std::string heads = ctx->saved_data["heads"].toStringRef();
    variable_list found = run_backward(
        ntm_backward(), optional(grad[0]), optional(grad[1]), optional(grad[2]), optional(grad[3]),
        optional(grad[4]), optional(grad[5]), optional(grad[6]), all[0], all[1], all[2], all[3],
        all[4], all[5], all.slice(controller_at), all[kHeadWeight], all[kHeadBias],
        all.slice(kInitial, initial_count), optional(rest[0]), optional(rest[1]), rest[2], rest[3],
        rest[4], rest[5], std::string_view(heads), ctx->saved_data["shift_range"].toInt(),
        ctx->saved_data["lstm"].toBool(), ctx->saved_data["squash"].toBool(), mask);
    for (int64_t i = 0; i < count; ++i)
      if (!ctx->needs_input_grad(i)) found[i] = Tensor();
    found.resize(count + 7);  // initial_count, lengths, reset, heads, shift_range, lstm, squash
    return found;
  }
};

bool any_list_requires_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& t) { return t.requires_grad(); });
}

Outputs ntm_autograd(const Tensor& input, const Tensor& hidden, const Tensor& cell,
                     const Tensor& memory, const Tensor& weightings, const Tensor& reads,
                     at::TensorList controller, const Tensor& head_weight, const Tensor& head_bias,
                     at::TensorList initial, const OptionalTensor& lengths,
                     const OptionalTensor& reset, std::string_view heads, int64_t shift_range,
                     bool lstm, bool squash, bool trace, bool save) {
  variable_list all = {input, hidden, cell, memory, weightings, reads, head_weight, head_bias};
  all.insert(all.end(), initial.begin(), initial.end());
  all.insert(all.end(), controller.begin(), controller.end());
  if (at::GradMode::is_enabled() && any_list_requires_grad(all)) {
    auto out =
        SequenceFunction::apply(at::TensorList(all), static_cast<int64_t>(initial.size()), lengths,
                                reset, std::string(heads), shift_range, lstm, squash);
    // What the backward needs stays with the graph.
    const auto none = at::empty(
        {0}, input.options().dtype(input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
    return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], none, at::empty_like(none)};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ntm().call(input, hidden, cell, memory, weightings, reads, controller, head_weight,
                    head_bias, initial, lengths, reset, heads, shift_range, lstm, squash, trace,
                    save);
}

template <c10::DeviceType device, c10::DispatchKey key>
Outputs ntm_autocast(const Tensor& input, const Tensor& hidden, const Tensor& cell,
                     const Tensor& memory, const Tensor& weightings, const Tensor& reads,
                     at::TensorList controller, const Tensor& head_weight, const Tensor& head_bias,
                     at::TensorList initial, const OptionalTensor& lengths,
                     const OptionalTensor& reset, std::string_view heads, int64_t shift_range,
                     bool lstm, bool squash, bool trace, bool save) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const Cast<device> cast;
  auto each = [&](at::TensorList tensors) {
    variable_list out;
    for (const Tensor& t : tensors) out.push_back(cast(t));
    return out;
  };
  return ntm().call(cast(input), cast(hidden), cast(cell), cast(memory), cast(weightings),
                    cast(reads), each(controller), cast(head_weight), cast(head_bias),
                    each(initial), lengths, reset, heads, shift_range, lstm, squash, trace, save);
}

}  // namespace

TORCH_LIBRARY_IMPL(seqmem, Autograd, m) { m.impl("ntm", ntm_autograd); }

TORCH_LIBRARY_IMPL(seqmem, AutocastCPU, m) {
  m.impl("ntm", ntm_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(seqmem, AutocastCUDA, m) {
  m.impl("ntm", ntm_autocast<c10::DeviceType::CUDA, c10::DispatchKey::Autocast>);
}

}  // namespace seqmem::ntm
