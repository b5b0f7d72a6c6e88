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
          return_gates ? empty_like_of<Int>(input, {s.B, s.H * 4})
                       : empty_like_of<Int>(input, {Int(0)})};
}

Tensors<3> cell_cpu(const CellInputs& in) {
  const Sizes64 s = check_cell<int64_t>(in);
  Tensors<3> out = allocate_cell(in.input, s, in.return_gates);
  const auto& [hy, cy, gates] = out;
  const Call call(s);
  const Operand input(in.input), hx(in.hx), cx(in.cx), weight_ih(in.weight_ih),
      weight_hh(in.weight_hh), bias_ih(in.bias_ih), bias_hh(in.bias_hh);
  run_forward(call, s, in.input,
              {.input = input.data(),
               .hx = hx.data(),
               .cx = cx.data(),
               .weight_ih = weight_ih.data(),
               .weight_hh = weight_hh.data(),
               .bias_ih = bias_ih.data(),
               .bias_hh = bias_hh.data(),
               .weight_hr = nullptr,
               .output = data(hy),
               .hy = nullptr,
               .cy = nullptr,
               .gates = data_if(in.return_gates, gates),
               .cells = data(cy),
               .workspace = nullptr});
  return out;
}

Tensors<3> cell_meta(const CellInputs& in) {
  return allocate_cell(in.input, check_cell<c10::SymInt>(in), in.return_gates);
}

// Gradients for: input; hx and cx; weights and bias. What is not asked for stays empty.
template <class Int>
Tensors<6> allocate_cell_gradients(const Tensor& input, const Sizes<Int>& s, bool has_bias,
                                   std::array<bool, 3> mask) {
  auto make = [&](bool wanted, std::initializer_list<Int> sizes) {
    return wanted ? empty_like_of<Int>(input, sizes) : empty_like_of<Int>(input, {Int(0)});
  };
  return {make(mask[0], {s.B, s.I}),     make(mask[1], {s.B, s.H}),
          make(mask[1], {s.B, s.H}),     make(mask[2], {s.H * 4, s.I}),
          make(mask[2], {s.H * 4, s.H}), make(mask[2] && has_bias, {s.H * 4})};
}

Tensors<6> cell_backward_cpu(const CellBackwardInputs& in) {
  const Sizes64 s = check_cell_backward<int64_t>(in);
  const auto [of_input, of_state, of_weights] = in.output_mask;
  Tensors<6> out = allocate_cell_gradients(in.input, s, in.has_bias, in.output_mask);
  const auto& [grad_input, grad_hx, grad_cx, grad_weight_ih, grad_weight_hh, grad_bias] = out;
  const Call call(s);
  const RowsGradient grad_hy(in.grad_hy, s.H);
  const Operand grad_cy(in.grad_cy), grad_gates(in.grad_gates), input(in.input), hx(in.hx),
      cx(in.cx), weight_ih(in.weight_ih), weight_hh(in.weight_hh), gates(in.gates), cy(in.cy);
  run_backward(call, s, in.input,
               {.grad_output = grad_hy.data(),
                .grad_output_step = grad_hy.step(),
                .grad_hy = nullptr,
                .grad_cy = grad_cy.data(),
                .grad_gates = grad_gates.data(),
                .grad_cells = nullptr,
                .input = input.data(),
                .hx = hx.data(),
                .cx = cx.data(),
                .weight_ih = weight_ih.data(),
                .weight_hh = weight_hh.data(),
                .weight_hr = nullptr,
                .output = nullptr,
                .gates = gates.data(),
                .cells = cy.data(),
                .grad_input = data_if(of_input, grad_input),
                .grad_hx = data_if(of_state, grad_hx),
                .grad_cx = data_if(of_state, grad_cx),
                .grad_weight_ih = data_if(of_weights, grad_weight_ih),
                .grad_weight_hh = data_if(of_weights, grad_weight_hh),
                .grad_bias = data_if(of_weights && in.has_bias, grad_bias),
                .grad_weight_hr = nullptr,
                .workspace = nullptr});
  return out;
}

Tensors<6> cell_backward_meta(const CellBackwardInputs& in) {
  return allocate_cell_gradients(in.input, check_cell_backward<c10::SymInt>(in), in.has_bias,
                                 in.output_mask);
}

template <class Int>
Tensors<5> allocate_sequence(const Results<Int>& make, bool return_gates) {
  const Sizes<Int>& s = make.s;
  return {make.sequence(s.P), make({s.B, s.P}), make({s.B, s.H}),
          make.saved_sequence(s.H * 4, return_gates), make.sequence(s.H, return_gates)};
}

