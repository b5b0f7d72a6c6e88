// Checks that the ops of a machine, a controller with a memory of slots, share.
#pragma once

#include <ATen/OpMathType.h>

#include <string>

#include "check.h"
#include "machine.h"

namespace seqmem::machine {

template <class Int>
struct Sizes {
  Int T, B, I, C, N, M, R, P;  // R values are read; head_bias has P
  int64_t layers, kept;        // `kept` layers have a state

  // Of `saved`, as Shape::record().
  Int record() const { return kept * 5 * C + (layers - 1) * C + P; }
  Int checkpoints() const { return (T + kShortestSegment - 1) / kShortestSegment; }
};

// Sets T, B, I, N and M.
template <class Int>
void check_input_and_memory(const Check<Int>& check, Sizes<Int>& s, const at::Tensor& input,
                            const at::Tensor& memory) {
  check.dims("input", input, 3);
  s.T = check.size(input, 0);
  s.B = check.size(input, 1);
  s.I = check.size(input, 2);
  check.same_kind("memory", memory);
  check.dims("memory", memory, 3);
  s.N = check.size(memory, 1);
  s.M = check.size(memory, 2);
  TORCH_CHECK_VALUE(s.N > 0 && s.M > 0, check.op(), ": expected memory with slots, got shape ",
                    memory.sym_sizes());
}

// The layer [P, C] from the controller's output to the heads; `name` without _weight and _bias.
// Sets C.
template <class Int>
void check_head_layer(const Check<Int>& check, Sizes<Int>& s, const std::string& name,
                      const at::Tensor& weight, const at::Tensor& bias) {
  const std::string weight_name = name + "_weight";
  check.same_kind(weight_name.c_str(), weight);
  check.dims(weight_name.c_str(), weight, 2);
  s.C = check.size(weight, 1);
  TORCH_CHECK_VALUE(s.C > 0, check.op(), ": expected ", weight_name, " with columns, got shape ",
                    weight.sym_sizes());
  check.shape(weight_name.c_str(), weight, {s.P, s.C});
  check.operand((name + "_bias").c_str(), bias, {s.P});
}

template <class Int>
void check_state_size(const Check<Int>& check, at::TensorList state, size_t parts) {
  TORCH_CHECK_VALUE(state.size() == parts, check.op(), ": expected state of ", parts,
                    " tensors, got ", state.size());
}

template <class Int>
void check_initial_size(const Check<Int>& check, at::TensorList initial, size_t parts,
                        bool reset_given) {
  TORCH_CHECK_VALUE(initial.size() == parts || (initial.empty() && !reset_given), check.op(),
                    ": expected initial of ", parts, " tensors",
                    reset_given ? " beside reset" : ", or none", ", got ", initial.size());
}

// What a backward takes of its forward's, `width` values of `saved` a step, and the gradient of
// features.
template <class Int, class Inputs>
void check_saved(const Check<Int>& check, const Sizes<Int>& s, const Inputs& in, const Int& width,
                 std::initializer_list<Int> checkpoints) {
  const auto type = at::toOpMathType(in.input.scalar_type());
  check.operand("features", in.features, {s.T, s.B, s.C + s.R});
  check.typed("saved", in.saved, type, {s.T, s.B, width});
  check.typed("checkpoints", in.checkpoints, type, c10::ArrayRef<Int>(checkpoints));
  check.operand("grad_features", in.grad_features, {s.T, s.B, s.C + s.R});
}

// Sets s.layers and s.kept, the layers that have a state; s has I, C and R, the values read.
template <class Int>
void check_controller(const Check<Int>& check, Sizes<Int>& s, at::TensorList controller,
                      bool lstm) {
  const int64_t each = lstm ? 4 : 2, count = static_cast<int64_t>(controller.size());
  TORCH_CHECK_VALUE(count > 0 && count % each == 0, check.op(), ": expected ", each,
                    " controller tensors a layer, got ", count, " in all");
  s.layers = count / each;
  s.kept = lstm ? s.layers : 0;
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

}  // namespace seqmem::machine
