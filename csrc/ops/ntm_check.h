// The whole-sequence NTM's arguments and their checks, the same for every device and grad mode.
#pragma once

#include <array>
#include <string_view>
#include <vector>

#include "../common/check.h"
#include "../common/machine_check.h"
#include "../common/op.h"
#include "../cpu/ntm_kernel.h"

namespace seqmem::ntm {

using at::Tensor;
using at::TensorList;

// Gradients are asked for of: input; the state; the parameters; initial.
using Mask = std::array<bool, 4>;

struct Inputs {
  In input, hidden, cell, memory, weightings, reads;
  TensorList controller;
  In head_weight, head_bias;
  TensorList initial;
  Maybe lengths, reset;
};

struct Options {
  std::string_view heads;
  int64_t shift_range;
  bool lstm, squash;
};

struct ForwardInputs : Inputs, Options {
  bool trace, save;
};

struct Gradients {
  Maybe grad_features, grad_hidden, grad_cell, grad_memory, grad_weightings, grad_reads, grad_trace;
};

struct Saved {
  In features, trace, saved, checkpoints;
};

struct BackwardInputs : Gradients, Inputs, Saved, Options {
  Mask output_mask;
};

template <class Int>
struct Sizes : machine::Sizes<Int> {
  int64_t heads, reads;  // heads in all, read heads
};

// A state, or the gradients of one where they are given.
template <class Int, class T>
void check_state(const Check<Int>& check, const Sizes<Int>& s, const char* const (&names)[5],
                 const T& hidden, const T& cell, const T& memory, const T& weightings,
                 const T& reads) {
  check.operand(names[0], hidden, {Int(s.kept), s.B, s.C});
  check.operand(names[1], cell, {Int(s.kept), s.B, s.C});
  check.operand(names[2], memory, {s.B, s.N, s.M});
  check.operand(names[3], weightings, {s.B, Int(s.heads), s.N});
  check.operand(names[4], reads, {s.B, Int(s.reads), s.M});
}

template <class Int>
void check_initial(const Check<Int>& check, const Sizes<Int>& s, TensorList initial) {
  if (initial.empty()) return;
  check.operand("initial.hidden", initial[0], {Int(s.kept), s.C});
  check.operand("initial.cell", initial[1], {Int(s.kept), s.C});
  check.operand("initial.memory", initial[2], {s.N, s.M});
  check.operand("initial.weightings", initial[3], {Int(s.heads), s.N});
  check.operand("initial.reads", initial[4], {Int(s.reads), s.M});
}

template <class Int>
Sizes<Int> check_inputs(const Check<Int>& check, const Inputs& in, const Options& options) {
  check.floating_input();
  Sizes<Int> s;
  machine::check_input_and_memory(check, s, in.input, in.memory);
  s.heads = static_cast<int64_t>(options.heads.size());
  s.reads = 0;
  int64_t writes = 0;
  for (const char kind : options.heads) {
    s.reads += kind == 'r';
    writes += kind == 'w';
  }
  TORCH_CHECK_VALUE(s.heads > 0 && s.reads + writes == s.heads, check.op(),
                    ": expected heads to be a string of 'w' and 'r', got '", options.heads, "'");
  TORCH_CHECK_VALUE(options.shift_range >= 0 && s.N / 2 >= options.shift_range, check.op(),
                    ": expected shift_range in 0..", s.N / 2, " for ", s.N, " slots, got ",
                    options.shift_range);
  s.R = s.M * s.reads;
  s.P = (s.M + 2 * options.shift_range + 4) * s.heads + s.M * (2 * writes);
  machine::check_head_layer(check, s, "head", in.head_weight, in.head_bias);
  machine::check_controller(check, s, in.controller, options.lstm);
  check_state(check, s, {"hidden", "cell", "memory", "weightings", "reads"}, in.hidden, in.cell,
              in.memory, in.weightings, in.reads);
  machine::check_initial_size(check, in.initial, 5, in.reset.has_value());
  check_initial(check, s, in.initial);
  check.lengths(in.lengths, s.B, s.T);
  check.reset(in.reset, s.T, s.B);
  return s;
}

inline constexpr char kName[] = "seqmem::ntm", kBackwardName[] = "seqmem::ntm_backward";

using ForwardOp =
    Op<kName, Tensors<9>(In, In, In, In, In, In, TensorList, In, In, TensorList, Maybe, Maybe,
                         std::string_view, int64_t, bool, bool, bool, bool)>;
using BackwardOp =
    Op<kBackwardName,
       std::vector<Tensor>(Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, In, In, In, In, In, In,
                           TensorList, In, In, TensorList, Maybe, Maybe, In, In, In, In,
                           std::string_view, int64_t, bool, bool, Mask)>;

template <class Int>
Sizes<Int> check(const ForwardInputs& in) {
  return check_inputs(Check<Int>(kName, in.input), in, in);
}

template <class Int>
Sizes<Int> check_backward(const BackwardInputs& in) {
  const Check<Int> check(kBackwardName, in.input);
  const auto s = check_inputs(check, in, in);
  machine::check_saved<Int>(check, s, in, s.record(),
                            {s.checkpoints(), s.B, s.M, slot_stride(s.N)});
  check.operand("trace", in.trace, {s.T, s.B, Int(s.heads), s.N});
  check.operand("grad_trace", in.grad_trace, {s.T, s.B, Int(s.heads), s.N});
  check_state(check, s,
              {"grad_hidden", "grad_cell", "grad_memory", "grad_weightings", "grad_reads"},
              in.grad_hidden, in.grad_cell, in.grad_memory, in.grad_weightings, in.grad_reads);
  return s;
}

}  // namespace seqmem::ntm
