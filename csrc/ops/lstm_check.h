// The LSTM ops' signatures, their arguments by name, and the checks, which are the same for every
// device and grad mode.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../common/check.h"
#include "../common/op.h"

namespace seqmem::lstm {

using at::Tensor;

inline constexpr char kCell[] = "seqmem::lstm_cell", kSequence[] = "seqmem::lstm",
                      kCellBackward[] = "seqmem::lstm_cell_backward",
                      kSequenceBackward[] = "seqmem::lstm_backward";

using CellOp = Op<kCell, Tensors<3>(In, Maybe, Maybe, In, In, Maybe, Maybe, bool)>;
using CellBackwardOp = Op<kCellBackward, Tensors<6>(Maybe, Maybe, Maybe, In, Maybe, Maybe, In, In,
                                                    In, In, bool, std::array<bool, 3>)>;
using SequenceOp = Op<kSequence, Tensors<5>(In, Maybe, Maybe, In, In, Maybe, Maybe, Maybe, Maybe,
                                            Maybe, Maybe, bool, bool, bool)>;
using SequenceBackwardOp =
    Op<kSequenceBackward,
       Tensors<7>(Maybe, Maybe, Maybe, Maybe, Maybe, In, Maybe, Maybe, In, In, Maybe, Maybe, Maybe,
                  Maybe, In, In, In, bool, bool, bool, std::array<bool, 3>)>;

inline constexpr char kSequenceSchema[] =
    "(Tensor input, Tensor? hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, "
    "Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, Tensor? lengths, Tensor? reset, "
    "Tensor? batch_sizes, bool batch_first, bool reverse, bool return_gates)"
    " -> (Tensor output, Tensor hy, Tensor cy, Tensor gates, Tensor cells)";
inline constexpr char kSequenceBackwardSchema[] =
    "(Tensor? grad_output, Tensor? grad_hy, Tensor? grad_cy, Tensor? grad_gates, "
    "Tensor? grad_cells, Tensor input, Tensor? hx, Tensor? cx, Tensor weight_ih, "
    "Tensor weight_hh, Tensor? weight_hr, Tensor? lengths, Tensor? reset, Tensor? batch_sizes, "
    "Tensor output, Tensor gates, Tensor cells, bool has_bias, bool batch_first, bool reverse, "
    "bool[3] output_mask)"
    " -> (Tensor grad_input, Tensor grad_hx, Tensor grad_cx, Tensor grad_weight_ih, "
    "Tensor grad_weight_hh, Tensor grad_bias, Tensor grad_weight_hr)";

struct Step {
  In input;
  Maybe hx, cx;
  In weight_ih, weight_hh;
};
struct Biases {
  Maybe bias_ih, bias_hh;
};
struct Layout {
  Maybe weight_hr, lengths, reset, batch_sizes;
};

// What an op does not take, for checks and calls that it shares with one that does.
inline const OptionalTensor kAbsent;
inline const Biases kNoBiases = {kAbsent, kAbsent};

struct CellInputs : Step, Biases {
  bool return_gates;
};
struct SequenceInputs : Step, Biases, Layout {
  bool batch_first, reverse, return_gates;
};

struct CellGradients {
  Maybe grad_hy, grad_cy, grad_gates;
};
struct CellBackwardInputs : CellGradients, Step {
  In gates, cy;
  bool has_bias;
  std::array<bool, 3> output_mask;
};
struct SequenceGradients {
  Maybe grad_output, grad_hy, grad_cy, grad_gates, grad_cells;
};
struct Saved {
  In output, gates, cells;
};
struct SequenceBackwardInputs : SequenceGradients, Step, Layout, Saved {
  bool has_bias, batch_first, reverse;
  std::array<bool, 3> output_mask;
};

template <class Int>
struct Sizes {
  Int T, B, I, H, P, rows;  // rows: of the packed input, else 0
};

// The commonest mistake is an input that does not fit the module, so the weights decide what the
// input must be.
template <class Int>
Sizes<Int> check_weights(const Check<Int>& check, const Step& in, const Biases& biases,
                         Maybe weight_hr) {
  const auto& [input, hx, cx, weight_ih, weight_hh] = in;
  check.strided("weight_ih", weight_ih);
  TORCH_CHECK_TYPE(input.dtype() == weight_ih.dtype() || !weight_ih.is_floating_point(), check.op(),
                   ": expected input of weight_ih's dtype ", weight_ih.scalar_type(), ", got ",
                   input.scalar_type());
  check.same_kind("weight_ih", weight_ih);
  check.dims("weight_ih", weight_ih, 2);
  Sizes<Int> s;
  s.H = check.size(weight_ih, 0) / 4;
  s.I = check.size(weight_ih, 1);
  s.P = s.H;
  TORCH_CHECK_VALUE(s.H > 0 && check.size(weight_ih, 0) == s.H * 4, check.op(),
                    ": expected weight_ih of shape [4 * hidden_size, ", s.I,
                    "] with hidden_size > 0, got ", weight_ih.sym_sizes());
  TORCH_CHECK_VALUE(check.size(input, input.dim() - 1) == s.I, check.op(),
                    ": expected input of shape [..., ", s.I, "], got ", input.sym_sizes());
  if (weight_hr.has_value()) {
    check.same_kind("weight_hr", *weight_hr);
    check.dims("weight_hr", *weight_hr, 2);
    s.P = check.size(*weight_hr, 0);
    TORCH_CHECK_VALUE(s.P > 0, check.op(), ": expected weight_hr with at least one row, got ",
                      weight_hr->sym_sizes());
    check.shape("weight_hr", *weight_hr, {s.P, s.H});
  }
  check.operand("weight_hh", weight_hh, {s.H * 4, s.P});
  check.operand("bias_ih", biases.bias_ih, {s.H * 4});
  check.operand("bias_hh", biases.bias_hh, {s.H * 4});
  return s;
}

template <class Int>
void check_state(const Check<Int>& check, const Step& in, const Sizes<Int>& s) {
  check.together("hx", in.hx.has_value(), "cx", in.cx.has_value());
  check.operand("hx", in.hx, {s.B, s.P});
  check.operand("cx", in.cx, {s.B, s.H});
}

template <class Int>
Sizes<Int> check_step(const Check<Int>& check, const Step& in, const Biases& biases) {
  check.floating_input();
  check.dims("input", in.input, 2);
  Sizes<Int> s = check_weights(check, in, biases, kAbsent);
  s.T = 1;
  s.B = check.size(in.input, 0);
  s.rows = 0;
  check_state(check, in, s);
  return s;
}

template <class Int>
Sizes<Int> check_cell(const CellInputs& in) {
  return check_step(Check<Int>(kCell, in.input), in, in);
}

template <class Int>
Sizes<Int> check_cell_backward(const CellBackwardInputs& in) {
  const Check<Int> check(kCellBackward, in.input);
  const Sizes<Int> s = check_step(check, in, kNoBiases);
  check.operand("grad_hy", in.grad_hy, {s.B, s.H});
  check.operand("grad_cy", in.grad_cy, {s.B, s.H});
  check.operand("grad_gates", in.grad_gates, {s.B, s.H * 4});
  check.operand("gates", in.gates, {s.B, s.H * 4});
  check.operand("cy", in.cy, {s.B, s.H});
  return s;
}

// Of a packed input's rows; returns the batch. What batch_sizes holds shows only where it is real,
// elsewhere hx tells the batch.
template <class Int>
Int check_batch_sizes(const Check<Int>& check, const Step& in, In batch_sizes, const Int& rows) {
  check.strided("batch_sizes", batch_sizes);
  TORCH_CHECK_TYPE(batch_sizes.scalar_type() == at::kLong, check.op(),
                   ": expected batch_sizes of dtype int64, got ", batch_sizes.scalar_type());
  TORCH_CHECK_TYPE(batch_sizes.is_cpu() || (batch_sizes.is_meta() && in.input.is_meta()),
                   check.op(), ": expected batch_sizes on the cpu, got ", batch_sizes.device());
  check.dims("batch_sizes", batch_sizes, 1);
  if (batch_sizes.is_meta()) {
    TORCH_CHECK_VALUE(in.hx.has_value(), check.op(),
                      ": expected hx and cx beside batch_sizes where values cannot be seen "
                      "(meta tensors, tracing), got neither");
    check.same_kind("hx", *in.hx);
    check.dims("hx", *in.hx, 2);
    return check.size(*in.hx, 0);
  }
  const Tensor values = batch_sizes.contiguous();
  const int64_t* size = values.const_data_ptr<int64_t>();
  Int total = 0;
  for (int64_t t = 0; t < values.numel(); ++t) {
    TORCH_CHECK_VALUE(size[t] > 0 && (t == 0 || size[t] <= size[t - 1]), check.op(),
                      ": expected batch_sizes that are positive and never grow, got ", size[t],
                      " at step ", t);
    TORCH_CHECK_VALUE(rows - total >= size[t], check.op(), ": expected batch_sizes with sum ", rows,
                      " (the rows of input), got more");
    total += size[t];
  }
  TORCH_CHECK_VALUE(total == rows, check.op(), ": expected batch_sizes with sum ", rows,
                    " (the rows of input), got ", total);
  return values.numel() == 0 ? 0 : size[0];
}

template <class Int>
Sizes<Int> check_rows(const Check<Int>& check, const Step& in, const Biases& biases,
                      const Layout& layout, bool batch_first) {
  const auto& [weight_hr, lengths, reset, batch_sizes] = layout;
  const Tensor& input = in.input;
  check.floating_input();
  const bool packed = batch_sizes.has_value();
  check.dims("input", input, packed ? 2 : 3);
  Sizes<Int> s = check_weights(check, in, biases, weight_hr);
  if (packed) {
    TORCH_CHECK_VALUE(!lengths.has_value() && !reset.has_value() && !batch_first, check.op(),
                      ": expected a packed input (batch_sizes) without lengths, reset and "
                      "batch_first, got one of them");
    s.rows = check.size(input, 0);
    s.B = check_batch_sizes(check, in, *batch_sizes, s.rows);
    s.T = check.size(*batch_sizes, 0);
  } else {
    s.T = check.size(input, batch_first ? 1 : 0);
    s.B = check.size(input, batch_first ? 0 : 1);
    s.rows = 0;
  }
  TORCH_CHECK_VALUE(s.T > 0, check.op(), ": expected at least one time step, got input of shape ",
                    input.sym_sizes());
  check_state(check, in, s);
  check.lengths(lengths, s.B, s.T);
  check.reset(reset, batch_first ? s.B : s.T, batch_first ? s.T : s.B);
  return s;
}

template <class Int>
Sizes<Int> check_sequence(const SequenceInputs& in) {
  const Check<Int> check(kSequence, in.input);
  return check_rows(check, in, in, in, in.batch_first);
}

// The shape of a sequence of that width.
template <class Int>
std::vector<Int> rows_of(const Sizes<Int>& s, const Layout& layout, bool batch_first,
                         const Int& width) {
  if (layout.batch_sizes.has_value()) return {s.rows, width};
  return {batch_first ? s.B : s.T, batch_first ? s.T : s.B, width};
}

// What the backward of a layer takes beside its forward's arguments.
template <class Int>
void check_gradients(const Check<Int>& check, const Sizes<Int>& s, const SequenceGradients& in,
                     const Saved& saved, const Layout& layout, bool batch_first) {
  auto rows = [&](const char* name, const auto& t, const Int& width) {
    check.operand(name, t, c10::ArrayRef<Int>(rows_of(s, layout, batch_first, width)));
  };
  rows("grad_output", in.grad_output, s.P);
  check.operand("grad_hy", in.grad_hy, {s.B, s.P});
  check.operand("grad_cy", in.grad_cy, {s.B, s.H});
  rows("grad_gates", in.grad_gates, s.H * 4);
  rows("grad_cells", in.grad_cells, s.H);
  rows("output", saved.output, s.P);
  rows("gates", saved.gates, s.H * 4);
  rows("cells", saved.cells, s.H);
}

template <class Int>
Sizes<Int> check_sequence_backward(const SequenceBackwardInputs& in) {
  const Check<Int> check(kSequenceBackward, in.input);
  const Sizes<Int> s = check_rows(check, in, kNoBiases, in, in.batch_first);
  check_gradients(check, s, in, in, in, in.batch_first);
  return s;
}

}  // namespace seqmem::lstm
