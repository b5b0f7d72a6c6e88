// The usual call of the module Attention as one plain Python function: ten ops called from Python
// take longer than the arithmetic of a small call.
#include <ATen/ops/linear.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>

#include "../common/autograd.h"
#include "../ops/attention_check.h"

namespace seqmem::attention {
namespace {

using at::Tensor;

// [B, T, E] or [T, B, E] -> [B, H, T, E / H], a view.
Tensor split_heads(const Tensor& t, int64_t heads, bool batch_first) {
  const Tensor split = t.view({t.size(0), t.size(1), heads, t.size(2) / heads});
  return batch_first ? split.transpose(1, 2) : split.permute({1, 2, 0, 3});
}

std::tuple<Tensor, Tensor, Tensor> projected(const Tensor& query, const Tensor& key,
                                             const Tensor& value, const Tensor& weight,
                                             const OptionalTensor& bias, int64_t heads,
                                             bool batch_first) {
  if (query.is_same(key) && key.is_same(value)) {
    const Tensor all = at::linear(query, weight, bias);  // [B, T, 3E] or [T, B, 3E]
    const auto parts =
        all.view({all.size(0), all.size(1), 3, heads, all.size(2) / (3 * heads)})
            .permute(batch_first ? at::IntArrayRef{2, 0, 3, 1, 4} : at::IntArrayRef{2, 1, 3, 0, 4})
            .unbind(0);
    return {parts[0], parts[1], parts[2]};
  }
  const auto weights = weight.chunk(3);
  const auto biases = bias.has_value() ? bias->chunk(3) : std::vector<Tensor>(3);
  const auto project = [&](const Tensor& t, int k) {
    return split_heads(at::linear(t, weights[k], optional(biases[k])), heads, batch_first);
  };
  return {project(query, 0), project(key, 1), project(value, 2)};
}

// Measured: up to so many, our op, weights and all, takes less time than torch's, which keeps none.
// Longer ones are torch's, whose memory does not grow with the square of the length.
constexpr int64_t kMostUnaskedWeights = 1 << 20;

bool worth_own(const Tensor& query, const Tensor& key) {
  return !at::GradMode::is_enabled() && query.is_cpu() &&
         query.size(0) * query.size(1) * query.size(2) * key.size(2) <= kMostUnaskedWeights;
}

bool fits(const Tensor& t, const Tensor& weight) {
  return t.dim() == 3 && t.size(2) == weight.size(1) && t.scalar_type() == weight.scalar_type() &&
         t.device() == weight.device() && t.layout() == at::kStrided;
}

// Self- or cross-attention of a batch without masks; nothing for any other call, whose errors and
// options belong to the module.
std::optional<std::tuple<Tensor, OptionalTensor>> module(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& in_weight,
    const OptionalTensor& in_bias, const Tensor& out_weight, const OptionalTensor& out_bias,
    int64_t heads, bool batch_first, bool need_weights, bool average) {
  const int batch = batch_first ? 0 : 1;
  if (!fits(query, in_weight) || !fits(key, in_weight) || !fits(value, in_weight) ||
      key.size(batch) != query.size(batch) || key.sizes() != value.sizes())
    return std::nullopt;
  // As torch's own fast path: without gradients, nothing inside needs to be followed.
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
  if (!at::GradMode::is_enabled()) guard.emplace();
  const auto [q, k, v] = projected(query, key, value, in_weight, in_bias, heads, batch_first);
  Tensor output;
  OptionalTensor weights;
  if (need_weights || worth_own(q, k)) {
    std::tie(output, weights) = ForwardOp::call(q, k, v, {}, {}, false, 1);
    if (!need_weights) weights.reset();
    if (need_weights && average) weights = heads == 1 ? weights->squeeze(1) : weights->mean(1);
  } else {
    output = at::scaled_dot_product_attention(q, k, v);
  }
  const auto joined = batch_first ? output.transpose(1, 2) : output.permute({2, 0, 1, 3});
  return std::tuple(at::linear(joined.flatten(2), out_weight, out_bias), std::move(weights));
}

}  // namespace

void bind(pybind11::module_& m) {
  m.def("attention_module", torch::wrap_pybind_function_no_gil(module));
}

}  // namespace seqmem::attention
