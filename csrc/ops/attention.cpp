// Attention ops: schemas, the CPU and Meta keys. Arguments: seqmem_fast/ops/attention.py.
#include <ATen/ExpandUtils.h>
#include <ATen/ops/ne.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../common/dispatch.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../common/workspace.h"
#include "../cpu/attention_kernel.h"
#include "attention_check.h"

namespace seqmem::attention {
namespace {

using Sizes64 = Sizes<int64_t>;

// An argument as the kernels see it: see Matrices.
struct Argument {
  Tensor tensor;
  std::vector<int64_t> offset;
  int64_t rows = 0, columns = 0;

  Argument() = default;
  Argument(const Tensor& t, const Sizes64& s) : tensor(t) {
    const int64_t dim = t.dim();
    auto stride = [&](int64_t i) { return i < 0 || t.size(i) == 1 ? 0 : t.stride(i); };
    columns = stride(dim - 1);
    rows = stride(dim - 2);
    offset = {0};
    const auto& batch = s.batch.sizes();
    for (size_t d = 0; d < batch.size(); ++d) {
      const int64_t step = stride(dim - 2 - int64_t(batch.size()) + int64_t(d));
      std::vector<int64_t> wider;
      wider.reserve(offset.size() * batch[d]);
      for (const int64_t start : offset)
        for (int64_t i = 0; i < batch[d]; ++i) wider.push_back(start + i * step);
      offset = std::move(wider);
    }
  }
  Argument(const OptionalTensor& t, const Sizes64& s)
      : Argument(t.has_value() ? Argument(*t, s) : Argument()) {}

  Matrices view() const {
    return {tensor.defined() ? tensor.const_data_ptr() : nullptr, offset.data(), rows, columns};
  }
};

// A mask as the kernels take it: bytes or query's dtype, its last dimension contiguous or one
// element for all. What was expanded stays small.
Tensor usable_mask(Tensor mask) {
  const int64_t dim = mask.dim();
  const bool converts = mask.scalar_type() != at::kBool && !mask.is_floating_point();
  const bool apart = dim > 0 && mask.size(-1) > 1 && mask.stride(-1) > 1;
  if (!converts && !apart) return mask;
  for (int64_t d = 0; d < dim; ++d)
    if (mask.stride(d) == 0 && mask.size(d) > 1) mask = mask.narrow(d, 0, 1);
  if (converts) mask = mask.ne(0);
  return mask.contiguous();
}

Argument mask_argument(const OptionalTensor& mask, const Sizes64& s) {
  return mask.has_value() ? Argument(usable_mask(*mask), s) : Argument();
}

Shape shape_of(const Sizes64& s, const Argument& mask, std::optional<double> scale,
               bool is_causal) {
  const MaskKind kind = !mask.tensor.defined()                   ? MaskKind::None
                        : mask.tensor.scalar_type() == at::kBool ? MaskKind::Allowed
                                                                 : MaskKind::Added;
  return {s.batch.total(), s.Tq, s.Tk, s.D, s.Dv, scale.value_or(1 / std::sqrt(double(s.D))),
          is_causal,       kind};
}

// Estimates in microseconds of one core; they only steer the choices below. Waking a thread costs
// about a hundred.
constexpr double kFlopsPerMicrosecond = 60e3, kCallWorthSharing = 100;
constexpr int64_t kTasksPerThread = 4;

int threads_for(const Shape& s, double products) {
  const double flops = 2.0 * s.N * s.Tq * s.Tk * (s.D + s.Dv) * products;
  const double share = flops / kFlopsPerMicrosecond / kCallWorthSharing;
  return int(std::clamp(share, 1.0, double(available_threads())));
}

// Query rows below which a part of a batch is not worth its packing.
constexpr int64_t kRowsOfTask = 96;

int64_t groups_for(const Shape& s, int64_t tasks) {
  const int64_t wanted = (tasks + s.N - 1) / std::max<int64_t>(s.N, 1);
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(s.Tq / kRowsOfTask, 1));
}

// Packing the keys costs about as much as a few rows of scores.
constexpr int64_t kRowsWorthPacking = 8;

// ---- forward
// ---------------------------------------------------------------------------------------

using Outputs = std::tuple<Tensor, Tensor>;

template <class Int>
Outputs allocate(const Tensor& query, const Sizes<Int>& s) {
  return {s.batch.empty(query, s.Tq, s.Dv), s.batch.empty(query, s.Tq, s.Tk)};
}

Outputs attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                      const OptionalTensor& mask, std::optional<double> scale, bool is_causal) {
  const Sizes64 s = check_attention<int64_t>(query, key, value, mask);
  Outputs out = allocate(query, s);
  auto& [output, weights] = out;
  if (weights.numel() == 0) {
    output.zero_();
    return out;
  }
  const Argument q(query, s), k(key, s), v(value, s), m = mask_argument(mask, s);
  const Shape shape = shape_of(s, m, scale, is_causal);
  const int wanted = threads_for(shape, 1);
  const bool pack = s.Tq >= kRowsWorthPacking || k.columns != 1;
  const Plan plan = {pack, groups_for(shape, wanted == 1 ? 1 : wanted * kTasksPerThread), 0};
  Forward arguments = {q.view(),     k.view(),      v.view(), m.view(),
                       data(output), data(weights), nullptr};
  const auto& kernel = SEQMEM_CHOOSE(forward_kernel);
  const Storage storage = storage_of(query);
  run_team(
      wanted,
      [&](int threads) {
        arguments.workspace =
            Workspace::get(kernel.workspace(storage, shape, plan, arguments, threads));
      },
      [&](int thread, int threads, SpinBarrier& barrier) {
        kernel.run(storage, shape, plan, arguments, thread, threads, barrier);
      });
  return out;
}

