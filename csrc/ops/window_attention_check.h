// Window attention's signatures, their arguments by name, and the checks, which are the same for
// every device and grad mode.
#pragma once

#include <algorithm>

#include "../common/heads_check.h"

namespace seqmem::window_attention {

using at::Tensor;

inline constexpr char kName[] = "seqmem::window_attention",
                      kBackwardName[] = "seqmem::window_attention_backward";
using ForwardOp = Op<kName, Tensors<3>(In, In, In, int64_t, int64_t, int64_t, int64_t, Maybe, Maybe,
                                       int64_t, Scale, double, double, Maybe, bool)>;
using BackwardOp =
    Op<kBackwardName,
       Tensors<3>(Maybe, Maybe, Maybe, In, In, In, int64_t, int64_t, int64_t, int64_t, Maybe, Maybe,
                  int64_t, Scale, double, double, Maybe, In, In, std::array<bool, 3>)>;

struct Window {
  int64_t left, right, dilation, offset;
  Maybe key_start, key_end;
  int64_t global_keys;
};
struct Inputs : HeadInputs, Window, WeightInputs {};
using ForwardInputs = ForwardOf<Inputs>;

struct Gradients {
  Maybe grad_output, grad_weights, grad_global_weights;
};
struct BackwardInputs : Gradients, Inputs {
  In weights, global_weights;
  std::array<bool, 3> output_mask;
};

template <class Int>
struct Sizes : HeadSizes<Int> {
  Int left, right;  // columns of the band on either side

  Int W() const { return left + right + 1; }
};

template <class Int>
Int at_least_0(const Int& x) {
  if constexpr (std::is_same_v<Int, int64_t>) {
    return std::max<int64_t>(x, 0);
  } else {
    return x.max(Int(0));
  }
}

template <class Int>
Sizes<Int> check_inputs(const Check<Int>& check, const Inputs& in) {
  Sizes<Int> s = {check_heads(check, in.q, in.k, in.v), 0, 0};
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;  // positions times dilations stay in range
  auto within = [&](const char* name, int64_t value, int64_t least) {
    TORCH_CHECK_VALUE(least <= value && value <= kMost, check.op(), ": expected ", name, " in ",
                      least, "..", kMost, ", got ", value);
  };
  within("left", in.left, -1);
  within("right", in.right, -1);
  within("dilation", in.dilation, 1);
  within("offset", in.offset, 0);
  TORCH_CHECK_VALUE(in.global_keys >= 0 && in.global_keys <= s.Tk, check.op(),
                    ": expected global_keys in 0..", s.Tk, ", got ", in.global_keys);
  check_weighing(check, in);
  check_bound(check, "key_start", in.key_start, s);
  check_bound(check, "key_end", in.key_end, s);
  // Without a bound, as far as the last query's first key or the first query's last one.
  s.left = in.left >= 0 ? Int(in.left) : at_least_0<Int>((s.Tq - 1 + in.offset) / in.dilation);
  s.right = in.right >= 0 ? Int(in.right)
                          : at_least_0<Int>(at_least_0<Int>(s.Tk - 1 - in.offset) / in.dilation);
  return s;
}

template <class Int>
Sizes<Int> check(const ForwardInputs& in) {
  return check_inputs(Check<Int>(kName, in.q, "q"), in);
}

template <class Int>
Sizes<Int> check_backward(const BackwardInputs& in) {
  const Check<Int> check(kBackwardName, in.q, "q");
  const auto s = check_inputs(check, in);
  const Int G = in.global_keys;
  check.operand("grad_output", in.grad_output, {s.B, s.Hq, s.Tq, s.Dv});
  check.operand("grad_weights", in.grad_weights, {s.B, s.Hq, s.Tq, s.W()});
  check.operand("grad_global_weights", in.grad_global_weights, {s.B, s.Hq, s.Tq, G});
  check.operand("weights", in.weights, {s.B, s.Hq, s.Tq, s.W()});
  check.operand("global_weights", in.global_weights, {s.B, s.Hq, s.Tq, G});
  return s;
}

}  // namespace seqmem::window_attention
