// Hard attention's ops: schemas, the CPU and Meta keys. Arguments are described in
// seqmem_fast/ops/hard_attention.py.
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "../common/op.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../cpu/hard_attention_kernel.h"

namespace seqmem::hard_attention {
namespace {

using at::Tensor;

constexpr char kSample[] = "seqmem::categorical_sample",
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

// ---- how a call is run

Shape shape_of(const Tensor& logits) {
  const int64_t K = logits.size(-1);
  return {.rows = logits.numel() / K, .K = K};
}

// Estimates in nanoseconds of one core; they only steer how many threads are woken.
constexpr double kPerRow = 60, kPerElement = 2, kCallWorthSharing = 100e3;

int threads_for(const Shape& s) {
  const double cost = s.rows * (kPerRow + kPerElement * s.K);
  return std::clamp(int(cost / kCallWorthSharing), 1, available_threads());
}

template <class Arguments>
void run(const Kernel<Arguments, Shape>& kernel, const Tensor& logits, const Arguments& arguments) {
  const Shape shape = shape_of(logits);
  launch(kernel, threads_for(shape), arguments, storage_of(logits), shape);
}

// A tensor of one number per row, as the kernels' arithmetic type.
Tensor computed(const Tensor& t, at::ScalarType type) { return t.to(type).contiguous(); }

Tensor empty_rows(const Tensor& logits, at::ScalarType type) {
  return at::empty_symint(logits.sym_sizes().slice(0, logits.dim() - 1),
                          logits.options().dtype(type));
}

// ---- sampling

Tensors<3> allocate_sample(const Tensor& logits) {
  const auto type = logits.scalar_type();
  return {empty_rows(logits, at::kLong), empty_rows(logits, type), empty_rows(logits, type)};
}

Tensors<3> sample_cpu(const SampleInputs& in) {
  check_sample<int64_t>(in);
  Tensors<3> out = allocate_sample(in.logits);
  const auto& [action, log_prob, entropy] = out;
  const Operand logits(in.logits), uniform(in.uniform);
  const Forward arguments = {.logits = logits.data(),
                             .uniform = uniform.data(),
                             .action = action.mutable_data_ptr<int64_t>(),
                             .log_prob = data(log_prob),
                             .entropy = data(entropy),
                             .wide = false,
                             .workspace = nullptr};
  run(SEQMEM_CHOOSE(forward_kernel), in.logits, arguments);
  return out;
}

Tensors<3> sample_meta(const SampleInputs& in) {
  check_sample<c10::SymInt>(in);
  return allocate_sample(in.logits);
}

// by_log_prob, by_entropy: see Backward; of the arithmetic's dtype.
Tensor gradient(const Tensor& logits, const Tensor& action, const Tensor& by_log_prob,
                const Tensor& by_entropy) {
  const Tensor out = at::empty(logits.sizes(), logits.options());
  const Operand x(logits), chosen(action);
  const Backward arguments = {.logits = x.data(),
                              .action = static_cast<const int64_t*>(chosen.data()),
                              .by_log_prob = by_log_prob.const_data_ptr(),
                              .by_entropy = by_entropy.const_data_ptr(),
                              .grad_logits = data(out),
                              .workspace = nullptr};
  run(SEQMEM_CHOOSE(backward_kernel), logits, arguments);
  return out;
}

Tensor sample_backward_cpu(const SampleBackwardInputs& in) {
  check_sample_backward<int64_t>(in);
  const auto type = at::toOpMathType(in.logits.scalar_type());
  auto given = [&](const OptionalTensor& t) {
    return t.has_value() ? computed(*t, type)
                         : at::zeros(in.action.sizes(), in.logits.options().dtype(type));
  };
  return gradient(in.logits, in.action, given(in.grad_log_prob), given(in.grad_entropy));
}

Tensor sample_backward_meta(const SampleBackwardInputs& in) {
  check_sample_backward<c10::SymInt>(in);
  return at::empty_symint(in.logits.sym_sizes(), in.logits.options());
}

// ---- the loss

Tensor allocate_loss(const LossInputs& in) {
  if (in.reduction == kNone) return empty_rows(in.logits, in.logits.scalar_type());
  return at::empty({}, in.logits.options());
}

// Calls f with a value of the arithmetic's type.
template <class F>
void with_computed(const Tensor& logits, const F& f) {
  if (logits.scalar_type() == at::kDouble) return f(double{});
  f(float{});
}

// returns less baseline, row by row.
template <class C>
class Advantage {
 public:
  explicit Advantage(const LossInputs& in)
      : returns_(computed(in.returns, c10::CppTypeToScalarType<C>::value)) {
    if (!in.baseline.has_value()) return;
    baseline_ = computed(*in.baseline, returns_.scalar_type());
    step_ = in.baseline->dim() > 0 ? 1 : 0;
  }
  C operator[](int64_t row) const {
    const C value = returns_.const_data_ptr<C>()[row];
    return baseline_.defined() ? value - baseline_.const_data_ptr<C>()[row * step_] : value;
  }

