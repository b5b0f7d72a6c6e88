// Indexed attention's signatures, their arguments by name, and the checks, which are the same for
// every device and grad mode.
#pragma once

#include "../common/heads_check.h"

namespace seqmem::indexed_attention {

using at::Tensor;

inline constexpr char kName[] = "seqmem::indexed_attention",
                      kBackwardName[] = "seqmem::indexed_attention_backward",
                      kSelectionName[] = "seqmem::top_k_keys";
using ForwardOp = Op<kName, Tensors<2>(In, In, In, In, Scale, double, double, Maybe, bool)>;
using BackwardOp = Op<kBackwardName, Tensors<3>(Maybe, Maybe, In, In, In, In, Scale, double, double,
                                                Maybe, In, std::array<bool, 3>)>;
using SelectionOp = Op<kSelectionName, Tensor(In, In, int64_t, bool, Maybe, Scale)>;

struct IndexInputs {
  In index;
};
struct Inputs : HeadInputs, IndexInputs, WeightInputs {};
using ForwardInputs = ForwardOf<Inputs>;
using BackwardInputs = BackwardOf<Inputs>;

struct SelectionInputs {
  In q, k;
  int64_t count;
  bool is_causal;
  Maybe key_end;
  Scale scale;
};

template <class Int>
struct Sizes : HeadSizes<Int> {
  Int C, lists;
};

template <class Int>
Sizes<Int> check_inputs(const Check<Int>& check, const Inputs& in) {
  const auto heads = check_heads(check, in.q, in.k, in.v);
  check.typed("index", in.index, at::kLong);
  check.dims("index", in.index, 4);
  const auto lists = lists_of(check, in.index, heads);
  const Int C = check.size(in.index, 3);
  check.shape("index", in.index, {lists[0], lists[1], heads.Tq, C});
  check_weighing(check, in);
  // A GPU would have to be waited for: there, a key that does not exist is none.
  if (in.index.is_cpu()) {
    const Tensor index = in.index.contiguous();
    const int64_t *data = index.const_data_ptr<int64_t>(), keys = in.k.size(2);
    for (int64_t n = 0; n < index.numel(); ++n)
      TORCH_CHECK_VALUE(-1 <= data[n] && data[n] < keys, check.op(), ": expected index in -1..",
                        keys - 1, ", got ", data[n]);
  }
  return {heads, C, lists[0] * lists[1]};
}

template <class Int>
Sizes<Int> check(const ForwardInputs& in) {
  return check_inputs(Check<Int>(kName, in.q, "q"), in);
}

template <class Int>
Sizes<Int> check_backward(const BackwardInputs& in) {
  const Check<Int> check(kBackwardName, in.q, "q");
  const auto s = check_inputs(check, in);
  check.operand("grad_output", in.grad_output, {s.B, s.Hq, s.Tq, s.Dv});
  check.operand("grad_weights", in.grad_weights, {s.B, s.Hq, s.Tq, s.C});
  check.operand("weights", in.weights, {s.B, s.Hq, s.Tq, s.C});
  return s;
}

template <class Int>
HeadSizes<Int> check_selection(const SelectionInputs& in) {
  const Check<Int> check(kSelectionName, in.q, "q");
  const auto s = check_heads(check, in.q, in.k, in.k);
  constexpr int64_t kMost = 1 << 20;  // products of sizes stay in range
  TORCH_CHECK_VALUE(1 <= in.count && in.count <= kMost, check.op(), ": expected count in 1..",
                    kMost, ", got ", in.count);
  constexpr int64_t kMostKeys = (int64_t(1) << 31) - 1;  // kernels number them in 32 bits
  TORCH_CHECK_VALUE(s.Tk <= kMostKeys, check.op(), ": expected at most ", kMostKeys, " keys, got ",
                    s.Tk);
  check_bound(check, "key_end", in.key_end, s);
  return s;
}

}  // namespace seqmem::indexed_attention
