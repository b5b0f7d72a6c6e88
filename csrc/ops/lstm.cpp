// LSTM ops: schemas, the CPU and Meta keys. Arguments are described in seqmem_fast/ops/lstm.py.
#include <tuple>

#include "../common/team.h"
#include "lstm_call.h"

namespace seqmem::lstm {

namespace {

void run_forward(const Call& call, const Sizes64& s, const Tensor& like, const Forward& arguments) {
  const bool in_bf16 = runs_in_bf16(s, like.scalar_type(), call.shape.projected);
  const Schedule schedule = in_bf16
                                ? schedule_forward_in_bf16(s)
                                : schedule_forward(s, like.element_size(), call.shape.projected);
  launch(in_bf16 ? SEQMEM_CHOOSE_BF16(forward_kernel) : SEQMEM_CHOOSE(forward_kernel),
         schedule.threads, arguments, storage_of(like), call.shape, schedule.plan);
}

void run_backward(const Call& call, const Sizes64& s, const Tensor& like,
                  const Backward& arguments) {
  const bool in_bf16 = runs_in_bf16(s, like.scalar_type(), call.shape.projected);
  const Schedule schedule = in_bf16
                                ? schedule_backward_in_bf16(s)
                                : schedule_backward(s, like.element_size(), call.shape.projected);
  launch(in_bf16 ? SEQMEM_CHOOSE_BF16(backward_kernel) : SEQMEM_CHOOSE(backward_kernel),
         schedule.threads, arguments, storage_of(like), call.shape, schedule.plan);
}

template <class Int>
Tensors<3> allocate_cell(const Tensor& input, const Sizes<Int>& s, bool return_gates) {
  return {empty_like_of<Int>(input, {s.B, s.H}), empty_like_of<Int>(input, {s.B, s.H}),
          empty_if<Int>(return_gates, input, {s.B, s.H * 4})};
}

Tensors<3> cell_cpu(const CellInputs& in) {
  const Sizes64 s = check_cell<int64_t>(in);
  Tensors<3> out = allocate_cell(in.input, s, in.return_gates);
  const auto& [hy, cy, gates] = out;
  const Call call(s);
  const ForwardOperands operands(in, in, kAbsent);
  run_forward(
      call, s, in.input,
      operands.arguments(data(hy), nullptr, nullptr, data_if(in.return_gates, gates), data(cy)));
  return out;
}

Tensors<3> cell_meta(const CellInputs& in) {
  return allocate_cell(in.input, check_cell<c10::SymInt>(in), in.return_gates);
}

Tensors<6> allocate_cell_gradients(const CellBackwardInputs& in, const auto& s) {
  const bool of_bias = in.output_mask[2] && in.has_bias;
  return std::tuple_cat(allocate_gradients(in.input, s, in.output_mask),
                        std::tuple(empty_if(of_bias, in.input, {s.H * 4})));
}

Tensors<6> cell_backward_cpu(const CellBackwardInputs& in) {
  const Sizes64 s = check_cell_backward<int64_t>(in);
  Tensors<6> out = allocate_cell_gradients(in, s);
  const BackwardOperands operands({in.grad_hy, kAbsent, in.grad_cy, in.grad_gates, kAbsent}, in,
                                  kAbsent, kAbsent, in.gates, in.cy, s.H);
  void* const grad_bias = data_if(in.output_mask[2] && in.has_bias, std::get<5>(out));
  run_backward(Call(s), s, in.input, operands.arguments(in.output_mask, out, grad_bias, nullptr));
  return out;
}

Tensors<6> cell_backward_meta(const CellBackwardInputs& in) {
  return allocate_cell_gradients(in, check_cell_backward<c10::SymInt>(in));
}

template <class Int>
Tensors<5> allocate_sequence(const Results<Int>& make, bool return_gates) {
  const Sizes<Int>& s = make.s;
  return {make.sequence(s.P), make({s.B, s.P}), make({s.B, s.H}),
          make.saved_sequence(s.H * 4, return_gates), make.saved_sequence(s.H, return_gates)};
}

Tensors<5> sequence_cpu(const SequenceInputs& in) {
  const Sizes64 s = check_sequence<int64_t>(in);
  Tensors<5> out = allocate_sequence(
      Results<int64_t>{in.input, s, in.batch_sizes.has_value(), in.batch_first}, in.return_gates);
  const auto& [output, hy, cy, gates, cells] = out;
  const Call call(s, in, in.batch_first, in.reverse);
  call.clear_padding({&output, &gates, &cells});
  const ForwardOperands operands(in, in, in.weight_hr);
  run_forward(call, s, in.input,
              operands.arguments(data(output), data(hy), data(cy), data_if(in.return_gates, gates),
                                 data_if(in.return_gates, cells)));
  return out;
}

Tensors<5> sequence_meta(const SequenceInputs& in) {
  const auto s = check_sequence<c10::SymInt>(in);
  return allocate_sequence(
      Results<c10::SymInt>{in.input, s, in.batch_sizes.has_value(), in.batch_first},
      in.return_gates);
}

Tensors<7> allocate_sequence_gradients(const SequenceBackwardInputs& in, const auto& s) {
  const bool of_weights = in.output_mask[2];
  return std::tuple_cat(
      allocate_gradients(in.input, s, in.output_mask),
      std::tuple(empty_if(of_weights && in.has_bias, in.input, {s.H * 4}),
                 empty_if(of_weights && in.weight_hr.has_value(), in.input, {s.P, s.H})));
}

Tensors<7> sequence_backward_cpu(const SequenceBackwardInputs& in) {
  const Sizes64 s = check_sequence_backward<int64_t>(in);
  Tensors<7> out = allocate_sequence_gradients(in, s);
  const bool of_weights = in.output_mask[2];
  const BackwardOperands operands(in, in, in.weight_hr, in.output, in.gates, in.cells, s.P);
  const Call call(s, in, in.batch_first, in.reverse);
  call.clear_padding({&std::get<0>(out)});
  run_backward(
      call, s, in.input,
      operands.arguments(in.output_mask, out, data_if(of_weights && in.has_bias, std::get<5>(out)),
                         data_if(of_weights && in.weight_hr.has_value(), std::get<6>(out))));
  return out;
}

Tensors<7> sequence_backward_meta(const SequenceBackwardInputs& in) {
  return allocate_sequence_gradients(in, check_sequence_backward<c10::SymInt>(in));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  CellOp::define<check_cell<c10::SymInt>, cell_cpu, cell_meta>(
      m,
      "(Tensor input, Tensor? hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, "
      "Tensor? bias_ih, Tensor? bias_hh, bool return_gates)"
      " -> (Tensor hy, Tensor cy, Tensor gates)");
  CellBackwardOp::define<check_cell_backward<c10::SymInt>, cell_backward_cpu, cell_backward_meta>(
      m,
      "(Tensor? grad_hy, Tensor? grad_cy, Tensor? grad_gates, Tensor input, Tensor? hx, "
      "Tensor? cx, Tensor weight_ih, Tensor weight_hh, Tensor gates, Tensor cy, bool has_bias, "
      "bool[3] output_mask)"
      " -> (Tensor grad_input, Tensor grad_hx, Tensor grad_cx, Tensor grad_weight_ih, "
      "Tensor grad_weight_hh, Tensor grad_bias)");
  SequenceOp::define<check_sequence<c10::SymInt>, sequence_cpu, sequence_meta>(m, kSequenceSchema);
  SequenceBackwardOp::define<check_sequence_backward<c10::SymInt>, sequence_backward_cpu,
                             sequence_backward_meta>(m, kSequenceBackwardSchema);
}

}  // namespace seqmem::lstm