 private:
  Tensor returns_, baseline_;
  int64_t step_ = 0;
};

Tensor loss_cpu(const LossInputs& in) {
  check_loss<int64_t>(in);
  const int64_t rows = shape_of(in.logits).rows;
  const auto type = at::toOpMathType(in.logits.scalar_type());
  const Tensor log_prob = empty_rows(in.logits, type), entropy = empty_rows(in.logits, type);
  const Operand logits(in.logits), action(in.action);
  const Forward arguments = {
      .logits = logits.data(),
      .uniform = nullptr,
      // Only read where no uniform is given.
      .action = const_cast<int64_t*>(static_cast<const int64_t*>(action.data())),
      .log_prob = data(log_prob),
      .entropy = data(entropy),
      .wide = true,
      .workspace = nullptr};
  run(SEQMEM_CHOOSE(forward_kernel), in.logits, arguments);
  double total = 0;
  with_computed(in.logits, [&](auto tag) {
    using C = decltype(tag);
    const Advantage<C> advantage(in);
    C* loss = log_prob.mutable_data_ptr<C>();  // in place
    const C* bonus = entropy.const_data_ptr<C>();
    for (int64_t row = 0; row < rows; ++row) {
      loss[row] = -loss[row] * advantage[row];
      if (in.entropy_weight != 0) loss[row] -= C(in.entropy_weight) * bonus[row];
      total += loss[row];
    }
  });
  if (in.reduction == kNone) return log_prob.to(in.logits.scalar_type());
  if (in.reduction == kMean) total /= double(rows);
  return allocate_loss(in).fill_(total);
}

Tensor loss_meta(const LossInputs& in) {
  check_loss<c10::SymInt>(in);
  return allocate_loss(in);
}

Tensor loss_backward_cpu(const LossBackwardInputs& in) {
  check_loss_backward<int64_t>(in);
  const int64_t rows = shape_of(in.logits).rows;
  const auto type = at::toOpMathType(in.logits.scalar_type());
  const Tensor by_log_prob = empty_rows(in.logits, type), by_entropy = empty_rows(in.logits, type);
  const Tensor grad = computed(in.grad_loss, type);
  with_computed(in.logits, [&](auto tag) {
    using C = decltype(tag);
    const Advantage<C> advantage(in);
    const C* g = grad.const_data_ptr<C>();
    const C scale = in.reduction == kMean ? C(1) / C(rows) : C(1);
    for (int64_t row = 0; row < rows; ++row) {
      const C here = g[in.reduction == kNone ? row : 0] * scale;
      by_log_prob.mutable_data_ptr<C>()[row] = -advantage[row] * here;
      by_entropy.mutable_data_ptr<C>()[row] = -C(in.entropy_weight) * here;
    }
  });
  return gradient(in.logits, in.action, by_log_prob, by_entropy);
}

Tensor loss_backward_meta(const LossBackwardInputs& in) {
  check_loss_backward<c10::SymInt>(in);
  return at::empty_symint(in.logits.sym_sizes(), in.logits.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
#define SEQMEM_LOSS_ARGUMENTS                                                              \
  "Tensor logits, Tensor action, Tensor returns, Tensor? baseline, float entropy_weight, " \
  "int reduction"
  Sample::define<check_sample<c10::SymInt>, sample_cpu, sample_meta>(
      m, "(Tensor logits, Tensor uniform) -> (Tensor action, Tensor log_prob, Tensor entropy)");
  SampleBackward::define<check_sample_backward<c10::SymInt>, sample_backward_cpu,
                         sample_backward_meta>(
      m,
      "(Tensor? grad_log_prob, Tensor? grad_entropy, Tensor logits, Tensor action) -> "
      "Tensor grad_logits");
  Loss::define<check_loss<c10::SymInt>, loss_cpu, loss_meta>(
      m, "(" SEQMEM_LOSS_ARGUMENTS ") -> Tensor loss");
  LossBackward::define<check_loss_backward<c10::SymInt>, loss_backward_cpu, loss_backward_meta>(
      m, "(Tensor grad_loss, " SEQMEM_LOSS_ARGUMENTS ") -> Tensor grad_logits");
}

}  // namespace seqmem::hard_attention
