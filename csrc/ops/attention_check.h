// Attention's signatures, their arguments by name, and the checks, which are the same for every
// device and grad mode.
#pragma once

#include "../common/matrices.h"
#include "../common/op.h"

namespace seqmem::attention {

using at::Tensor;

inline constexpr char kName[] = "seqmem::attention", kBackwardName[] = "seqmem::attention_backward";
using ForwardOp = Op<kName, Tensors<2>(In, In, In, Maybe, std::optional<double>, bool, double)>;
using BackwardOp =
    Op<kBackwardName, Tensors<4>(Maybe, Maybe, In, In, In, Maybe, In, std::optional<double>, bool,
                                 double, std::array<bool, 4>)>;

inline constexpr char
    kSchema[] =
        "(Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale, bool is_causal, "
        "float alpha)"
        " -> (Tensor output, Tensor weights)",
    kBackwardSchema[] =
        "(Tensor? grad_output, Tensor? grad_weights, Tensor query, Tensor key, Tensor value, "
        "Tensor? mask, Tensor weights, float? scale, bool is_causal, float alpha, "
        "bool[4] output_mask)"
        " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)";

struct Operands {
  In query, key, value;
  Maybe mask;
};

struct Options {
  std::optional<double> scale;
  bool is_causal;
  double alpha;  // 1: softmax, else entmax's
};

struct Inputs : Operands, Options {};

struct Weights {
  In weights;
};

struct BackwardInputs : AttentionGradients, Operands, Weights, Options {
  std::array<bool, 4> output_mask;
};

template <class Int>
AttentionSizes<Int> check_inputs(const Check<Int>& check, const Operands& in,
                                 const Options& options) {
  TORCH_CHECK_VALUE(options.alpha >= 1 && options.alpha <= 2, check.op(),
                    ": expected alpha in 1..2, got ", options.alpha);
  return check_attention(check, in.query, in.key, in.value, in.mask, true);
}

template <class Int>
AttentionSizes<Int> check(const Inputs& in) {
  return check_inputs(Check<Int>(kName, in.query, "query"), in, in);
}

template <class Int>
AttentionSizes<Int> check_backward(const BackwardInputs& in) {
  const Check<Int> check(kBackwardName, in.query, "query");
  const auto s = check_inputs(check, in, in);
  check_attention_backward(check, s, in, in.weights);
  return s;
}

}  // namespace seqmem::attention
