// The output layer of a network over the NTM, below autograd. A small one on the CPU is computed by
// the calling thread alone.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include <array>

#include "../common/dispatch.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../cpu/ntm_output_kernel.h"

namespace seqmem::ntm {

constexpr double kMostAlone = 1 << 18;  // products; from about here on torch's team is worth waking

// Rows of features q [*, features] and a weight [outputs, features], both strided as they come.
inline OutputShape output_shape(In features, In weight) {
  return {features.numel() / weight.size(1), weight.size(1), weight.size(0)};
}

// Whether the CPU's kernel takes them; what it does not, torch computes or refuses.
inline bool is_small_output(In features, In weight, In bias) {
  if (weight.dim() != 2 || weight.size(1) != features.size(-1) || bias.dim() != 1 ||
      bias.size(0) != weight.size(0))
    return false;
  const auto type = features.scalar_type();
  const double products = double(features.numel()) * double(weight.size(0));
  return (type == at::kFloat || type == at::kDouble) && weight.scalar_type() == type &&
         bias.scalar_type() == type && weight.size(1) >= kFewestFeatures && products <= kMostAlone;
}

inline at::Tensor output_layer(In features, In weight, In bias) {
  if (!is_small_output(features, weight, bias)) return at::linear(features, weight, bias);
  auto sizes = features.sizes().vec();
  sizes.back() = weight.size(0);
  const at::Tensor output = at::empty(sizes, features.options());
  const Operand q(features), w(weight), b(bias);
  const OutputForward arguments = {q.data(), w.data(), b.data(), data(output), nullptr};
  launch(SEQMEM_CHOOSE(output_forward_kernel), 1, arguments, storage_of(output),
         output_shape(features, weight));
  return output;
}

// Of features, weight and bias; undefined where not wanted.
inline std::array<at::Tensor, 3> output_layer_backward(In gradient, In features, In weight, In bias,
                                                       const std::array<bool, 3>& wanted) {
  std::array<at::Tensor, 3> found;
  if (!is_small_output(features, weight, bias)) {
    const at::Tensor rows = gradient.reshape({-1, weight.size(0)});
    if (wanted[0]) found[0] = at::mm(rows, weight).view(features.sizes());
    if (wanted[1]) found[1] = at::mm(rows.t(), features.reshape({-1, weight.size(1)}));
    if (wanted[2]) found[2] = rows.sum(0);
    return found;
  }
  const std::array<const at::Tensor*, 3> like = {&features, &weight, &bias};
  for (int k = 0; k < 3; ++k)
    if (wanted[k]) found[k] = at::empty(like[k]->sizes(), features.options());
  const Operand g(gradient), q(features), w(weight);
  const OutputBackward arguments = {g.data(),       q.data(),       w.data(), data(found[0]),
                                    data(found[1]), data(found[2]), nullptr};
  launch(SEQMEM_CHOOSE(output_backward_kernel), 1, arguments, storage_of(features),
         output_shape(features, weight));
  return found;
}

}  // namespace seqmem::ntm
