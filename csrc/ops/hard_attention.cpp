// Hard attention's ops: schemas, the CPU and Meta keys. Arguments are described in
// seqmem_fast/ops/hard_attention.py.
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../common/workspace.h"
#include "../cpu/hard_attention_kernel.h"

namespace seqmem::hard_attention {
namespace {

using at::Tensor;

constexpr char kSample[] = "seqmem::categorical_sample", kLoss[] = "seqmem::reinforce_loss";
enum Reduction : int64_t { kNone, kMean, kSum };

// ---- checks
// --------------------------------------------------------------------------------------

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

template <class Int>
void check_sample(const Tensor& logits, const Tensor& uniform) {
  const Check<Int> check(kSample, logits, "logits");
  check_logits(check, logits);
  check.strided("uniform", uniform);
  const auto type = at::toOpMathType(logits.scalar_type());
  TORCH_CHECK_TYPE(uniform.scalar_type() == type, kSample, ": expected uniform of dtype ", type,
                   " beside logits of dtype ", logits.scalar_type(), ", got ",
                   uniform.scalar_type());
  check.same_device("uniform", uniform);
  check_rows(check, "uniform", uniform, logits);
}

// The values of action show only where it is a real tensor.
template <class Int>
void check_loss(const Tensor& logits, const Tensor& action, const Tensor& returns,
                const OptionalTensor& baseline, int64_t reduction, bool values) {
  const Check<Int> check(kLoss, logits, "logits");
  check_logits(check, logits);
  check.strided("action", action);
  TORCH_CHECK_TYPE(action.scalar_type() == at::kLong, kLoss,
                   ": expected action of dtype int64, got ", action.scalar_type());
  check.same_device("action", action);
  check_rows(check, "action", action, logits);
  check.same_kind("returns", returns);
  check_rows(check, "returns", returns, logits);
  if (baseline.has_value()) {
    check.same_kind("baseline", *baseline);
    if (baseline->dim() > 0) check_rows(check, "baseline", *baseline, logits);
  }
  TORCH_CHECK_VALUE(kNone <= reduction && reduction <= kSum, kLoss,
                    ": expected reduction 0, 1 or 2 (none, mean, sum), got ", reduction);
  if (!values) return;
  const Tensor chosen = action.contiguous();
  const int64_t* first = chosen.const_data_ptr<int64_t>();
  const int64_t K = logits.size(-1);
  for (const int64_t* a = first; a < first + chosen.numel(); ++a)
    TORCH_CHECK_VALUE(0 <= *a && *a < K, kLoss, ": expected action in 0..", K - 1, ", got ", *a);
}

// ---- how a call is run
// ---------------------------------------------------------------------------

Shape shape_of(const Tensor& logits) {
  const int64_t K = logits.size(-1);
  return {logits.numel() / K, K};
}

// Estimates in nanoseconds of one core; they only steer how many threads are woken.
constexpr double kPerRow = 60, kPerElement = 2, kCallWorthSharing = 100e3;

template <class Arguments, class Run>
void launch(const Kernel& kernel, Storage storage, const Shape& shape, Arguments& arguments,
            const Run& run) {
  const double cost = shape.rows * (kPerRow + kPerElement * shape.K);
  const int wanted = std::clamp(int(cost / kCallWorthSharing), 1, available_threads());
  run_team(
      wanted,
      [&](int threads) {
        arguments.workspace = Workspace::get(kernel.workspace(storage, shape, threads));
      },
      [&](int thread, int threads, SpinBarrier&) {
        run(storage, shape, arguments, thread, threads);
      });
}

// A tensor of one number per row, as the kernels' arithmetic type.
Tensor computed(const Tensor& t, at::ScalarType type) { return t.to(type).contiguous(); }

template <class Int>
Tensor empty_rows(const Tensor& logits, at::ScalarType type) {
  return at::empty_symint(logits.sym_sizes().slice(0, logits.dim() - 1),
                          logits.options().dtype(type));
}

// ---- sampling
// ------------------------------------------------------------------------------------

using Sampled = std::tuple<Tensor, Tensor, Tensor>;

Sampled allocate_sample(const Tensor& logits) {
  const auto type = logits.scalar_type();
  return {empty_rows<c10::SymInt>(logits, at::kLong), empty_rows<c10::SymInt>(logits, type),
          empty_rows<c10::SymInt>(logits, type)};
}

Sampled categorical_sample_cpu(const Tensor& logits, const Tensor& uniform) {
  check_sample<int64_t>(logits, uniform);
  Sampled out = allocate_sample(logits);
  auto& [action, log_prob, entropy] = out;
  const Operand x(logits), u(uniform);
  Forward arguments = {x.data(),       u.data(),      action.mutable_data_ptr<int64_t>(),
                       data(log_prob), data(entropy), false,
                       nullptr};
  const Kernel& kernel = SEQMEM_CHOOSE(kernel);
  launch(kernel, storage_of(logits), shape_of(logits), arguments, kernel.forward);
  return out;
}

Sampled categorical_sample_meta(const Tensor& logits, const Tensor& uniform) {
  check_sample<c10::SymInt>(logits, uniform);
  return allocate_sample(logits);
}

void check_sample_op(const Tensor& logits, const Tensor& uniform) {
  check_sample<c10::SymInt>(logits, uniform);
}

// by_log_prob, by_entropy: see Backward; of the arithmetic's dtype.
Tensor gradient(const Tensor& logits, const Tensor& action, const Tensor& by_log_prob,
                const Tensor& by_entropy) {
  Tensor out = at::empty(logits.sizes(), logits.options());
  const Operand x(logits), chosen(action);
  Backward arguments = {x.data(),
                        static_cast<const int64_t*>(chosen.data()),
                        by_log_prob.const_data_ptr(),
                        by_entropy.const_data_ptr(),
                        data(out),
                        nullptr};
  const Kernel& kernel = SEQMEM_CHOOSE(kernel);
  launch(kernel, storage_of(logits), shape_of(logits), arguments, kernel.backward);
  return out;
}

Tensor categorical_sample_backward_cpu(const OptionalTensor& grad_log_prob,
                                       const OptionalTensor& grad_entropy, const Tensor& logits,
                                       const Tensor& action) {
  const auto type = at::toOpMathType(logits.scalar_type());
  auto given = [&](const OptionalTensor& t) {
    return t.has_value() ? computed(*t, type)
                         : at::empty(action.sizes(), logits.options().dtype(type)).zero_();
  };
  return gradient(logits, action, given(grad_log_prob), given(grad_entropy));
}

Tensor categorical_sample_backward_meta(const OptionalTensor&, const OptionalTensor&,
                                        const Tensor& logits, const Tensor&) {
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

// ---- the loss
// ------------------------------------------------------------------------------------

Tensor allocate_loss(const Tensor& logits, int64_t reduction) {
  if (reduction == kNone) return empty_rows<c10::SymInt>(logits, logits.scalar_type());
  return at::empty({}, logits.options());
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
  Advantage(const Tensor& returns, const OptionalTensor& baseline)
      : returns_(computed(returns, c10::CppTypeToScalarType<C>::value)) {
    if (!baseline.has_value()) return;
    baseline_ = computed(*baseline, returns_.scalar_type());
    step_ = baseline->dim() > 0 ? 1 : 0;
  }
  C operator[](int64_t row) const {
    const C value = returns_.const_data_ptr<C>()[row];
    return baseline_.defined() ? value - baseline_.const_data_ptr<C>()[row * step_] : value;
  }

 private:
  Tensor returns_, baseline_;
  int64_t step_ = 0;
};

Tensor reinforce_loss_cpu(const Tensor& logits, const Tensor& action, const Tensor& returns,
                          const OptionalTensor& baseline, double entropy_weight,
                          int64_t reduction) {
  check_loss<int64_t>(logits, action, returns, baseline, reduction, true);
  const Shape shape = shape_of(logits);
  const auto type = at::toOpMathType(logits.scalar_type());
  const Tensor log_prob = empty_rows<c10::SymInt>(logits, type);
  const Tensor entropy = empty_rows<c10::SymInt>(logits, type);
  const Operand x(logits), chosen(action);
  // The kernel only reads actions where no uniform is given.
  auto* actions = const_cast<int64_t*>(static_cast<const int64_t*>(chosen.data()));
  Forward arguments = {x.data(), nullptr, actions, data(log_prob), data(entropy), true, nullptr};
  const Kernel& kernel = SEQMEM_CHOOSE(kernel);
  launch(kernel, storage_of(logits), shape, arguments, kernel.forward);
  double total = 0;
  with_computed(logits, [&](auto tag) {
    using C = decltype(tag);
    const Advantage<C> advantage(returns, baseline);
    C* loss = log_prob.mutable_data_ptr<C>();  // in place
    const C* bonus = entropy.const_data_ptr<C>();
    for (int64_t row = 0; row < shape.rows; ++row) {
      loss[row] = -loss[row] * advantage[row];
      if (entropy_weight != 0) loss[row] -= C(entropy_weight) * bonus[row];
      total += loss[row];
    }
  });
  if (reduction == kNone) return log_prob.to(logits.scalar_type());
  if (reduction == kMean) total /= double(shape.rows);
  return allocate_loss(logits, reduction).fill_(total);
}

Tensor reinforce_loss_meta(const Tensor& logits, const Tensor& action, const Tensor& returns,
                           const OptionalTensor& baseline, double, int64_t reduction) {
  check_loss<c10::SymInt>(logits, action, returns, baseline, reduction, false);
  return allocate_loss(logits, reduction);
}

void check_loss_op(const Tensor& logits, const Tensor& action, const Tensor& returns,
                   const OptionalTensor& baseline, double, int64_t reduction) {
  check_loss<c10::SymInt>(logits, action, returns, baseline, reduction, action.is_cpu());
}

Tensor reinforce_loss_backward_cpu(const Tensor& grad_loss, const Tensor& logits,
                                   const Tensor& action, const Tensor& returns,
                                   const OptionalTensor& baseline, double entropy_weight,
                                   int64_t reduction) {
  const Shape shape = shape_of(logits);
  const auto type = at::toOpMathType(logits.scalar_type());
  const Tensor by_log_prob = empty_rows<c10::SymInt>(logits, type);
  const Tensor by_entropy = empty_rows<c10::SymInt>(logits, type);
  const Tensor grad = computed(grad_loss, type);
  with_computed(logits, [&](auto tag) {
    using C = decltype(tag);
    const Advantage<C> advantage(returns, baseline);
    const C* g = grad.const_data_ptr<C>();
    const C scale = reduction == kMean ? C(1) / C(shape.rows) : C(1);
    for (int64_t row = 0; row < shape.rows; ++row) {
      const C here = g[reduction == kNone ? row : 0] * scale;
      by_log_prob.mutable_data_ptr<C>()[row] = -advantage[row] * here;
      by_entropy.mutable_data_ptr<C>()[row] = -C(entropy_weight) * here;
    }
  });
  return gradient(logits, action, by_log_prob, by_entropy);
}

Tensor reinforce_loss_backward_meta(const Tensor&, const Tensor& logits, const Tensor&,
                                    const Tensor&, const OptionalTensor&, double, int64_t) {
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
#define SEQMEM_LOSS_ARGUMENTS                                                              \
  "Tensor logits, Tensor action, Tensor returns, Tensor? baseline, float entropy_weight, " \
  "int reduction"
  m.def(
      "categorical_sample(Tensor logits, Tensor uniform) -> (Tensor action, Tensor log_prob, "
      "Tensor entropy)",
      tags);
  m.def("check_categorical_sample(Tensor logits, Tensor uniform) -> ()", tags);
  m.def(
      "categorical_sample_backward(Tensor? grad_log_prob, Tensor? grad_entropy, Tensor logits, "
      "Tensor action) -> Tensor grad_logits",
      tags);
  m.def("reinforce_loss(" SEQMEM_LOSS_ARGUMENTS ") -> Tensor loss", tags);
  m.def("check_reinforce_loss(" SEQMEM_LOSS_ARGUMENTS ") -> ()", tags);
  m.def("reinforce_loss_backward(Tensor grad_loss, " SEQMEM_LOSS_ARGUMENTS
        ") -> Tensor grad_logits",
        tags);
}

TORCH_LIBRARY_IMPL(seqmem, CPU, m) {
  m.impl("categorical_sample", categorical_sample_cpu);
  m.impl("categorical_sample_backward", categorical_sample_backward_cpu);
  m.impl("reinforce_loss", reinforce_loss_cpu);
  m.impl("reinforce_loss_backward", reinforce_loss_backward_cpu);
}

TORCH_LIBRARY_IMPL(seqmem, Meta, m) {
  m.impl("categorical_sample", categorical_sample_meta);
  m.impl("categorical_sample_backward", categorical_sample_backward_meta);
  m.impl("reinforce_loss", reinforce_loss_meta);
  m.impl("reinforce_loss_backward", reinforce_loss_backward_meta);
}

TORCH_LIBRARY_IMPL(seqmem, CompositeExplicitAutograd, m) {
  m.impl("check_categorical_sample", check_sample_op);
  m.impl("check_reinforce_loss", check_loss_op);
  m.impl("categorical_sample", Unsupported<kSample, &check_sample_op, Sampled>::call);
  m.impl("reinforce_loss", Unsupported<kLoss, &check_loss_op, Tensor>::call);
}

// Nested tensors are the one kind that the key above leaves out.
TORCH_LIBRARY_IMPL(seqmem, NestedTensorCPU, m) {
  m.impl("categorical_sample", Unsupported<kSample, &check_sample_op, Sampled>::call);
  m.impl("reinforce_loss", Unsupported<kLoss, &check_loss_op, Tensor>::call);
}

}  // namespace seqmem::hard_attention
