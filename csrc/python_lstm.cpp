// The LSTM's ops as plain Python functions: for a call of a few microseconds, the generic way
// through torch.ops (arguments boxed by schema) costs as much as the arithmetic.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/unsqueeze.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>

#include "common/autograd.h"

namespace seqmem::lstm {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> cell(const Tensor& input, const OptionalTensor& hx,
                                const OptionalTensor& cx, const Tensor& weight_ih,
                                const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                const OptionalTensor& bias_hh) {
  using Signature = std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
      const OptionalTensor&, const OptionalTensor&, bool);
  static const auto op = find_op<Signature>("seqmem::lstm_cell");
  auto [hy, cy, gates] = op.call(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, false);
  return {std::move(hy), std::move(cy)};
}

OptionalTensor first(const OptionalTensor& state) {
  return state.has_value() ? OptionalTensor(state->squeeze(0)) : std::nullopt;
}

// One layer alone; its states have the leading dimension of a stack's.
std::tuple<Tensor, std::tuple<Tensor, Tensor>> layer(
    const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
    const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
    const OptionalTensor& bias_hh, const OptionalTensor& weight_hr, const OptionalTensor& lengths,
    const OptionalTensor& reset, bool batch_first) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, bool, bool, bool);
  static const auto op = find_op<Signature>("seqmem::lstm");
  auto [output, hy, cy, gates, cells] =
      op.call(input, first(hx), first(cx), weight_ih, weight_hh, bias_ih, bias_hh, weight_hr,
              lengths, reset, {}, batch_first, false, false);
  return {std::move(output), {hy.unsqueeze(0), cy.unsqueeze(0)}};
}

}  // namespace

void bind(pybind11::module_& m) {
  m.def("lstm_cell", torch::wrap_pybind_function_no_gil(cell));
  m.def("lstm_layer", torch::wrap_pybind_function_no_gil(layer));
}

}  // namespace seqmem::lstm
