// Additive attention ops: schemas, the CPU and Meta keys. Arguments:
// seqmem_fast/ops/additive_attention.py.
#include <ATen/ExpandUtils.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../common/dispatch.h"
#include "../common/matrices.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../common/workspace.h"
#include "../cpu/additive_attention_kernel.h"

namespace seqmem::additive_attention {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr char kName[] = "seqmem::additive_attention";

template <class Int>
struct Sizes {
  Leading<Int> batch;
  Int Tq, Tk, A, Dv;
};

template <class Int>
Sizes<Int> sizes_of(const Tensor& query, const Tensor& key, const Tensor& value) {
  const auto last = [](const Tensor& t, int64_t from_end) {
    return Check<Int>::size(t, t.dim() - from_end);
  };
  return {{}, last(query, 2), last(key, 2), last(query, 1), last(value, 1)};
}

template <class Int>
Sizes<Int> check_arguments(const Tensor& query, const Tensor& key, const Tensor& value,
                           const Tensor& score_weight, const OptionalTensor& mask) {
  const Check<Int> check(kName, query, "query");
  check.floating_input();
  check.same_kind("key", key);
  check.same_kind("value", value);
  check_matrices(check, "query", query);
  check_matrices(check, "key", key);
  check_matrices(check, "value", value);
  Sizes<Int> s = sizes_of<Int>(query, key, value);
  TORCH_CHECK_VALUE(check.size(key, key.dim() - 1) == s.A, check.op(),
                    ": expected key of shape [..., Tk, ", s.A, "], got ", key.sym_sizes());
  TORCH_CHECK_VALUE(check.size(value, value.dim() - 2) == s.Tk, check.op(),
                    ": expected value of shape [..., ", s.Tk, ", Dv], got ", value.sym_sizes());
  check.operand("score_weight", score_weight, {s.A});
  s.batch.widen(check, "query", query);
  s.batch.widen(check, "key", key);
  s.batch.widen(check, "value", value);
  if (mask.has_value()) {
    check_mask(check, query, *mask, s.Tq, s.Tk);
    s.batch.widen(check, "mask", *mask);
  }
  return s;
}

void check_op(const Tensor& query, const Tensor& key, const Tensor& value,
              const Tensor& score_weight, const OptionalTensor& mask) {
  check_arguments<c10::SymInt>(query, key, value, score_weight, mask);
}

// The arguments as the kernels take them, alive as long as this.
struct Call {
  const Operand query, key, value, score_weight;
  const Tensor mask;
  const std::vector<int64_t> query_of, key_of, value_of, mask_of;
  Shape shape;

  Call(const Sizes<int64_t>& s, const Tensor& q, const Tensor& k, const Tensor& v,
       const Tensor& weight, const OptionalTensor& m)
      : query(q),
        key(k),
        value(v),
        score_weight(weight),
        mask(m.has_value() ? usable_mask(*m, s.Tk) : Tensor()),
        query_of(s.batch.matrices_of(q)),
        key_of(s.batch.matrices_of(k)),
        value_of(s.batch.matrices_of(v)),
        mask_of(mask.defined() ? s.batch.matrices_of(mask) : std::vector<int64_t>()),
        shape{s.batch.total(),
              s.Tq,
              s.Tk,
              s.A,
              s.Dv,
              query_of.data(),
              key_of.data(),
              value_of.data(),
              mask_of.data(),
              mask.defined() ? mask.size(-2) : 1,
              1} {}

  Arguments arguments() const {
    const bool keeps = mask.defined() && mask.scalar_type() == at::kBool;
    return {query.data(),
            key.data(),
            value.data(),
            score_weight.data(),
            keeps ? mask.const_data_ptr<bool>() : nullptr,
            mask.defined() && !keeps ? mask.const_data_ptr() : nullptr};
  }
};

// Estimates in microseconds of one core; they only steer how many threads take part. Waking one
// costs about a hundred. Where several queries share the keys, each tanh costs half.
constexpr double kTanhsPerMicrosecond = 2200, kDoubleTanhsPerMicrosecond = 450;
constexpr double kProductsPerMicrosecond = 20e3, kCallWorthSharing = 100;
constexpr int64_t kQueriesThatShare = 8;

int threads_for(const Shape& s, Storage storage, double passes) {
  const double rate = storage == Storage::Double  ? kDoubleTanhsPerMicrosecond
                      : s.Tq >= kQueriesThatShare ? 2 * kTanhsPerMicrosecond
                                                  : kTanhsPerMicrosecond;
  const double each = s.A / rate + s.Dv / kProductsPerMicrosecond;
  const double shares = passes * s.B * s.Tq * s.Tk * each / kCallWorthSharing;
  return int(std::clamp(shares, 1.0, double(available_threads())));
}

// The parts of a batch whose gradients are added up apart: the same at any number of threads, and
// so few that their sums take about as much memory as the weights at most.
constexpr int64_t kUnits = 16, kRowsWorthApart = 64;

int64_t groups_for(const Shape& s) {
  const int64_t wanted = (kUnits + s.B - 1) / std::max<int64_t>(s.B, 1);
  const int64_t rows = std::max(kRowsWorthApart, (s.A + s.Dv) / 2);
  return std::clamp<int64_t>(s.Tq / rows, 1, wanted);
}

// ---- forward
// ---------------------------------------------------------------------------------------

using Outputs = std::tuple<Tensor, Tensor>;

template <class Int>
Outputs allocate(const Tensor& query, const Sizes<Int>& s) {
  return {s.batch.empty(query, s.Tq, s.Dv), s.batch.empty(query, s.Tq, s.Tk)};
}

Outputs forward_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                    const Tensor& score_weight, const OptionalTensor& mask) {
  const auto s = check_arguments<int64_t>(query, key, value, score_weight, mask);
  Outputs out = allocate(query, s);
  const Call call(s, query, key, value, score_weight, mask);
  Forward arguments = {call.arguments(), data(std::get<0>(out)), data(std::get<1>(out)), nullptr};
  const auto& kernel = SEQMEM_CHOOSE(forward_kernel);
  const Storage storage = storage_of(query);
  run_team(
      threads_for(call.shape, storage, 1),
      [&](int threads) {
        arguments.workspace =
            Workspace::get(kernel.workspace(storage, call.shape, arguments, threads));
      },
      [&](int thread, int threads, SpinBarrier& barrier) {
        kernel.run(storage, call.shape, arguments, thread, threads, barrier);
      });
  return out;
}