Outputs attention_meta(const Tensor& query, const Tensor& key, const Tensor& value,
                       const OptionalTensor& mask, std::optional<double>, bool) {
  return allocate(query, check_attention<c10::SymInt>(query, key, value, mask));
}

void check_attention_op(const Tensor& query, const Tensor& key, const Tensor& value,
                        const OptionalTensor& mask, std::optional<double>, bool) {
  check_attention<c10::SymInt>(query, key, value, mask);
}

// ---- backward
// --------------------------------------------------------------------------------------

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Sizes64 backward_sizes(const Tensor& query, const Tensor& value, const Tensor& weights) {
  Sizes64 s;
  s.batch.widen(Check<int64_t>(kName, query, "query"), "weights", weights);
  s.Tq = weights.size(-2);
  s.Tk = weights.size(-1);
  s.D = query.size(-1);
  s.Dv = value.size(-1);
  return s;
}

// The parts of a batch whose sums are kept apart; the same at any number of threads.
constexpr int64_t kBackwardTasks = 16;

Gradients attention_backward_cpu(const OptionalTensor& grad_output,
                                 const OptionalTensor& grad_weights, const Tensor& query,
                                 const Tensor& key, const Tensor& value, const OptionalTensor& mask,
                                 const Tensor& weights, std::optional<double> scale, bool is_causal,
                                 std::array<bool, 4> output_mask) {
  const Sizes64 s = backward_sizes(query, value, weights);
  const Argument q(query, s), k(key, s), v(value, s),
      m = mask_argument(mask, s), g_output(grad_output, s), g_weights(grad_weights, s);
  const Operand saved(weights);
  const Shape shape = shape_of(s, m, scale, is_causal);
  auto make = [&](bool wanted, int64_t rows, int64_t columns) {
    return wanted ? s.batch.empty(query, rows, columns) : Tensor();
  };
  Tensor grad_query = make(output_mask[0], s.Tq, s.D), grad_key = make(output_mask[1], s.Tk, s.D),
         grad_value = make(output_mask[2], s.Tk, s.Dv),
         grad_mask = make(output_mask[3] && shape.mask == MaskKind::Added, s.Tq, s.Tk);
  if (weights.numel() > 0) {
    const int wanted = threads_for(shape, 2.5);
    const Plan plan = {true, groups_for(shape, kBackwardTasks), 0};
    Backward arguments = {g_output.view(), g_weights.view(), q.view(),        k.view(),
                          v.view(),        m.view(),         saved.data(),    data(grad_query),
                          data(grad_key),  data(grad_value), data(grad_mask), nullptr};
    const auto& kernel = SEQMEM_CHOOSE(backward_kernel);
    const Storage storage = storage_of(query);
    run_team(
        wanted,
        [&](int threads) {
          arguments.workspace =
              Workspace::get(kernel.workspace(storage, shape, plan, arguments, threads));
        },
        [&](int thread, int threads, SpinBarrier& barrier) {
          kernel.run(storage, shape, plan, arguments, thread, threads, barrier);
        });
  } else {  // no queries or no keys
    for (const Tensor& grad : {grad_query, grad_key, grad_value, grad_mask})
      if (grad.defined()) grad.zero_();
  }
  auto finish = [&](const Tensor& grad, const OptionalTensor& like) {
    if (!grad.defined()) return empty_like_of<int64_t>(query, {0});
    return at::sum_to(grad, like->sizes());
  };
  return {finish(grad_query, query), finish(grad_key, key), finish(grad_value, value),
          finish(grad_mask, mask)};
}

Gradients attention_backward_meta(const OptionalTensor&, const OptionalTensor&, const Tensor& query,
                                  const Tensor& key, const Tensor& value,
                                  const OptionalTensor& mask, const Tensor&, std::optional<double>,
                                  bool, std::array<bool, 4> output_mask) {
  auto make = [&](bool wanted, const OptionalTensor& like) {
    return wanted ? at::empty_symint(like->sym_sizes(), query.options())
                  : empty_like_of<c10::SymInt>(query, {c10::SymInt(0)});
  };
  return {make(output_mask[0], query), make(output_mask[1], key), make(output_mask[2], value),
          make(output_mask[3] && mask.has_value() && mask->is_floating_point(), mask)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
#define SEQMEM_ATTENTION_ARGUMENTS \
  "(Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale, bool is_causal)"
  m.def("attention" SEQMEM_ATTENTION_ARGUMENTS " -> (Tensor output, Tensor weights)", tags);
  m.def("check_attention" SEQMEM_ATTENTION_ARGUMENTS " -> ()", tags);
  m.def(
      "attention_backward(Tensor? grad_output, Tensor? grad_weights, Tensor query, Tensor key, "
      "Tensor value, Tensor? mask, Tensor weights, float? scale, bool is_causal, "
      "bool[4] output_mask) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
      "Tensor grad_mask)",
      tags);
}

TORCH_LIBRARY_IMPL(seqmem, CPU, m) {
  m.impl("attention", attention_cpu);
  m.impl("attention_backward", attention_backward_cpu);
}

TORCH_LIBRARY_IMPL(seqmem, Meta, m) {
  m.impl("attention", attention_meta);
  m.impl("attention_backward", attention_backward_meta);
}

TORCH_LIBRARY_IMPL(seqmem, CompositeExplicitAutograd, m) {
  m.impl("check_attention", check_attention_op);
  m.impl("attention", Unsupported<kName, &check_attention_op, Outputs>::call);
}

// Nested tensors are the one kind that the key above leaves out.
TORCH_LIBRARY_IMPL(seqmem, NestedTensorCPU, m) {
  m.impl("attention", Unsupported<kName, &check_attention_op, Outputs>::call);
}

}  // namespace seqmem::attention
