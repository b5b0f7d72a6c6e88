// The arguments of the memory with least recently used access and their checks, the same for every
// device and grad mode.
#pragma once

#include <array>

#include "../common/check.h"
#include "../common/machine_check.h"
#include "../common/op.h"
#include "../cpu/lrua_kernel.h"

namespace seqmem::lrua {

using at::Tensor;
using at::TensorList;

// Gradients are asked for of: input; the state; the parameters; initial.
using Mask = std::array<bool, 4>;

struct Inputs {
  In input;
  TensorList state, controller;
  In head_weight, head_bias;
  TensorList initial;
  Maybe lengths, reset;
};

struct Options {
  bool lstm, own_add, strength, erase_all;
  double gamma;
};

struct ForwardInputs : Inputs, Options {
  bool trace, save;
};

struct Gradients {
  Maybe grad_features, grad_hidden, grad_cell, grad_memory, grad_read_weights, grad_reads,
      grad_write_trace, grad_read_trace;
};

struct Saved {
  In features, read_trace, slots, saved, checkpoints;
};

struct BackwardInputs : Gradients, Inputs, Saved, Options {
  Mask output_mask;
};

// The parts of a state, and how a call's arguments name them.
enum Part { kHidden, kCell, kMemory, kUsage, kReadWeights, kReads, kParts };

template <class Int>
struct Sizes : machine::Sizes<Int> {
  Int heads;
};

template <class Int>
void check_state(const Check<Int>& check, const Sizes<Int>& s, TensorList state) {
  check.operand("hidden", state[kHidden], {Int(s.kept), s.B, s.C});
  check.operand("cell", state[kCell], {Int(s.kept), s.B, s.C});
  check.operand("memory", state[kMemory], {s.B, s.N, s.M});
  check.operand("usage", state[kUsage], {s.B, s.N});
  check.operand("read_weights", state[kReadWeights], {s.B, s.heads, s.N});
  check.operand("reads", state[kReads], {s.B, s.heads, s.M});
}

template <class Int>
void check_initial(const Check<Int>& check, const Sizes<Int>& s, TensorList initial) {
  if (initial.empty()) return;
  check.operand("initial.hidden", initial[kHidden], {Int(s.kept), s.C});
  check.operand("initial.cell", initial[kCell], {Int(s.kept), s.C});
  check.operand("initial.memory", initial[kMemory], {s.N, s.M});
  check.operand("initial.usage", initial[kUsage], {s.N});
  check.operand("initial.read_weights", initial[kReadWeights], {s.heads, s.N});
  check.operand("initial.reads", initial[kReads], {s.heads, s.M});
}

template <class Int>
Sizes<Int> check_inputs(const Check<Int>& check, const Inputs& in, const Options& options) {
  check.floating_input();
  machine::check_state_size(check, in.state, kParts);
  Sizes<Int> s;
  machine::check_input_and_memory(check, s, in.input, in.state[kMemory]);
  const Tensor& weights = in.state[kReadWeights];
  check.same_kind("read_weights", weights);
  check.dims("read_weights", weights, 3);
  s.heads = check.size(weights, 1);
  TORCH_CHECK_VALUE(s.heads > 0 && s.N >= s.heads, check.op(), ": expected 1..", s.N,
                    " heads in read_weights for ", s.N, " slots, got ", s.heads);
  TORCH_CHECK_VALUE(0 <= options.gamma && options.gamma <= 1, check.op(),
                    ": expected gamma in 0..1, got ", options.gamma);
  s.R = s.M * s.heads;
  s.P = (s.M * (options.own_add ? 2 : 1) + (options.strength ? 2 : 1)) * s.heads;
  machine::check_head_layer(check, s, "head", in.head_weight, in.head_bias);
  machine::check_controller(check, s, in.controller, options.lstm);
  check_state(check, s, in.state);
  machine::check_initial_size(check, in.initial, kParts, in.reset.has_value());
  check_initial(check, s, in.initial);
  check.lengths(in.lengths, s.B, s.T);
  check.reset(in.reset, s.T, s.B);
  return s;
}

inline constexpr char kName[] = "seqmem::lrua", kBackwardName[] = "seqmem::lrua_backward";

using ForwardOp = Op<kName, Tensors<13>(In, TensorList, TensorList, In, In, TensorList, Maybe,
                                        Maybe, bool, bool, bool, bool, double, bool, bool)>;
using BackwardOp = Op<kBackwardName, std::vector<Tensor>(
                                         Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, In,
                                         TensorList, TensorList, In, In, TensorList, Maybe, Maybe,
                                         In, In, In, In, In, bool, bool, bool, bool, double, Mask)>;

template <class Int>
Sizes<Int> check(const ForwardInputs& in) {
  return check_inputs(Check<Int>(kName, in.input), in, in);
}

template <class Int>
Sizes<Int> check_backward(const BackwardInputs& in) {
  const Check<Int> check(kBackwardName, in.input);
  const auto s = check_inputs(check, in, in);
  const Int kept(s.kept), heads = s.heads;
  machine::check_saved<Int>(check, s, in, s.record(),
                            {s.checkpoints(), s.B, s.M, slot_stride(s.N)});
  check.operand("read_trace", in.read_trace, {s.T, s.B, heads, s.N});
  check.typed("slots", in.slots, at::kLong, {s.T, s.B, heads});
  check.operand("grad_hidden", in.grad_hidden, {kept, s.B, s.C});
  check.operand("grad_cell", in.grad_cell, {kept, s.B, s.C});
  check.operand("grad_memory", in.grad_memory, {s.B, s.N, s.M});
  check.operand("grad_read_weights", in.grad_read_weights, {s.B, heads, s.N});
  check.operand("grad_reads", in.grad_reads, {s.B, heads, s.M});
  check.operand("grad_write_trace", in.grad_write_trace, {s.T, s.B, heads, s.N});
  check.operand("grad_read_trace", in.grad_read_trace, {s.T, s.B, heads, s.N});
  return s;
}

}  // namespace seqmem::lrua
