// The LSTM with zoneout and layer normalisation: schemas, the CPU and Meta keys. Arguments:
// seqmem_fast/ops/lstm_regularized.py.
#include "lstm_regularized_check.h"

#include "../common/dispatch.h"
#include "../common/team.h"
#include "../cpu/lstm_regularized_kernel.h"
#include "lstm_call.h"

namespace seqmem::lstm_regularized {
namespace {

using lstm::data_if;
using Sizes64 = Sizes<int64_t>;

// What both directions take, contiguous and alive as long as this.
struct Call : lstm::Call {
  const Operand gain_ih, gain_hh, gain_c, shift_c;
  const Norms norms;
  const Zoneout zoneout_h, zoneout_c;

  Call(const Inputs& in, const Sizes64& s)
      : lstm::Call(s, layout_of(in), in.batch_first, in.reverse),
        gain_ih(in.gain_ih),
        gain_hh(in.gain_hh),
        gain_c(in.gain_c),
        shift_c(in.shift_c),
        norms{gain_ih.data(), gain_hh.data(), gain_c.data(), shift_c.data()},
        zoneout_h(zoneout_of(in.zoneout_h, in.seed, 0)),
        zoneout_c(zoneout_of(in.zoneout_c, in.seed, 1)) {}

 private:
  static Zoneout zoneout_of(double share, Maybe seed, int64_t place) {
    if (!seed.has_value()) return {{share, 0}, false};
    const Tensor values = seed->contiguous();
    return {{share, static_cast<uint64_t>(values.const_data_ptr<int64_t>()[place])}, true};
  }
};

template <class Int>
Tensors<9> allocate(const ForwardInputs& in, const Sizes<Int>& s) {
  const lstm::Results<Int> make{in.input, s, in.batch_sizes.has_value(), in.batch_first};
  const bool saves = in.return_gates && has_norms(in);
  const auto exact = in.input.options().dtype(at::toOpMathType(in.input.scalar_type()));
  auto make_exact = [&](std::initializer_list<Int> sizes) { return empty_of<Int>(exact, sizes); };
  return {make.sequence(s.H),
          make({s.B, s.H}),
          make({s.B, s.H}),
          make.saved_sequence(s.H * 4, in.return_gates),
          make.saved_sequence(s.H, in.return_gates),
          make.saved_sequence(s.H * 4, saves),
          make.saved_sequence(s.H * 4, saves),
          make.saved_sequence(s.H, saves),
          saves ? make.laid_out(Int(kNorms), true, make_exact) : make_exact({Int(0)})};
}

Tensors<9> forward_cpu(const ForwardInputs& in) {
  const Sizes64 s = check<int64_t>(in);
  Tensors<9> out = allocate(in, s);
  const auto& [output, hy, cy, gates, cells, normalized_ih, normalized_hh, normalized_c, scales] =
      out;
  const Call call(in, s);
  call.clear_padding(
      {&output, &gates, &cells, &normalized_ih, &normalized_hh, &normalized_c, &scales});
  const lstm::ForwardOperands layer(in, in, kAbsent);
  const bool saves = in.return_gates && has_norms(in);
  const Forward arguments = {
      .layer = layer.arguments(data(output), data(hy), data(cy), data_if(in.return_gates, gates),
                               data_if(in.return_gates, cells)),
      .norms = call.norms,
      .zoneout_h = call.zoneout_h,
      .zoneout_c = call.zoneout_c,
      .saved = {data_if(saves, normalized_ih), data_if(saves, normalized_hh),
                data_if(saves, normalized_c), data_if(saves, scales)},
      .workspace = nullptr};
  const lstm::Schedule schedule = lstm::schedule_forward(s, in.input.element_size(), false);
  launch(SEQMEM_CHOOSE(forward_kernel), schedule.threads, arguments, storage_of(in.input),
         call.shape, schedule.plan);
  return out;
}

Tensors<9> forward_meta(const ForwardInputs& in) { return allocate(in, check<c10::SymInt>(in)); }

Tensors<11> allocate_gradients(const BackwardInputs& in, const auto& s) {
  const auto [of_input, of_state, of_weights] = in.output_mask;
  auto make = [&](bool wanted, const auto& size) {
    return lstm::empty_if(wanted, in.input, {size});
  };
  const bool norms = of_weights && has_norms(in);
  return std::tuple_cat(
      lstm::allocate_gradients(in.input, s, {of_input, of_state && in.hx.has_value(), of_weights}),
      std::tuple(make(of_weights && in.bias_ih.has_value(), s.H * 4),
                 make(of_weights && in.bias_hh.has_value(), s.H * 4), make(norms, s.H * 4),
                 make(norms, s.H * 4), make(norms, s.H), make(norms, s.H)));
}

Tensors<11> backward_cpu(const BackwardInputs& in) {
  const Sizes64 s = check_backward<int64_t>(in);
  Tensors<11> out = allocate_gradients(in, s);
  const auto& [grad_input, grad_hx, grad_cx, grad_weight_ih, grad_weight_hh, grad_bias_ih,
               grad_bias_hh, grad_gain_ih, grad_gain_hh, grad_gain_c, grad_shift_c] = out;
  const auto [of_input, of_state, of_weights] = in.output_mask;
  const bool norms = of_weights && has_norms(in);
  const Call call(in, s);
  call.clear_padding({&grad_input});
  const lstm::BackwardOperands layer(in, in, kAbsent, in.output, in.gates, in.cells, s.H);
  const Operand normalized_ih(in.normalized_ih), normalized_hh(in.normalized_hh),
      normalized_c(in.normalized_c), scales(in.scales);
  // The kernel only reads what the forward saved.
  auto saved = [](const Operand& t) { return const_cast<void*>(t.data()); };
  const Tensor& bias = grad_bias_ih.numel() > 0 ? grad_bias_ih : grad_bias_hh;
  const Backward arguments = {
      .layer = layer.arguments({of_input, of_state && in.hx.has_value(), of_weights}, out,
                               data_if(bias.numel() > 0, bias), nullptr),
      .norms = call.norms,
      .zoneout_h = call.zoneout_h,
      .zoneout_c = call.zoneout_c,
      .saved = {saved(normalized_ih), saved(normalized_hh), saved(normalized_c), saved(scales)},
      .grad_gain_ih = data_if(norms, grad_gain_ih),
      .grad_gain_hh = data_if(norms, grad_gain_hh),
      .grad_gain_c = data_if(norms, grad_gain_c),
      .grad_shift_c = data_if(norms, grad_shift_c),
      .workspace = nullptr};
  lstm::Schedule schedule = lstm::schedule_backward(s, in.input.element_size(), false);
  // A chunk has three gradients of gates then, not one.
  if (has_norms(in)) schedule.plan.chunk = std::max<int64_t>(1, schedule.plan.chunk / 2);
  launch(SEQMEM_CHOOSE(backward_kernel), schedule.threads, arguments, storage_of(in.input),
         call.shape, schedule.plan);
  if (grad_bias_ih.numel() > 0 && grad_bias_hh.numel() > 0) grad_bias_hh.copy_(grad_bias_ih);
  return out;
}

Tensors<11> backward_meta(const BackwardInputs& in) {
  return allocate_gradients(in, check_backward<c10::SymInt>(in));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
#define SEQMEM_INPUTS                                                                    \
  "Tensor input, Tensor? hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, "           \
  "Tensor? bias_ih, Tensor? bias_hh, Tensor? gain_ih, Tensor? gain_hh, Tensor? gain_c, " \
  "Tensor? shift_c, Tensor? seed, float zoneout_h, float zoneout_c, Tensor? lengths, "   \
  "Tensor? reset, Tensor? batch_sizes, bool batch_first, bool reverse, "
  ForwardOp::define<check<c10::SymInt>, forward_cpu, forward_meta>(
      m, "(" SEQMEM_INPUTS
         "bool return_gates) -> (Tensor output, Tensor hy, Tensor cy, Tensor gates, Tensor cells, "
         "Tensor normalized_ih, Tensor normalized_hh, Tensor normalized_c, Tensor scales)");
  BackwardOp::define<check_backward<c10::SymInt>, backward_cpu, backward_meta>(
      m,
      "(Tensor? grad_output, Tensor? grad_hy, Tensor? grad_cy, Tensor? grad_gates, "
      "Tensor? grad_cells, " SEQMEM_INPUTS
      "Tensor output, Tensor gates, Tensor cells, Tensor? normalized_ih, "
      "Tensor? normalized_hh, Tensor? normalized_c, Tensor? scales, bool[3] output_mask)"
      " -> (Tensor grad_input, Tensor grad_hx, Tensor grad_cx, Tensor grad_weight_ih, "
      "Tensor grad_weight_hh, Tensor grad_bias_ih, Tensor grad_bias_hh, Tensor grad_gain_ih, "
      "Tensor grad_gain_hh, Tensor grad_gain_c, Tensor grad_shift_c)");
}

#undef SEQMEM_INPUTS

}  // namespace seqmem::lstm_regularized
