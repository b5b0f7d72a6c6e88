// The LSTM ops' derivatives and autocast.
//
// With z = W_ih x + b_ih + W_hh h' + b_hh and (i, f, g, o) its activated parts,
//   c = f c' + i g,  h = o tanh c   (h = W_hr o tanh c where projected)
// the gradients run backwards in time:
//   dc += dh o (1 - tanh^2 c),  do = dh tanh c,  di = dc g,  df = dc c',  dg = dc i,
//   dz = (di i(1-i), df f(1-f), dg (1-g^2), do o(1-o)),
//   dc' = dc f,  dh' = W_hh^T dz,  dx = W_ih^T dz,  dW_ih = dz x^T,  dW_hh = dz h'^T,  db = dz.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

#include "../common/autograd.h"

namespace seqmem::lstm {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

using CellOutputs = std::tuple<Tensor, Tensor, Tensor>;
using CellForward = CellOutputs(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                const Tensor&, const Tensor&, const OptionalTensor&,
                                const OptionalTensor&, bool);
using CellGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using CellBackward = CellGradients(const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, const Tensor&, const OptionalTensor&,
                                   const OptionalTensor&, const Tensor&, const Tensor&,
                                   const Tensor&, const Tensor&, bool, std::array<bool, 3>);
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using SequenceForward = Outputs(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                const Tensor&, const Tensor&, const OptionalTensor&,
                                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                const OptionalTensor&, const OptionalTensor&, bool, bool, bool);
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using SequenceBackward = Gradients(const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, const Tensor&, const OptionalTensor&,
                                   const OptionalTensor&, const Tensor&, const Tensor&,
                                   const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                   const Tensor&, const Tensor&, bool, bool, bool,
                                   std::array<bool, 3>);

const auto& lstm_cell() {
  static const auto op = find_op<CellForward>("seqmem::lstm_cell");
  return op;
}
const auto& lstm_cell_backward() {
  static const auto op = find_op<CellBackward>("seqmem::lstm_cell_backward");
  return op;
}
const auto& lstm() {
  static const auto op = find_op<SequenceForward>("seqmem::lstm");
  return op;
}
const auto& lstm_backward() {
  static const auto op = find_op<SequenceBackward>("seqmem::lstm_backward");
  return op;
}

// Tensor arguments by position. Absent optionals take no place among the edges that
// needs_input_grad counts, so a bit mask of the present ones travels to the backward.
enum Position { kInput, kHx, kCx, kWeightIh, kWeightHh, kBiasIh, kBiasHh, kWeightHr };
// Two options share that mask.
constexpr int kBatchFirst = 8, kReverse = 9;

int64_t present(const OptionalTensor& hx, const OptionalTensor& cx, const OptionalTensor& bias_ih,
                const OptionalTensor& bias_hh, const OptionalTensor& weight_hr) {
  auto bit = [](bool is, Position p) { return int64_t(is) << p; };
  return bit(true, kInput) | bit(hx.has_value(), kHx) | bit(cx.has_value(), kCx) |
         bit(true, kWeightIh) | bit(true, kWeightHh) | bit(bias_ih.has_value(), kBiasIh) |
         bit(bias_hh.has_value(), kBiasHh) | bit(weight_hr.has_value(), kWeightHr);
}

std::array<bool, 3> mask(const Wanted& w) {
  return {w(kInput), w(kHx) || w(kCx),
          w(kWeightIh) || w(kWeightHh) || w(kBiasIh) || w(kBiasHh) || w(kWeightHr)};
}
bool has_bias(const Wanted& w) { return w.has(kBiasIh) || w.has(kBiasHh); }

// Both biases have the same gradient. Autograd takes over a tensor that nobody else holds and
// copies any other, which costs more microseconds than this copy.
Tensor second_bias(const Wanted& w, const Tensor& bias) {
  if (!w(kBiasHh)) return Tensor();
  if (!w(kBiasIh) || at::GradMode::is_enabled() || !bias.is_cpu() || !bias.is_contiguous() ||
      at::isTensorSubclassLike(bias))
    return bias;
  const Tensor copy = at::empty(bias.sizes(), bias.options());
  std::memcpy(copy.mutable_data_ptr(), bias.const_data_ptr(), bias.nbytes());
  return copy;
}

class CellFunction : public torch::autograd::Function<CellFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& hx,
                               const OptionalTensor& cx, const Tensor& weight_ih,
                               const Tensor& weight_hh, const OptionalTensor& bias_ih,
                               const OptionalTensor& bias_hh) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [hy, cy, gates] =
        lstm_cell().call(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, true);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({input, tensor(hx), tensor(cx), weight_ih, weight_hh, gates, cy});
    ctx->saved_data["present"] = present(hx, cx, bias_ih, bias_hh, {});
    return {hy, cy, gates};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx);
    const auto [input, hx, cx, weight_ih, weight_hh, bias] =
        run_backward(lstm_cell_backward(), optional(grad[0]), optional(grad[1]), optional(grad[2]),
                     saved[0], optional(saved[1]), optional(saved[2]), saved[3], saved[4], saved[5],
                     saved[6], has_bias(wanted), mask(wanted));
    return {wanted(kInput, input),
            wanted(kHx, hx),
            wanted(kCx, cx),
            wanted(kWeightIh, weight_ih),
            wanted(kWeightHh, weight_hh),
            wanted(kBiasIh, bias),
            second_bias(wanted, bias)};
  }
};

