// Additive attention ops: schemas, the CPU and Meta keys. Arguments:
// seqmem_fast/ops/additive_attention.py.
#include <algorithm>

#include "../common/dispatch.h"
#include "../common/matrices.h"
#include "../common/op.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../cpu/additive_attention_kernel.h"

namespace seqmem::additive_attention {
namespace {

using at::Tensor;

constexpr char kName[] = "seqmem::additive_attention";
constexpr char kBackwardName[] = "seqmem::additive_attention_backward";
using ForwardOp = Op<kName, Tensors<2>(In, In, In, In, Maybe)>;
using BackwardOp =
    Op<kBackwardName, Tensors<5>(Maybe, Maybe, In, In, In, In, Maybe, In, std::array<bool, 5>)>;

struct Inputs {
  In query, key, value, score_weight;
  Maybe mask;
};

struct BackwardInputs : AttentionGradients, Inputs {
  In weights;
  std::array<bool, 5> output_mask;
};

template <class Int>
AttentionSizes<Int> check_inputs(const Check<Int>& check, const Inputs& in) {
  const auto s = check_attention(check, in.query, in.key, in.value, in.mask, false);
  check.operand("score_weight", in.score_weight, {s.width});
  return s;
}

template <class Int>
AttentionSizes<Int> check(const Inputs& in) {
  return check_inputs(Check<Int>(kName, in.query, "query"), in);
}

template <class Int>
AttentionSizes<Int> check_backward(const BackwardInputs& in) {
  const Check<Int> check(kBackwardName, in.query, "query");
  const auto s = check_inputs(check, in);
  check_attention_backward(check, s, in, in.weights);
  return s;
}

// [..., rows or 1, columns]
OptionalTensor mask_with_columns(Maybe mask, int64_t columns) {
  if (!mask.has_value()) return mask;
  Tensor t = bool_or_floating(*mask);
  while (t.dim() < 2) t = t.unsqueeze(0);
  auto sizes = t.sizes().vec();
  sizes.back() = columns;
  return t.expand(sizes).contiguous();
}

// The arguments as the kernels take them, alive as long as this.
struct Call {
  const Argument query, key, value, mask;
  const Operand score_weight;
  Shape shape;

  Call(const AttentionSizes<int64_t>& s, const Inputs& in)
      : query(s, in.query.contiguous()),
        key(s, in.key.contiguous()),
        value(s, in.value.contiguous()),
        mask(s, mask_with_columns(in.mask, s.Tk)),
        score_weight(in.score_weight),
        shape{.B = s.batch.total(),
              .Tq = s.Tq,
              .Tk = s.Tk,
              .A = s.width,
              .Dv = s.Dv,
              .query_offset = query.offset.data(),
              .key_offset = key.offset.data(),
              .value_offset = value.offset.data(),
              .mask_offset = mask.offset.data(),
              .mask_stride = mask.rows,
              .groups = 1} {}

  void put_into(Arguments& arguments) const {
    const bool keeps = mask.tensor.defined() && mask.tensor.scalar_type() == at::kBool;
    arguments.query = const_data(query.tensor);
    arguments.key = const_data(key.tensor);
    arguments.value = const_data(value.tensor);
    arguments.score_weight = score_weight.data();
    arguments.keep = keeps ? mask.tensor.const_data_ptr<bool>() : nullptr;
    arguments.bias = keeps ? nullptr : const_data(mask.tensor);
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

// The parts of a batch whose gradients are summed separately: the same at any number of threads,
// and so few that their sums take about as much memory as the weights at most.
constexpr int64_t kUnits = 16, kRowsOfUnit = 64;

int64_t groups_for(const Shape& s) {
  const int64_t wanted = (kUnits + s.B - 1) / std::max<int64_t>(s.B, 1);
  const int64_t rows = std::max(kRowsOfUnit, (s.A + s.Dv) / 2);
  return std::clamp<int64_t>(s.Tq / rows, 1, wanted);
}

Tensors<2> forward_cpu(const Inputs& in) {
  const auto s = check<int64_t>(in);
  Tensors<2> out = s.empty_outputs(in.query);
  const auto& [output, weights] = out;
  const Call call(s, in);
  const Storage storage = storage_of(in.query);
  Forward arguments{};
  call.put_into(arguments);
  arguments.output = data(output);
  arguments.weights = data(weights);
  launch(SEQMEM_CHOOSE(forward_kernel), threads_for(call.shape, storage, 1), arguments, storage,
         call.shape);
  return out;
}

Tensors<2> forward_meta(const Inputs& in) { return check<c10::SymInt>(in).empty_outputs(in.query); }

Tensors<5> backward_cpu(const BackwardInputs& in) {
  const auto s = check_backward<int64_t>(in);
  Call call(s, in);
  call.shape.groups = groups_for(call.shape);
  const auto [of_query, of_key, of_value, of_score_weight, of_mask] = in.output_mask;
  const auto options = in.query.options();
  const Tensor query = s.gradient(of_query, in.query, s.Tq, s.width),
               key = s.gradient(of_key, in.query, s.Tk, s.width),
               value = s.gradient(of_value, in.query, s.Tk, s.Dv),
               score_weight = of_score_weight ? at::empty({s.width}, options) : Tensor(),
               scores = s.gradient(of_mask && differentiable(in.mask), in.query, s.Tq, s.Tk);
  const Operand grad_output(in.grad_output), grad_weights(in.grad_weights), weights(in.weights);
  const Storage storage = storage_of(in.query);
  Backward arguments{};
  call.put_into(arguments);
  arguments.grad_output = grad_output.data();
  arguments.grad_weights = grad_weights.data();
  arguments.weights = weights.data();
  arguments.grad_query = data(query);
  arguments.grad_key = data(key);
  arguments.grad_value = data(value);
  arguments.grad_score_weight = data(score_weight);
  arguments.grad_scores = data(scores);
  launch(SEQMEM_CHOOSE(backward_kernel), threads_for(call.shape, storage, 2), arguments, storage,
         call.shape);
  return {summed_gradient(query, in.query, options), summed_gradient(key, in.key, options),
          summed_gradient(value, in.value, options),
          summed_gradient(score_weight, in.score_weight, options),
          summed_gradient(scores, in.mask, options)};
}

Tensors<5> backward_meta(const BackwardInputs& in) {
  check_backward<c10::SymInt>(in);
  return gradients_like(in.output_mask, in.query, in.key, in.value, in.score_weight,
                        differentiable(in.mask));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  ForwardOp::define<check<c10::SymInt>, forward_cpu, forward_meta>(
      m,
      "(Tensor query, Tensor key, Tensor value, Tensor score_weight, Tensor? mask)"
      " -> (Tensor output, Tensor weights)");
  BackwardOp::define<check_backward<c10::SymInt>, backward_cpu, backward_meta>(
      m,
      "(Tensor? grad_output, Tensor? grad_weights, Tensor query, Tensor key, Tensor value, "
      "Tensor score_weight, Tensor? mask, Tensor weights, bool[5] output_mask)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_score_weight, "
      "Tensor grad_mask)");
}

}  // namespace seqmem::additive_attention
