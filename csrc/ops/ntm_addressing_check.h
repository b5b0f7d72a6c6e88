// The NTM functionals' signatures, their arguments by name, and the checks, which are the same for
// every device and grad mode.
#pragma once

#include <array>

#include "../common/check.h"
#include "../common/op.h"

namespace seqmem::ntm_addressing {

using at::Tensor;

struct ContentInputs {
  In memory, key, beta;
};

struct AddressingInputs : ContentInputs {
  In gate, shift, gamma, prev_weights;
};

struct ReadInputs {
  In memory, weights;
};

struct WriteInputs : ReadInputs {
  In erase, add;
};

// Sizes of one call and its checks: memory [N, M] or [B, N, M] decides on the batch, `first` on the
// heads. Letters as in seqmem_fast/ops/ntm_addressing.py; an absent dimension counts as one.
template <class Int>
class Checked {
 public:
  using Sizes = c10::SmallVector<Int, 4>;
  Int B = 1, H = 1, N, M, taps = 0;
  Sizes output;
  const char* gradient_name;

  Checked(const char* op, const Tensor& memory, const char* first_name, const Tensor& first)
      : check_(op, memory, "memory") {
    check_.floating_input();
    const int64_t dims = memory.dim();
    TORCH_CHECK_VALUE(dims == 2 || dims == 3, op, ": expected memory with 2 or 3 dimensions, got ",
                      dims, " (shape ", memory.sym_sizes(), ")");
    N = check_.size(memory, dims - 2);
    M = check_.size(memory, dims - 1);
    TORCH_CHECK_VALUE(N > 0 && M > 0, op,
                      ": expected memory with at least one slot of at least one value, got ",
                      memory.sym_sizes());
    check_.same_kind(first_name, first);
    TORCH_CHECK_VALUE(first.dim() == dims - 1 || first.dim() == dims, op, ": expected ", first_name,
                      " with ", dims - 1, " dimensions (one head) or ", dims,
                      " (several) beside memory of shape ", memory.sym_sizes(), ", got ",
                      first.dim(), " (shape ", first.sym_sizes(), ")");
    batched_ = dims == 3;
    heads_ = first.dim() == dims;
    if (batched_) B = check_.size(memory, 0);
    if (heads_) H = check_.size(first, dims - 2);
    TORCH_CHECK_VALUE(H > 0, op, ": expected ", first_name, " of at least one head, got shape ",
                      first.sym_sizes());
  }

  // [B, H, rest...], without the dimensions that are not there.
  template <class... Rest>
  Sizes sizes(const Rest&... rest) const {
    Sizes out;
    if (batched_) out.push_back(B);
    if (heads_) out.push_back(H);
    (out.push_back(rest), ...);
    return out;
  }

  template <class... Rest>
  void per_head(const char* name, const Tensor& t, const Rest&... rest) const {
    check_.operand(name, t, sizes(rest...));
  }

  void shift(const Tensor& t) {
    const int64_t dims = batched_ + heads_ + 1;
    check_.same_kind("shift", t);
    check_.dims("shift", t, dims);
    taps = check_.size(t, dims - 1);
    TORCH_CHECK_VALUE(taps % 2 == 1, check_.op(),
                      ": expected shift with an odd number of taps (2 r + 1), got ", taps);
    TORCH_CHECK_VALUE(taps <= N + 1, check_.op(), ": expected shift that moves by at most ", N / 2,
                      " (half the slots of memory), got one that moves by ", taps / 2);
    per_head("shift", t, taps);
  }

  void gradient(const Tensor& t) const { check_.operand(gradient_name, t, output); }

