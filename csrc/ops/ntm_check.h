// The whole-sequence NTM's arguments and their checks, the same for every device and grad mode.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>

#include "../common/check.h"

namespace seqmem::ntm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class Int>
struct Sizes {
  Int T, B, I, C, N, M, R, P;
  int64_t layers, heads, reads;  // how many; R values are read
};

// lengths hold values that only real tensors show.
inline void check_lengths(const Tensor& lengths, int64_t T) {
  const Tensor values = lengths.cpu().to(at::kLong).contiguous();
  const int64_t* length = values.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < values.numel(); ++b)
    TORCH_CHECK_VALUE(0 <= length[b] && length[b] <= T, "seqmem::ntm: expected lengths in 0..", T,
                      ", got ", length[b], " for batch row ", b);
}

template <class Int>
void check_state(const Check<Int>& check, const Sizes<Int>& s, int64_t kept, const Tensor& hidden,
                 const Tensor& cell, const Tensor& memory, const Tensor& weightings,
                 const Tensor& reads) {
  check.operand("hidden", hidden, {Int(kept), s.B, s.C});
  check.operand("cell", cell, {Int(kept), s.B, s.C});
  check.operand("memory", memory, {s.B, s.N, s.M});
  check.operand("weightings", weightings, {s.B, Int(s.heads), s.N});
  check.operand("reads", reads, {s.B, Int(s.reads), s.M});
}

template <class Int>
void check_initial(const Check<Int>& check, const Sizes<Int>& s, int64_t kept,
                   at::TensorList initial, bool needed) {
  TORCH_CHECK_VALUE(initial.size() == 5 || (initial.empty() && !needed), check.op(),
                    ": expected initial of 5 tensors", needed ? " beside reset" : ", or none",
                    ", got ", initial.size());
  if (initial.empty()) return;
  check.operand("initial.hidden", initial[0], {Int(kept), s.C});
  check.operand("initial.cell", initial[1], {Int(kept), s.C});
  check.operand("initial.memory", initial[2], {s.N, s.M});
  check.operand("initial.weightings", initial[3], {Int(s.heads), s.N});
  check.operand("initial.reads", initial[4], {Int(s.reads), s.M});
}

template <class Int>
void check_controller(const Check<Int>& check, Sizes<Int>& s, at::TensorList controller,
                      bool lstm) {
  const int64_t each = lstm ? 4 : 2, count = static_cast<int64_t>(controller.size());
  TORCH_CHECK_VALUE(count > 0 && count % each == 0, check.op(), ": expected ", each,
                    " controller tensors a layer, got ", count, " in all");
  s.layers = count / each;
  const Int rows = s.C * (lstm ? 4 : 1);
  for (int64_t i = 0; i < count; ++i) {
    const std::string name = "controller[" + std::to_string(i) + "]";
    const Int below = i < each ? s.I + s.R : s.C;
    if (i % each == 0) {
      check.operand(name.c_str(), controller[i], {rows, below});
    } else if (lstm && i % each == 1) {
      check.operand(name.c_str(), controller[i], {rows, s.C});
    } else {
      check.operand(name.c_str(), controller[i], {rows});
    }
  }
}

template <class Int>
Sizes<Int> check_ntm(const Tensor& input, const Tensor& hidden, const Tensor& cell,
                     const Tensor& memory, const Tensor& weightings, const Tensor& reads,
                     at::TensorList controller, const Tensor& head_weight, const Tensor& head_bias,
                     at::TensorList initial, const OptionalTensor& lengths,
                     const OptionalTensor& reset, std::string_view heads, int64_t shift_range,
                     bool lstm, bool values) {
  const Check<Int> check("seqmem::ntm", input);
  check.floating_input();
  check.dims("input", input, 3);
  Sizes<Int> s;
  s.T = check.size(input, 0);
  s.B = check.size(input, 1);
  s.I = check.size(input, 2);
  check.same_kind("memory", memory);
  check.dims("memory", memory, 3);
  s.N = check.size(memory, 1);
  s.M = check.size(memory, 2);
  TORCH_CHECK_VALUE(s.N > 0 && s.M > 0, check.op(), ": expected memory with slots, got shape ",
                    memory.sym_sizes());
  s.heads = static_cast<int64_t>(heads.size());
  s.reads = 0;
  int64_t writes = 0;
  for (const char kind : heads) {
    s.reads += kind == 'r';
    writes += kind == 'w';
  }
  TORCH_CHECK_VALUE(s.heads > 0 && s.reads + writes == s.heads, check.op(),
                    ": expected heads to be a string of 'w' and 'r', got '", heads, "'");
  TORCH_CHECK_VALUE(shift_range >= 0 && s.N / 2 >= shift_range, check.op(),
                    ": expected shift_range in 0..", s.N / 2, " for ", s.N, " slots, got ",
                    shift_range);
  s.R = s.M * s.reads;
  s.P = (s.M + 2 * shift_range + 4) * s.heads + s.M * (2 * writes);
  check.same_kind("head_weight", head_weight);
  check.dims("head_weight", head_weight, 2);
  s.C = check.size(head_weight, 1);
  TORCH_CHECK_VALUE(s.C > 0, check.op(), ": expected head_weight with columns, got shape ",
                    head_weight.sym_sizes());
  check.shape("head_weight", head_weight, {s.P, s.C});
  check.operand("head_bias", head_bias, {s.P});
  check_controller(check, s, controller, lstm);
  const int64_t kept = lstm ? s.layers : 0;
  check_state(check, s, kept, hidden, cell, memory, weightings, reads);
  check_initial(check, s, kept, initial, reset.has_value());
  if (lengths.has_value()) {
    check.strided("lengths", *lengths);
    TORCH_CHECK_TYPE(lengths->scalar_type() == at::kLong || lengths->scalar_type() == at::kInt,
                     check.op(), ": expected lengths of dtype int64 or int32, got ",
                     lengths->scalar_type());
    if (!lengths->is_cpu()) check.same_device("lengths", *lengths);
    check.shape("lengths", *lengths, {s.B});
    if (values) check_lengths(*lengths, input.size(0));
  }
  if (reset.has_value()) {
    check.strided("reset", *reset);
    TORCH_CHECK_TYPE(reset->scalar_type() == at::kBool, check.op(),
                     ": expected reset of dtype bool, got ", reset->scalar_type());
    check.same_device("reset", *reset);
    check.shape("reset", *reset, {s.T, s.B});
  }
  return s;
}

}  // namespace seqmem::ntm
