// Attention ops: schemas, the CPU and Meta keys. Arguments: seqmem_fast/ops/attention.py.
#include <algorithm>

#include "../common/bf16_in_use.h"
#include "../common/operand.h"
#include "../common/scores.h"
#include "../common/team.h"
#include "../cpu/attention_kernel.h"
#include "attention_check.h"

namespace seqmem::attention {
namespace {

using Sizes = AttentionSizes<int64_t>;

Matrices view(const Argument& t) {
  return {const_data(t.tensor), t.offset.data(), t.rows, t.columns};
}

// A mask as the kernels take it: bytes or query's dtype, its last dimension contiguous or one
// element for all. What was expanded stays small.
OptionalTensor strided_mask(OptionalTensor mask) {
  if (!mask.has_value()) return mask;
  const int64_t dim = mask->dim();
  const bool converts = mask->scalar_type() != at::kBool && !mask->is_floating_point();
  const bool strided = dim > 0 && mask->size(-1) > 1 && mask->stride(-1) > 1;
  if (!converts && !strided) return mask;
  for (int64_t d = 0; d < dim; ++d)
    if (mask->stride(d) == 0 && mask->size(d) > 1) mask = mask->narrow(d, 0, 1);
  return bool_or_floating(*mask).contiguous();
}

// The arguments as the kernels take them, alive as long as this.
struct Call {
  const Argument query, key, value, mask;
  const Shape shape;

  Call(const Sizes& s, const Operands& in, const Options& options)
      : query(s, in.query),
        key(s, in.key),
        value(s, in.value),
        mask(s, strided_mask(in.mask)),
        shape{.N = s.batch.total(),
              .Tq = s.Tq,
              .Tk = s.Tk,
              .D = s.width,
              .Dv = s.Dv,
              .scale = scale_of(options.scale, s.width),
              .alpha = options.alpha,
              .causal = options.is_causal,
              .mask = !in.mask.has_value()                     ? MaskKind::None
                      : mask.tensor.scalar_type() == at::kBool ? MaskKind::Allowed
                                                               : MaskKind::Added} {}
};

constexpr int64_t kTasksPerThread = 4;

int threads_for(const Shape& s, double products) {
  const double rows = double(s.N) * s.Tq;
  return threads_for_scores(rows, rows * s.Tk, s.D + s.Dv, products, 20);
}

// Query rows below which a part of a batch is not worth its packing.
constexpr int64_t kRowsOfTask = 96;

int64_t groups_for(const Shape& s, int64_t tasks) {
  const int64_t wanted = (tasks + s.N - 1) / std::max<int64_t>(s.N, 1);
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(s.Tq / kRowsOfTask, 1));
}

// Packing the keys costs about as much as a few rows of scores.
constexpr int64_t kRowsWorthPacking = 8;

// Tiles and dot products pay where rows share the packing and features fill most of a block of 32.
bool runs_in_bf16(const Shape& s, at::ScalarType type) {
  constexpr int64_t kRows = 24, kFeatures = 24;
  return type == at::kBFloat16 && s.alpha == 1 && s.Tq >= kRows && s.D >= kFeatures &&
         s.Dv >= kFeatures && bf16_in_use() != Bf16::Float32;
}

Tensors<2> forward_cpu(const Inputs& in) {
  const Sizes s = check<int64_t>(in);
  Tensors<2> out = s.empty_outputs(in.query);
  const auto& [output, weights] = out;
  if (weights.numel() == 0) {
    output.zero_();
    return out;
  }
  const Call call(s, in, in);
  const int threads = threads_for(call.shape, 1);
  const Plan plan = {.pack = s.Tq >= kRowsWorthPacking || call.key.columns != 1,
                     .groups = groups_for(call.shape, threads == 1 ? 1 : threads * kTasksPerThread),
                     .next = 0};
  const Forward arguments = {.query = view(call.query),
                             .key = view(call.key),
                             .value = view(call.value),
                             .mask = view(call.mask),
                             .output = data(output),
                             .weights = data(weights),
                             .workspace = nullptr};
  const bool in_bf16 = runs_in_bf16(call.shape, in.query.scalar_type());
  launch(in_bf16 ? SEQMEM_CHOOSE_BF16(forward_kernel) : SEQMEM_CHOOSE(forward_kernel), threads,
         arguments, storage_of(in.query), call.shape, plan);
  return out;
}

Tensors<2> forward_meta(const Inputs& in) { return check<c10::SymInt>(in).empty_outputs(in.query); }

// The parts of a batch that are summed separately; the same at any number of threads.
constexpr int64_t kBackwardTasks = 16;

Tensors<4> backward_cpu(const BackwardInputs& in) {
  const Sizes s = check_backward<int64_t>(in);
  const Call call(s, in, in);
  const Argument grad_output(s, in.grad_output), grad_weights(s, in.grad_weights);
  const Operand weights(in.weights);
  const auto [of_query, of_key, of_value, of_mask] = in.output_mask;
  const bool of_added = of_mask && call.shape.mask == MaskKind::Added;
  const Tensor query = s.gradient(of_query, in.query, s.Tq, s.width),
               key = s.gradient(of_key, in.query, s.Tk, s.width),
               value = s.gradient(of_value, in.query, s.Tk, s.Dv),
               mask = s.gradient(of_added, in.query, s.Tq, s.Tk);
  if (in.weights.numel() > 0) {
    const Plan plan = {.pack = true, .groups = groups_for(call.shape, kBackwardTasks), .next = 0};
    const Backward arguments = {.grad_output = view(grad_output),
                                .grad_weights = view(grad_weights),
                                .query = view(call.query),
                                .key = view(call.key),
                                .value = view(call.value),
                                .mask = view(call.mask),
                                .weights = weights.data(),
                                .grad_query = data(query),
                                .grad_key = data(key),
                                .grad_value = data(value),
                                .grad_mask = data(mask),
                                .workspace = nullptr};
    const bool in_bf16 = runs_in_bf16(call.shape, in.query.scalar_type());
    launch(in_bf16 ? SEQMEM_CHOOSE_BF16(backward_kernel) : SEQMEM_CHOOSE(backward_kernel),
           threads_for(call.shape, 2.5), arguments, storage_of(in.query), call.shape, plan);
  } else {  // no queries or no keys
    for (const Tensor& grad : {query, key, value, mask})
      if (grad.defined()) grad.zero_();
  }
  const auto options = in.query.options();
  return {summed_gradient(query, in.query, options), summed_gradient(key, in.key, options),
          summed_gradient(value, in.value, options), summed_gradient(mask, in.mask, options)};
}

Tensors<4> backward_meta(const BackwardInputs& in) {
  check_backward<c10::SymInt>(in);
  return gradients_like(in.output_mask, in.query, in.key, in.value, differentiable(in.mask));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  ForwardOp::define<check<c10::SymInt>, forward_cpu, forward_meta>(m, kSchema);
  BackwardOp::define<check_backward<c10::SymInt>, backward_cpu, backward_meta>(m, kBackwardSchema);
}

}  // namespace seqmem::attention