Outputs forward_meta(const Tensor& query, const Tensor& key, const Tensor& value,
                     const Tensor& score_weight, const OptionalTensor& mask) {
  return allocate(query, check_arguments<c10::SymInt>(query, key, value, score_weight, mask));
}

// ---- backward
// --------------------------------------------------------------------------------------

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward_cpu(const OptionalTensor& grad_output, const OptionalTensor& grad_weights,
                       const Tensor& query, const Tensor& key, const Tensor& value,
                       const Tensor& score_weight, const OptionalTensor& mask,
                       const Tensor& weights, std::array<bool, 5> output_mask) {
  const auto s = check_arguments<int64_t>(query, key, value, score_weight, mask);
  Call call(s, query, key, value, score_weight, mask);
  call.shape.groups = groups_for(call.shape);
  auto make = [&](bool wanted, int64_t rows, int64_t columns) {
    return wanted ? s.batch.empty(query, rows, columns) : Tensor();
  };
  const Tensor grad_query = make(output_mask[0], s.Tq, s.A),
               grad_key = make(output_mask[1], s.Tk, s.A),
               grad_value = make(output_mask[2], s.Tk, s.Dv),
               grad_score_weight = output_mask[3] ? at::empty({s.A}, query.options()) : Tensor(),
               grad_scores = make(output_mask[4], s.Tq, s.Tk);
  const Operand d_output(grad_output), d_weights(grad_weights), saved(weights);
  Backward arguments = {call.arguments(), d_output.data(),         d_weights.data(),
                        saved.data(),     data(grad_query),        data(grad_key),
                        data(grad_value), data(grad_score_weight), data(grad_scores),
                        nullptr};
  const auto& kernel = SEQMEM_CHOOSE(backward_kernel);
  const Storage storage = storage_of(query);
  run_team(
      threads_for(call.shape, storage, 2),
      [&](int threads) {
        arguments.workspace =
            Workspace::get(kernel.workspace(storage, call.shape, arguments, threads));
      },
      [&](int thread, int threads, SpinBarrier& barrier) {
        kernel.run(storage, call.shape, arguments, thread, threads, barrier);
      });
  auto finish = [&](const Tensor& grad, const Tensor& like) {
    return grad.defined() ? at::sum_to(grad, like.sizes()) : empty_like_of<int64_t>(query, {0});
  };
  return {finish(grad_query, query), finish(grad_key, key), finish(grad_value, value),
          finish(grad_score_weight, score_weight), finish(grad_scores, mask.value_or(query))};
}

Gradients backward_meta(const OptionalTensor&, const OptionalTensor&, const Tensor& query,
                        const Tensor& key, const Tensor& value, const Tensor& score_weight,
                        const OptionalTensor& mask, const Tensor&,
                        std::array<bool, 5> output_mask) {
  auto make = [&](bool wanted, const Tensor& like) {
    return wanted ? at::empty_symint(like.sym_sizes(), query.options())
                  : empty_like_of<c10::SymInt>(query, {c10::SymInt(0)});
  };
  return {make(output_mask[0], query), make(output_mask[1], key), make(output_mask[2], value),
          make(output_mask[3], score_weight), make(output_mask[4], mask.value_or(query))};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
#define SEQMEM_ARGUMENTS "Tensor query, Tensor key, Tensor value, Tensor score_weight, Tensor? mask"
  m.def("additive_attention(" SEQMEM_ARGUMENTS ") -> (Tensor output, Tensor weights)", tags);
  m.def("check_additive_attention(" SEQMEM_ARGUMENTS ") -> ()", tags);
  m.def("additive_attention_backward(Tensor? grad_output, Tensor? grad_weights, " SEQMEM_ARGUMENTS
        ", Tensor weights, bool[5] output_mask) -> (Tensor grad_query, Tensor grad_key, "
        "Tensor grad_value, Tensor grad_score_weight, Tensor grad_mask)",
        tags);
}

TORCH_LIBRARY_IMPL(seqmem, CPU, m) {
  m.impl("additive_attention", forward_cpu);
  m.impl("additive_attention_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(seqmem, Meta, m) {
  m.impl("additive_attention", forward_meta);
  m.impl("additive_attention_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(seqmem, CompositeExplicitAutograd, m) {
  m.impl("check_additive_attention", check_op);
  m.impl("additive_attention", Unsupported<kName, &check_op, Outputs>::call);
}

// Nested tensors are the one kind that the key above leaves out.
TORCH_LIBRARY_IMPL(seqmem, NestedTensorCPU, m) {
  m.impl("additive_attention", Unsupported<kName, &check_op, Outputs>::call);
}

}  // namespace seqmem::additive_attention
