// The LSTM ops' arguments and their checks, the same for every device and grad mode.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../common/check.h"

namespace seqmem::lstm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class Int>
struct Sizes {
  Int T, B, I, H, P, rows;  // rows: of the packed input, else 0
};

template <class Int>
Sizes<Int> check_weights(const Check<Int>& check, const Tensor& input, const Tensor& weight_ih,
                         const Tensor& weight_hh, const OptionalTensor& bias_ih,
                         const OptionalTensor& bias_hh, const OptionalTensor& weight_hr) {
  Sizes<Int> s;
  check.same_kind("weight_ih", weight_ih);
  check.dims("weight_ih", weight_ih, 2);
  s.H = check.size(weight_ih, 0) / 4;
  s.I = check.size(input, input.dim() - 1);
  s.P = s.H;
  TORCH_CHECK_VALUE(s.H > 0, check.op(), ": expected weight_ih of shape [4 * hidden_size, ", s.I,
                    "] with hidden_size > 0, got ", weight_ih.sym_sizes());
  if (weight_hr.has_value()) {
    check.same_kind("weight_hr", *weight_hr);
    check.dims("weight_hr", *weight_hr, 2);
    s.P = check.size(*weight_hr, 0);
    TORCH_CHECK_VALUE(s.P > 0, check.op(), ": expected weight_hr with at least one row, got ",
                      weight_hr->sym_sizes());
    check.shape("weight_hr", *weight_hr, {s.P, s.H});
  }
  check.shape("weight_ih", weight_ih, {s.H * 4, s.I});
  check.operand("weight_hh", weight_hh, {s.H * 4, s.P});
  check.operand("bias_ih", bias_ih, {s.H * 4});
  check.operand("bias_hh", bias_hh, {s.H * 4});
  return s;
}

template <class Int>
void check_state(const Check<Int>& check, const OptionalTensor& hx, const OptionalTensor& cx,
                 const Sizes<Int>& s) {
  check.together("hx", hx.has_value(), "cx", cx.has_value());
  check.operand("hx", hx, {s.B, s.P});
  check.operand("cx", cx, {s.B, s.H});
}

template <class Int>
Sizes<Int> check_lstm_cell(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                           const Tensor& weight_ih, const Tensor& weight_hh,
                           const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const Check<Int> check("seqmem::lstm_cell", input);
  check.floating_input();
  check.dims("input", input, 2);
  Sizes<Int> s = check_weights(check, input, weight_ih, weight_hh, bias_ih, bias_hh, {});
  s.T = 1;
  s.B = check.size(input, 0);
  s.rows = 0;
  check_state(check, hx, cx, s);
  return s;
}

// lengths and batch_sizes hold values that only real tensors show; `values` asks to check them.
void check_lengths(const Tensor& lengths, int64_t T);
void check_batch_sizes(const Tensor& batch_sizes, int64_t rows);

template <class Int>
Sizes<Int> check_lstm(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                      const Tensor& weight_ih, const Tensor& weight_hh,
                      const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                      const OptionalTensor& weight_hr, const OptionalTensor& lengths,
                      const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                      bool batch_first, bool values) {
  const Check<Int> check("seqmem::lstm", input);
  check.floating_input();
  const bool packed = batch_sizes.has_value();
  check.dims("input", input, packed ? 2 : 3);
  Sizes<Int> s = check_weights(check, input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr);
  if (packed) {
    TORCH_CHECK_VALUE(!lengths.has_value() && !reset.has_value() && !batch_first, check.op(),
                      ": expected a packed input (batch_sizes) without lengths, reset and "
                      "batch_first, got one of them");
    check.strided("batch_sizes", *batch_sizes);
    TORCH_CHECK_TYPE(batch_sizes->scalar_type() == at::kLong, check.op(),
                     ": expected batch_sizes of dtype int64, got ", batch_sizes->scalar_type());
    check.dims("batch_sizes", *batch_sizes, 1);
    s.T = check.size(*batch_sizes, 0);
    s.rows = check.size(input, 0);
    if (values) check_batch_sizes(*batch_sizes, input.size(0));
    if (hx.has_value()) {
      check.dims("hx", *hx, 2);
      s.B = check.size(*hx, 0);
    }
    if (values) s.B = s.T == 0 ? 0 : batch_sizes->template const_data_ptr<int64_t>()[0];
    TORCH_CHECK_VALUE(values || hx.has_value(), check.op(),
                      ": expected hx and cx beside batch_sizes where values cannot be seen "
                      "(meta tensors, tracing), got neither");
  } else {
    s.T = check.size(input, batch_first ? 1 : 0);
    s.B = check.size(input, batch_first ? 0 : 1);
    s.rows = 0;
  }
  TORCH_CHECK_VALUE(s.T > 0, check.op(), ": expected at least one time step, got input of shape ",
                    input.sym_sizes());
  check_state(check, hx, cx, s);
  if (lengths.has_value()) {
    check.strided("lengths", *lengths);
    TORCH_CHECK_TYPE(lengths->scalar_type() == at::kLong || lengths->scalar_type() == at::kInt,
                     check.op(), ": expected lengths of dtype int64 or int32, got ",
                     lengths->scalar_type());
    if (!lengths->is_cpu()) check.same_device("lengths", *lengths);
    check.shape("lengths", *lengths, {s.B});
    if (values) check_lengths(*lengths, input.size(batch_first ? 1 : 0));
  }
  if (reset.has_value()) {
    check.strided("reset", *reset);
    TORCH_CHECK_TYPE(reset->scalar_type() == at::kBool, check.op(),
                     ": expected reset of dtype bool, got ", reset->scalar_type());
    check.same_device("reset", *reset);
    if (batch_first) {
      check.shape("reset", *reset, {s.B, s.T});
    } else {
      check.shape("reset", *reset, {s.T, s.B});
    }
  }
  return s;
}

}  // namespace seqmem::lstm