Tensors<5> sequence_cpu(const SequenceInputs& in) {
  const Sizes64 s = check_sequence<int64_t>(in);
  Tensors<5> out = allocate_sequence(Results<int64_t>{in.input, s, in.batch_sizes.has_value(),
                                                      in.batch_first, in.lengths.has_value()},
                                     in.return_gates);
  const auto& [output, hy, cy, gates, cells] = out;
  const Call call(s, in, in.batch_first, in.reverse);
  const Operand input(in.input), hx(in.hx), cx(in.cx), weight_ih(in.weight_ih),
      weight_hh(in.weight_hh), bias_ih(in.bias_ih), bias_hh(in.bias_hh), weight_hr(in.weight_hr);
  run_forward(call, s, in.input,
              {.input = input.data(),
               .hx = hx.data(),
               .cx = cx.data(),
               .weight_ih = weight_ih.data(),
               .weight_hh = weight_hh.data(),
               .bias_ih = bias_ih.data(),
               .bias_hh = bias_hh.data(),
               .weight_hr = weight_hr.data(),
               .output = data(output),
               .hy = data(hy),
               .cy = data(cy),
               .gates = data_if(in.return_gates, gates),
               .cells = data_if(in.return_gates, cells),
               .workspace = nullptr});
  return out;
}

Tensors<5> sequence_meta(const SequenceInputs& in) {
  const auto s = check_sequence<c10::SymInt>(in);
  return allocate_sequence(
      Results<c10::SymInt>{in.input, s, in.batch_sizes.has_value(), in.batch_first, false},
      in.return_gates);
}

template <class Int>
Tensors<7> allocate_gradients(const Tensor& input, const Sizes<Int>& s, bool projected,
                              bool has_bias, bool padded, std::array<bool, 3> mask) {
  auto make = [&](bool wanted, std::initializer_list<Int> sizes) {
    return wanted ? empty_like_of<Int>(input, sizes) : empty_like_of<Int>(input, {Int(0)});
  };
  Tensor grad_input = mask[0] ? at::empty_symint(input.sym_sizes(), input.options())
                              : empty_like_of<Int>(input, {Int(0)});
  return {padded ? grad_input.zero_() : grad_input,
          make(mask[1], {s.B, s.P}),
          make(mask[1], {s.B, s.H}),
          make(mask[2], {s.H * 4, s.I}),
          make(mask[2], {s.H * 4, s.P}),
          make(mask[2] && has_bias, {s.H * 4}),
          make(mask[2] && projected, {s.P, s.H})};
}

Tensors<7> sequence_backward_cpu(const SequenceBackwardInputs& in) {
  const Sizes64 s = check_sequence_backward<int64_t>(in);
  const bool projected = in.weight_hr.has_value();
  const auto [of_input, of_state, of_weights] = in.output_mask;
  Tensors<7> out = allocate_gradients(in.input, s, projected, in.has_bias, in.lengths.has_value(),
                                      in.output_mask);
  const auto& [grad_input, grad_hx, grad_cx, grad_weight_ih, grad_weight_hh, grad_bias,
               grad_weight_hr] = out;
  const Call call(s, in, in.batch_first, in.reverse);
  const RowsGradient grad_output(in.grad_output, s.P);
  const Operand grad_hy(in.grad_hy), grad_cy(in.grad_cy), grad_gates(in.grad_gates),
      grad_cells(in.grad_cells), input(in.input), hx(in.hx), cx(in.cx), weight_ih(in.weight_ih),
      weight_hh(in.weight_hh), weight_hr(in.weight_hr), output(in.output), gates(in.gates),
      cells(in.cells);
  run_backward(call, s, in.input,
               {.grad_output = grad_output.data(),
                .grad_output_step = grad_output.step(),
                .grad_hy = grad_hy.data(),
                .grad_cy = grad_cy.data(),
                .grad_gates = grad_gates.data(),
                .grad_cells = grad_cells.data(),
                .input = input.data(),
                .hx = hx.data(),
                .cx = cx.data(),
                .weight_ih = weight_ih.data(),
                .weight_hh = weight_hh.data(),
                .weight_hr = weight_hr.data(),
                .output = output.data(),
                .gates = gates.data(),
                .cells = cells.data(),
                .grad_input = data_if(of_input, grad_input),
                .grad_hx = data_if(of_state, grad_hx),
                .grad_cx = data_if(of_state, grad_cx),
                .grad_weight_ih = data_if(of_weights, grad_weight_ih),
                .grad_weight_hh = data_if(of_weights, grad_weight_hh),
                .grad_bias = data_if(of_weights && in.has_bias, grad_bias),
                .grad_weight_hr = data_if(of_weights && projected, grad_weight_hr),
                .workspace = nullptr});
  return out;
}

Tensors<7> sequence_backward_meta(const SequenceBackwardInputs& in) {
  return allocate_gradients(in.input, check_sequence_backward<c10::SymInt>(in),
                            in.weight_hr.has_value(), in.has_bias, false, in.output_mask);
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