 private:
  const Check<Int> check_;
  bool batched_, heads_;  // whether these dimensions are there
};

template <class Int>
Checked<Int> check_inputs(const char* op, const ContentInputs& in) {
  Checked<Int> c(op, in.memory, "key", in.key);
  c.per_head("key", in.key, c.M);
  c.per_head("beta", in.beta);
  c.output = c.sizes(c.N);
  c.gradient_name = "grad_weights";
  return c;
}

template <class Int>
Checked<Int> check_inputs(const char* op, const AddressingInputs& in) {
  auto c = check_inputs<Int>(op, static_cast<const ContentInputs&>(in));
  c.per_head("gate", in.gate);
  c.shift(in.shift);
  c.per_head("gamma", in.gamma);
  c.per_head("prev_weights", in.prev_weights, c.N);
  return c;
}

template <class Int>
Checked<Int> check_inputs(const char* op, const ReadInputs& in) {
  Checked<Int> c(op, in.memory, "weights", in.weights);
  c.per_head("weights", in.weights, c.N);
  c.output = c.sizes(c.M);
  c.gradient_name = "grad_reads";
  return c;
}

template <class Int>
Checked<Int> check_inputs(const char* op, const WriteInputs& in) {
  auto c = check_inputs<Int>(op, static_cast<const ReadInputs&>(in));
  c.per_head("erase", in.erase, c.M);
  c.per_head("add", in.add, c.M);
  c.gradient_name = "grad_new_memory";
  c.output.clear();
  for (int64_t d = 0; d < in.memory.dim(); ++d) c.output.push_back(Check<Int>::size(in.memory, d));
  return c;
}

template <size_t n>
using Mask = std::array<bool, n>;

inline Tensors<3> gradients(const ContentInputs& in, const Mask<3>& wanted) {
  return gradients_like(wanted, in.memory, in.key, in.beta);
}
inline Tensors<7> gradients(const AddressingInputs& in, const Mask<7>& wanted) {
  return gradients_like(wanted, in.memory, in.key, in.beta, in.gate, in.shift, in.gamma,
                        in.prev_weights);
}
inline Tensors<2> gradients(const ReadInputs& in, const Mask<2>& wanted) {
  return gradients_like(wanted, in.memory, in.weights);
}
inline Tensors<4> gradients(const WriteInputs& in, const Mask<4>& wanted) {
  return gradients_like(wanted, in.memory, in.weights, in.erase, in.add);
}

struct Gradient {
  In grad;
};

// A functional's op and its backward, of n tensors.
template <class ForwardOp, class BackwardOp, class ForwardInputs>
struct Functional {
  using Forward = ForwardOp;
  using Backward = BackwardOp;
  using Inputs = ForwardInputs;
  static constexpr size_t n = Forward::arguments;
  struct BackwardInputs : Gradient, Inputs {
    Mask<n> output_mask;
  };

  template <class Int>
  static Checked<Int> check(const Inputs& in) {
    return check_inputs<Int>(Forward::full_name, in);
  }

  template <class Int>
  static Checked<Int> check_backward(const BackwardInputs& in) {
    auto c = check_inputs<Int>(Backward::full_name, static_cast<const Inputs&>(in));
    c.gradient(in.grad);
    return c;
  }
};

inline constexpr char kContent[] = "seqmem::ntm_content_addressing",
                      kContentBackward[] = "seqmem::ntm_content_addressing_backward",
                      kAddressing[] = "seqmem::ntm_addressing",
                      kAddressingBackward[] = "seqmem::ntm_addressing_backward",
                      kRead[] = "seqmem::ntm_read", kReadBackward[] = "seqmem::ntm_read_backward",
                      kWrite[] = "seqmem::ntm_write",
                      kWriteBackward[] = "seqmem::ntm_write_backward";

using ContentOps =
    Functional<Op<kContent, Tensor(In, In, In)>,
               Op<kContentBackward, Tensors<3>(In, In, In, In, Mask<3>)>, ContentInputs>;
using AddressingOps =
    Functional<Op<kAddressing, Tensor(In, In, In, In, In, In, In)>,
               Op<kAddressingBackward, Tensors<7>(In, In, In, In, In, In, In, In, Mask<7>)>,
               AddressingInputs>;
using ReadOps = Functional<Op<kRead, Tensor(In, In)>,
                           Op<kReadBackward, Tensors<2>(In, In, In, Mask<2>)>, ReadInputs>;
using WriteOps =
    Functional<Op<kWrite, Tensor(In, In, In, In)>,
               Op<kWriteBackward, Tensors<4>(In, In, In, In, In, Mask<4>)>, WriteInputs>;

}  // namespace seqmem::ntm_addressing
