// The arguments of the Differentiable Neural Computer and their checks, the same for every device
// and grad mode.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../common/check.h"
#include "../common/machine_check.h"
#include "../common/op.h"
#include "../cpu/dnc_kernel.h"

namespace seqmem::dnc {

using at::Tensor;
using at::TensorList;

// Gradients are asked for of: input; the state; the parameters; initial.
using Mask = std::array<bool, 4>;

struct Inputs {
  In input;
  TensorList state, controller;
  In interface_weight, interface_bias;
  TensorList norm, initial;
  Maybe lengths, reset;
};

struct Options {
  std::string_view options;
  double norm_floor, eps, mask_min;
};

struct ForwardInputs : Inputs, Options {
  bool trace, save;
};

struct Gradients {
  Maybe grad_features, grad_hidden, grad_cell, grad_memory, grad_usage, grad_link, grad_precedence,
      grad_write_weights, grad_read_weights, grad_reads, grad_usage_trace, grad_write_trace,
      grad_read_trace;
};

struct Saved {
  In features, usage_trace, write_trace, read_trace, saved, checkpoints;
};

struct BackwardInputs : Gradients, Inputs, Saved, Options {
  Mask output_mask;
};

// The parts of a state.
enum Part {
  kHidden,
  kCell,
  kMemory,
  kUsage,
  kLink,
  kPrecedence,
  kWriteWeights,
  kReadWeights,
  kReads,
  kParts
};
constexpr const char* kPartNames[kParts] = {"hidden",        "cell",         "memory",
                                            "usage",         "link",         "precedence",
                                            "write_weights", "read_weights", "reads"};

// The words of `options`.
struct Flags {
  bool squash = false, usage_gradient = false, masks = false, deallocate = false, sharpen = false,
       links = false, softplus = false, softmax = false, lstm = false;

  Flags(const char* op, std::string_view words) {
    for (std::string_view rest = words; !rest.empty();) {
      const size_t end = std::min(rest.find(' '), rest.size());
      bool* const flag = find(rest.substr(0, end));
      TORCH_CHECK_VALUE(flag != nullptr, op,
                        ": expected options out of squash, usage_gradient, masks, deallocate, "
                        "sharpen, links, softplus, softmax and lstm, one space between two, got '",
                        words, "'");
      *flag = true;
      rest.remove_prefix(std::min(end + 1, rest.size()));
    }
  }

 private:
  bool* find(std::string_view word) {
    const std::pair<std::string_view, bool*> all[] = {
        {"squash", &squash},     {"usage_gradient", &usage_gradient},
        {"masks", &masks},       {"deallocate", &deallocate},
        {"sharpen", &sharpen},   {"links", &links},
        {"softplus", &softplus}, {"softmax", &softmax},
        {"lstm", &lstm}};
    for (const auto& [name, flag] : all)
      if (name == word) return flag;
    return nullptr;
  }
};

template <class Int>
struct Sizes : machine::Sizes<Int> {
  using Base = machine::Sizes<Int>;
  using Base::B, Base::C, Base::M, Base::N, Base::kept, Base::record;
  Int reads, writes;
  bool is_narrow;  // 16-bit storage
  Flags flags;

  explicit Sizes(const Flags& flags) : flags(flags) {}

  Int linked() const { return flags.links ? writes : Int(0); }
  // Of `saved`: where storage is narrow also usage and weightings, whose rounding could change the
  // order of slots.
  Int saved_width() const { return is_narrow ? record() + (reads + writes + 1) * N : record(); }
  Int checkpoint() const { return (M + linked() * (N + 1)) * N; }  // as Shape's
  // Of p, in the order of seqmem_fast/ops/dnc.py.
  Int values() const {
    Int n = reads * M + writes * M * 3 + reads * 2 + writes * 3;
    if (flags.links) n = n + reads * (writes * 2 + 1);
    if (flags.masks) n = n + (reads + writes) * M;
    if (flags.links && flags.sharpen) n = n + reads * 2;
    if (flags.softmax) n = n + writes;
    return n;
  }