CellOutputs lstm_cell_autograd(const Tensor& input, const OptionalTensor& hx,
                               const OptionalTensor& cx, const Tensor& weight_ih,
                               const Tensor& weight_hh, const OptionalTensor& bias_ih,
                               const OptionalTensor& bias_hh, bool return_gates) {
  if (any_requires_grad(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh)) {
    auto out = CellFunction::apply(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return lstm_cell().call(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, return_gates);
}

class SequenceFunction : public torch::autograd::Function<SequenceFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& hx,
                               const OptionalTensor& cx, const Tensor& weight_ih,
                               const Tensor& weight_hh, const OptionalTensor& bias_ih,
                               const OptionalTensor& bias_hh, const OptionalTensor& weight_hr,
                               const OptionalTensor& lengths, const OptionalTensor& reset,
                               const OptionalTensor& batch_sizes, bool batch_first, bool reverse) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, hy, cy, gates, cells] =
        lstm().call(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths,
                    reset, batch_sizes, batch_first, reverse, true);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({input, tensor(hx), tensor(cx), weight_ih, weight_hh, tensor(weight_hr),
                            tensor(lengths), tensor(reset), tensor(batch_sizes), output, gates,
                            cells});
    ctx->saved_data["present"] = present(hx, cx, bias_ih, bias_hh, weight_hr) |
                                 int64_t(batch_first) << kBatchFirst | int64_t(reverse) << kReverse;
    return {output, hy, cy, gates, cells};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx);
    const auto [input, hx, cx, weight_ih, weight_hh, bias, weight_hr] =
        run_backward(lstm_backward(), optional(grad[0]), optional(grad[1]), optional(grad[2]),
                     optional(grad[3]), optional(grad[4]), saved[0], optional(saved[1]),
                     optional(saved[2]), saved[3], saved[4], optional(saved[5]), optional(saved[6]),
                     optional(saved[7]), optional(saved[8]), saved[9], saved[10], saved[11],
                     has_bias(wanted), wanted.has(kBatchFirst), wanted.has(kReverse), mask(wanted));
    const Tensor none;  // lengths, reset, batch_sizes, batch_first, reverse
    return {wanted(kInput, input),
            wanted(kHx, hx),
            wanted(kCx, cx),
            wanted(kWeightIh, weight_ih),
            wanted(kWeightHh, weight_hh),
            wanted(kBiasIh, bias),
            second_bias(wanted, bias),
            wanted(kWeightHr, weight_hr),
            none,
            none,
            none,
            none,
            none};
  }
};

Outputs lstm_autograd(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                      const Tensor& weight_ih, const Tensor& weight_hh,
                      const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                      const OptionalTensor& weight_hr, const OptionalTensor& lengths,
                      const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                      bool batch_first, bool reverse, bool return_gates) {
  if (any_requires_grad(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)) {
    auto out =
        SequenceFunction::apply(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr,
                                lengths, reset, batch_sizes, batch_first, reverse);
    return {out[0], out[1], out[2], out[3], out[4]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return lstm().call(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths,
                     reset, batch_sizes, batch_first, reverse, return_gates);
}

template <c10::DeviceType device, c10::DispatchKey key>
CellOutputs lstm_cell_autocast(const Tensor& input, const OptionalTensor& hx,
                               const OptionalTensor& cx, const Tensor& weight_ih,
                               const Tensor& weight_hh, const OptionalTensor& bias_ih,
                               const OptionalTensor& bias_hh, bool return_gates) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const Cast<device> cast;
  return lstm_cell().call(cast(input), cast(hx), cast(cx), cast(weight_ih), cast(weight_hh),
                          cast(bias_ih), cast(bias_hh), return_gates);
}

template <c10::DeviceType device, c10::DispatchKey key>
Outputs lstm_autocast(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                      const Tensor& weight_ih, const Tensor& weight_hh,
                      const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                      const OptionalTensor& weight_hr, const OptionalTensor& lengths,
                      const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                      bool batch_first, bool reverse, bool return_gates) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const Cast<device> cast;
  return lstm().call(cast(input), cast(hx), cast(cx), cast(weight_ih), cast(weight_hh),
                     cast(bias_ih), cast(bias_hh), cast(weight_hr), lengths, reset, batch_sizes,
                     batch_first, reverse, return_gates);
}

}  // namespace

TORCH_LIBRARY_IMPL(seqmem, Autograd, m) {
  m.impl("lstm_cell", lstm_cell_autograd);
  m.impl("lstm", lstm_autograd);
}

TORCH_LIBRARY_IMPL(seqmem, AutocastCPU, m) {
  m.impl("lstm_cell", lstm_cell_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
  m.impl("lstm", lstm_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(seqmem, AutocastCUDA, m) {
  m.impl("lstm_cell", lstm_cell_autocast<c10::DeviceType::CUDA, c10::DispatchKey::Autocast>);
  m.impl("lstm", lstm_autocast<c10::DeviceType::CUDA, c10::DispatchKey::Autocast>);
}

}  // namespace seqmem::lstm
