// Hard attention's signatures, their arguments by name, and the checks, which are the same for
// every device and grad mode.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include "../common/check.h"
#include "../common/op.h"

namespace seqmem::hard_attention {

using at::Tensor;

inline constexpr char kSample[] = "seqmem::categorical_sample",
                      kSampleBackward[] = "seqmem::categorical_sample_backward",
                      kLoss[] = "seqmem::reinforce_loss",
                      kLossBackward[] = "seqmem::reinforce_loss_backward";
using Sample = Op<kSample, Tensors<3>(In, In)>;
using SampleBackward = Op<kSampleBackward, Tensor(Maybe, Maybe, In, In)>;
using Loss = Op<kLoss, Tensor(In, In, In, Maybe, double, int64_t)>;
using LossBackward = Op<kLossBackward, Tensor(In, In, In, In, Maybe, double, int64_t)>;

struct SampleInputs {
  In logits, uniform;
};

struct SampleBackwardInputs {
  Maybe grad_log_prob, grad_entropy;
  In logits, action;
};

struct LossInputs {
  In logits, action, returns;
  Maybe baseline;
  double entropy_weight;
  int64_t reduction;
};

struct GradLoss {
  In grad_loss;
};

struct LossBackwardInputs : GradLoss, LossInputs {};

enum Reduction : int64_t { kNone, kMean, kSum };

template <class Int>
void check_logits(const Check<Int>& check, const Tensor& logits) {
  check.floating_input();
  TORCH_CHECK_VALUE(logits.dim() > 0 && check.size(logits, logits.dim() - 1) > 0, check.op(),
                    ": expected logits with at least one action in the last dimension, got ",
                    logits.sym_sizes());
}

// Of logits' leading dimensions.
template <class Int>
void check_rows(const Check<Int>& check, const char* name, const Tensor& t, const Tensor& logits) {
  const auto expected = logits.sym_sizes().slice(0, logits.dim() - 1);
  TORCH_CHECK_VALUE(t.sym_sizes() == expected, check.op(), ": expected ", name, " of shape ",
                    expected, ", got ", t.sym_sizes());
}

// And of logits' dtype.
template <class Int>
void check_numbers(const Check<Int>& check, const char* name, const OptionalTensor& t,
                   const Tensor& logits) {
  if (!t.has_value()) return;
  check.same_kind(name, *t);
  check_rows(check, name, *t, logits);
}

// What action holds shows only where it is a real tensor; on a GPU, reading it would wait for that.
template <class Int>
void check_action(const Check<Int>& check, const Tensor& action, const Tensor& logits) {
  check.typed("action", action, at::kLong);
  check_rows(check, "action", action, logits);
  if (!action.is_cpu()) return;
  const Tensor chosen = action.contiguous();
  const int64_t* first = chosen.const_data_ptr<int64_t>();
  const int64_t K = logits.size(-1);
  for (const int64_t* a = first; a < first + chosen.numel(); ++a)
    TORCH_CHECK_VALUE(0 <= *a && *a < K, check.op(), ": expected action in 0..", K - 1, ", got ",
                      *a);
}

template <class Int>
void check_sample(const SampleInputs& in) {
  const Check<Int> check(kSample, in.logits, "logits");
  check_logits(check, in.logits);
  check.typed("uniform", in.uniform, at::toOpMathType(in.logits.scalar_type()));
  check_rows(check, "uniform", in.uniform, in.logits);
}

template <class Int>
void check_sample_backward(const SampleBackwardInputs& in) {
  const Check<Int> check(kSampleBackward, in.logits, "logits");
  check_logits(check, in.logits);
  check_action(check, in.action, in.logits);
  check_numbers(check, "grad_log_prob", in.grad_log_prob, in.logits);
  check_numbers(check, "grad_entropy", in.grad_entropy, in.logits);
}

template <class Int>
void check_loss_inputs(const Check<Int>& check, const LossInputs& in) {
  check_logits(check, in.logits);
  check_action(check, in.action, in.logits);
  check_numbers(check, "returns", in.returns, in.logits);
  if (in.baseline.has_value() && in.baseline->dim() == 0) {
    check.same_kind("baseline", *in.baseline);
  } else {
    check_numbers(check, "baseline", in.baseline, in.logits);
  }
  TORCH_CHECK_VALUE(kNone <= in.reduction && in.reduction <= kSum, check.op(),
                    ": expected reduction 0, 1 or 2 (none, mean, sum), got ", in.reduction);
}

template <class Int>
void check_loss(const LossInputs& in) {
  check_loss_inputs(Check<Int>(kLoss, in.logits, "logits"), in);
}

template <class Int>
void check_loss_backward(const LossBackwardInputs& in) {
  const Check<Int> check(kLossBackward, in.logits, "logits");
  check_loss_inputs(check, in);
  if (in.reduction == kNone) {
    check_numbers(check, "grad_loss", in.grad_loss, in.logits);
  } else {
    check.operand("grad_loss", in.grad_loss, {});
  }
}

// ---- what the ops return

inline Tensor empty_rows(const Tensor& logits, at::ScalarType type) {
  return at::empty_symint(logits.sym_sizes().slice(0, logits.dim() - 1),
                          logits.options().dtype(type));
}

inline Tensors<3> allocate_sample(const Tensor& logits) {
  const auto type = logits.scalar_type();
  return {empty_rows(logits, at::kLong), empty_rows(logits, type), empty_rows(logits, type)};
}

inline Tensor allocate_loss(const LossInputs& in) {
  if (in.reduction == kNone) return empty_rows(in.logits, in.logits.scalar_type());
  return at::empty({}, in.logits.options());
}

}  // namespace seqmem::hard_attention
