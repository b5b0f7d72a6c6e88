// Hard attention's ops: schemas, the CPU and Meta keys. Arguments are described in
// seqmem_fast/ops/hard_attention.py.
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../common/dispatch.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../cpu/hard_attention_kernel.h"
#include "hard_attention_check.h"

namespace seqmem::hard_attention {
namespace {

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

// ---- sampling

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

#undef SEQMEM_LOSS_ARGUMENTS

}  // namespace seqmem::hard_attention
