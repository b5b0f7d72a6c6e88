// The LSTM's ops as plain Python functions: for a call of a few microseconds, the generic way
// through torch.ops (arguments boxed by schema) costs as much as the arithmetic.
#include <ATen/ops/unsqueeze.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <tuple>

#include "../ops/lstm_check.h"

namespace seqmem::lstm {
namespace {

std::tuple<Tensor, Tensor> cell(In input, Maybe hx, Maybe cx, In weight_ih, In weight_hh,
                                Maybe bias_ih, Maybe bias_hh) {
  auto [hy, cy, gates] = CellOp::call(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, false);
  return {std::move(hy), std::move(cy)};
}

OptionalTensor first(Maybe state) {
  return state.has_value() ? OptionalTensor(state->squeeze(0)) : std::nullopt;
}

// A result [B, *] as [1, B, *]. A view takes half a microsecond; where nobody else knows the
// tensor, autograd included, other sizes do.
Tensor stacked(Tensor t) {
  if (t.requires_grad() || t.use_count() > 1 || !t.is_contiguous() ||
      t.unsafeGetTensorImpl()->is_python_dispatch())
    return t.unsqueeze(0);
  t.unsafeGetTensorImpl()->set_sizes_contiguous({1, t.size(0), t.size(1)});
  return t;
}

// One layer alone; its states have the leading dimension of a stack's.
std::tuple<Tensor, std::tuple<Tensor, Tensor>> layer(In input, Maybe hx, Maybe cx, In weight_ih,
                                                     In weight_hh, Maybe bias_ih, Maybe bias_hh,
                                                     Maybe weight_hr, Maybe lengths, Maybe reset,
                                                     bool batch_first) {
  auto [output, hy, cy, gates, cells] =
      SequenceOp::call(input, first(hx), first(cx), weight_ih, weight_hh, bias_ih, bias_hh,
                       weight_hr, lengths, reset, {}, batch_first, false, false);
  return {std::move(output), {stacked(std::move(hy)), stacked(std::move(cy))}};
}

}  // namespace

void bind(pybind11::module_& m) {
  m.def("lstm_cell", torch::wrap_pybind_function_no_gil(cell));
  m.def("lstm_layer", torch::wrap_pybind_function_no_gil(layer));
}

}  // namespace seqmem::lstm
