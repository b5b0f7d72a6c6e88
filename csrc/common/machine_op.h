// What the CPU and Meta keys share of an op of a machine, a controller with a memory of slots.
#pragma once

#include <ATen/OpMathType.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "machine.h"
#include "operand.h"
#include "team.h"

namespace seqmem::machine {

// What both directions take, in the kernels' type and contiguous, alive as long as this.
struct Call {
  Operands operands;
  const std::vector<const void*> controller;
  const at::Tensor lengths, reset;

  template <class Inputs>
  explicit Call(const Inputs& in)
      : operands(at::toOpMathType(in.input.scalar_type())),
        controller(operands(in.controller)),
        lengths(in.lengths.has_value() ? in.lengths->to(at::kLong).contiguous() : at::Tensor()),
        reset(in.reset.has_value() ? in.reset->contiguous() : at::Tensor()) {}

  const int64_t* length_data() const {
    return lengths.defined() ? lengths.const_data_ptr<int64_t>() : nullptr;
  }
  const bool* reset_data() const {
    return reset.defined() ? reset.const_data_ptr<bool>() : nullptr;
  }
};

// Steps between two checkpoints: about sqrt(T).
inline int64_t segment_of(int64_t T) {
  const auto root = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(T))));
  return std::max(kShortestSegment, root);
}

// Estimates for one core; they only decide how many threads are worth waking. `slots` is what all
// heads do in a step of a row, in multiply-adds; `passes` how often a direction does it.
constexpr double kFlopsPerMicrosecond = 40e3, kCallWorthSharing = 120;

template <class Shape>
int threads_for(const Shape& s, double slots, double passes) {
  double row = s.P * s.C + slots;
  row += (s.lstm ? 4.0 : 1.0) * s.C * (s.I + s.reads * s.M + s.C * (2.0 * s.layers - 1));
  const double call = passes * 2 * row * s.T * s.B / kFlopsPerMicrosecond;
  const double most = std::min<double>(available_threads(), std::max<int64_t>(s.B, 1));
  return static_cast<int>(std::clamp(call / kCallWorthSharing, 1.0, most));
}

// Gradients one after the other; what is not asked for is empty.
class GradientList {
 public:
  explicit GradientList(const at::TensorOptions& options) : options_(options) {}

  void add(bool wanted, at::TensorList arguments) {
    for (const at::Tensor& t : arguments)
      all_.push_back(wanted ? at::empty_symint(t.sym_sizes(), options_) : at::empty({0}, options_));
  }
  std::vector<at::Tensor> take() { return std::move(all_); }

 private:
  at::TensorOptions options_;
  std::vector<at::Tensor> all_;
};

inline std::vector<void*> pointers_of(const std::vector<at::Tensor>& tensors) {
  std::vector<void*> pointers;
  for (const at::Tensor& t : tensors) pointers.push_back(data(t));
  return pointers;
}

// Results of the kernels' type, which is wider where the input has 16 bits.
inline void to_type_of(const at::Tensor& input, std::initializer_list<at::Tensor*> results) {
  for (at::Tensor* t : results)
    if (t->scalar_type() != input.scalar_type()) *t = t->to(input.scalar_type());
}

// Gives the kernel the gradient of features as it is laid out: it is often expanded from one
// number. The result must live as long as the kernel runs.
template <class Backward>
[[nodiscard]] at::Tensor set_grad_features(Backward& arguments, Maybe gradient,
                                           at::ScalarType type) {
  if (!gradient.has_value()) return {};
  const at::Tensor strided = gradient->to(type);
  arguments.grad_features = strided.const_data_ptr();
  std::copy_n(strided.strides().data(), 3, arguments.grad_features_strides);
  return strided;
}

}  // namespace seqmem::machine