  // The shape of a state's part; of `initial` without its batch dimension.
  std::vector<Int> shape_of(int part, bool batched) const {
    std::vector<Int> shape;
    if (part <= kCell) shape.push_back(Int(kept));
    if (batched) shape.push_back(B);
    const auto add = [&](std::initializer_list<Int> rest) {
      shape.insert(shape.end(), rest.begin(), rest.end());
    };
    switch (part) {
      case kHidden:
      case kCell: add({C}); break;
      case kMemory: add({N, M}); break;
      case kUsage: add({N}); break;
      case kLink: add({linked(), N, N}); break;
      case kPrecedence: add({linked(), N}); break;
      case kWriteWeights: add({writes, N}); break;
      case kReadWeights: add({reads, N}); break;
      default: add({reads, M});
    }
    return shape;
  }
};

template <class Int>
void check_initial(const Check<Int>& check, const Sizes<Int>& s, TensorList initial) {
  for (size_t part = 0; part < initial.size(); ++part)
    check.operand((std::string("initial.") + kPartNames[part]).c_str(), initial[part],
                  s.shape_of(static_cast<int>(part), false));
}

template <class Int>
Sizes<Int> check_inputs(const Check<Int>& check, const Inputs& in, const Options& options) {
  check.floating_input();
  Sizes<Int> s(Flags(check.op(), options.options));
  TORCH_CHECK_VALUE(
      options.norm_floor >= 0 && options.eps >= 0 && options.norm_floor + options.eps > 0,
      check.op(), ": expected norm_floor >= 0 and eps >= 0, one > 0, got ", options.norm_floor,
      " and ", options.eps);
  TORCH_CHECK_VALUE(0 <= options.mask_min && options.mask_min < 1, check.op(),
                    ": expected 0 <= mask_min < 1, got ", options.mask_min);
  s.is_narrow = in.input.scalar_type() != at::toOpMathType(in.input.scalar_type());
  machine::check_state_size(check, in.state, kParts);
  machine::check_input_and_memory(check, s, in.input, in.state[kMemory]);
  const auto three = [&](int part) -> const Tensor& {
    check.same_kind(kPartNames[part], in.state[part]);
    check.dims(kPartNames[part], in.state[part], 3);
    return in.state[part];
  };
  s.writes = check.size(three(kWriteWeights), 1);
  s.reads = check.size(three(kReadWeights), 1);
  TORCH_CHECK_VALUE(s.writes > 0 && s.reads > 0, check.op(),
                    ": expected write_weights and read_weights of at least one head, got ",
                    s.writes, " and ", s.reads);
  s.R = s.M * s.reads;
  s.P = s.values();
  machine::check_head_layer(check, s, "interface", in.interface_weight, in.interface_bias);
  TORCH_CHECK_VALUE(in.norm.empty() || in.norm.size() == 2, check.op(),
                    ": expected norm of 2 tensors, or none, got ", in.norm.size());
  for (size_t i = 0; i < in.norm.size(); ++i)
    check.operand(i == 0 ? "norm[0]" : "norm[1]", in.norm[i], {s.P});
  machine::check_controller(check, s, in.controller, s.flags.lstm);
  for (int part = 0; part < kParts; ++part)
    check.operand(kPartNames[part], in.state[part], s.shape_of(part, true));
  machine::check_initial_size(check, in.initial, kParts, in.reset.has_value());
  check_initial(check, s, in.initial);
  check.lengths(in.lengths, s.B, s.T);
  check.reset(in.reset, s.T, s.B);
  return s;
}

inline constexpr char kName[] = "seqmem::dnc", kBackwardName[] = "seqmem::dnc_backward";

using ForwardOp =
    Op<kName, Tensors<15>(In, TensorList, TensorList, In, In, TensorList, TensorList, Maybe, Maybe,
                          std::string_view, double, double, double, bool, bool)>;
using BackwardOp =
    Op<kBackwardName,
       std::vector<Tensor>(Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe,
                           Maybe, Maybe, Maybe, In, TensorList, TensorList, In, In, TensorList,
                           TensorList, Maybe, Maybe, In, In, In, In, In, In, std::string_view,
                           double, double, double, Mask)>;

template <class Int>
Sizes<Int> check(const ForwardInputs& in) {
  return check_inputs(Check<Int>(kName, in.input), in, in);
}

template <class Int>
Sizes<Int> check_backward(const BackwardInputs& in) {
  const Check<Int> check(kBackwardName, in.input);
  const auto s = check_inputs(check, in, in);
  machine::check_saved<Int>(check, s, in, s.saved_width(), {s.checkpoints(), s.B, s.checkpoint()});
  check.operand("usage_trace", in.usage_trace, {s.T, s.B, s.N});
  check.operand("write_trace", in.write_trace, {s.T, s.B, s.writes, s.N});
  check.operand("read_trace", in.read_trace, {s.T, s.B, s.reads, s.N});
  const OptionalTensor* const of_state[kParts] = {
      &in.grad_hidden,        &in.grad_cell,         &in.grad_memory,
      &in.grad_usage,         &in.grad_link,         &in.grad_precedence,
      &in.grad_write_weights, &in.grad_read_weights, &in.grad_reads};
  for (int part = 0; part < kParts; ++part)
    check.operand((std::string("grad_") + kPartNames[part]).c_str(), *of_state[part],
                  s.shape_of(part, true));
  check.operand("grad_usage_trace", in.grad_usage_trace, {s.T, s.B, s.N});
  check.operand("grad_write_trace", in.grad_write_trace, {s.T, s.B, s.writes, s.N});
  check.operand("grad_read_trace", in.grad_read_trace, {s.T, s.B, s.reads, s.N});
  return s;
}

}  // namespace seqmem::dnc
