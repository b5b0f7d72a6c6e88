// The LSTM ops that a CUDA build runs without Python per step: the cell and its backward, and the
// loops over time that `_triton/lstm.py` calls where the recurrent weights do not fit on chip.
// Formulas: csrc/autograd/lstm.cpp. Each matrix product is cuBLAS, all the rest of a step one
// kernel.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>

#include "../ops/lstm_check.h"
#include "launcher.h"
#include "lstm_cell_kernel.h"
#include "lstm_kernel.h"

namespace seqmem::lstm {
namespace {

using CudaStep = cuda::Step;

cuda::CellShape cell_shape(const Sizes<int64_t>& s) { return {s.B, s.I, s.H}; }

Tensors<3> small_cell_cuda(const CellInputs& in, const Sizes<int64_t>& s) {
  const auto options = in.input.options();
  const Tensor hy = at::empty({s.B, s.H}, options), cy = at::empty({s.B, s.H}, options);
  const Tensor gates =
      in.return_gates ? at::empty({s.B, 4 * s.H}, options) : at::empty({0}, options);
  const Operand input(in.input), hx(in.hx), cx(in.cx), weight_ih(in.weight_ih),
      weight_hh(in.weight_hh), bias_ih(in.bias_ih), bias_hh(in.bias_hh);
  const cuda::CellForward arguments = {.input = input.data(),
                                       .hx = hx.data(),
                                       .cx = cx.data(),
                                       .weight_ih = weight_ih.data(),
                                       .weight_hh = weight_hh.data(),
                                       .bias_ih = bias_ih.data(),
                                       .bias_hh = bias_hh.data(),
                                       .hy = data(hy),
                                       .cy = data(cy),
                                       .gates = data(gates)};
  C10_CUDA_CHECK(cuda::lstm_cell_forward(storage_of(in.input), cell_shape(s), arguments, stream()));
  return {hy, cy, gates};
}

Tensors<3> cell_cuda(const CellInputs& in) {
  const auto s = check_cell<int64_t>(in);
  const c10::cuda::CUDAGuard guard(in.input.device());
  if (cuda::small_cell(cell_shape(s))) return small_cell_cuda(in, s);
  const Tensor z = at::mm(in.input, in.weight_ih.t());  // [B, 4H], becomes the gates
  if (in.hx.has_value()) z.addmm_(*in.hx, in.weight_hh.t());
  const Tensor hy = at::empty({s.B, s.H}, in.input.options()), cy = at::empty_like(hy);
  const Tensor cx = dense(in.cx), bias_ih = dense(in.bias_ih), bias_hh = dense(in.bias_hh);
  const cuda::StepForward arguments = {.z = const_data(z),
                                       .bias_ih = const_data(bias_ih),
                                       .bias_hh = const_data(bias_hh),
                                       .c_in = const_data(cx),
                                       .c_out = data(cy),
                                       .h_out = data(hy),
                                       .output = nullptr,
                                       .gates = in.return_gates ? data(z) : nullptr,
                                       .cells = nullptr,
                                       .wide_c = false};
  C10_CUDA_CHECK(cuda::lstm_forward_step(storage_of(in.input), {s.B, s.H}, arguments, stream()));
  return {hy, cy, in.return_gates ? z : at::empty({0}, in.input.options())};
}

Tensors<6> cell_backward_cuda(const CellBackwardInputs& in) {
  const auto s = check_cell_backward<int64_t>(in);
  const auto [of_input, of_state, of_weights] = in.output_mask;
  const c10::cuda::CUDAGuard guard(in.input.device());
  const Tensor grad_hy = dense(in.grad_hy), grad_cy = dense(in.grad_cy),
               grad_gates = dense(in.grad_gates), cx = dense(in.cx), gates = in.gates.contiguous(),
               cy = in.cy.contiguous(), dz = at::empty_like(gates),
               none = at::empty({0}, in.input.options()),
               grad_cx = of_state ? at::empty_like(cy) : Tensor();
  const cuda::StepBackward arguments = {.grad_output = nullptr,
                                        .grad_hy = const_data(grad_hy),
                                        .from_next = nullptr,
                                        .d_c_in = const_data(grad_cy),
                                        .d_c_out = data(grad_cx),
                                        .grad_gates = const_data(grad_gates),
                                        .grad_cells = nullptr,
                                        .cx = const_data(cx),
                                        .gates = const_data(gates),
                                        .cells = const_data(cy),
                                        .dz = data(dz),
                                        .wide_c = false};
  C10_CUDA_CHECK(cuda::lstm_backward_step(storage_of(in.input), {s.B, s.H}, arguments, stream()));
  if (cuda::small_cell(cell_shape(s))) {
    auto wanted = [&](bool is_wanted, const Tensor& like) {
      return is_wanted ? at::empty(like.sizes(), like.options()) : none;
    };
    const Tensors<6> out = {
        wanted(of_input, in.input),
        wanted(of_state, cy),
        of_state ? grad_cx : none,
        wanted(of_weights, in.weight_ih),
        wanted(of_weights, in.weight_hh),
        of_weights && in.has_bias ? at::empty({4 * s.H}, gates.options()) : none};
    const Operand input(in.input), hx(in.hx), weight_ih(in.weight_ih), weight_hh(in.weight_hh);
    const cuda::CellProducts products = {.dz = const_data(dz),
                                         .input = input.data(),
                                         .hx = hx.data(),
                                         .weight_ih = weight_ih.data(),
                                         .weight_hh = weight_hh.data(),
                                         .grad_input = data(std::get<0>(out)),
                                         .grad_hx = data(std::get<1>(out)),
                                         .grad_weight_ih = data(std::get<3>(out)),
                                         .grad_weight_hh = data(std::get<4>(out)),
                                         .grad_bias = data(std::get<5>(out))};
    C10_CUDA_CHECK(
        cuda::lstm_cell_products(storage_of(in.input), cell_shape(s), products, stream()));
    return out;
  }
  Tensor grad_weight_hh = none;
  if (of_weights)
    grad_weight_hh =
        in.hx.has_value() ? at::mm(dz.t(), *in.hx) : in.weight_hh.new_zeros(in.weight_hh.sizes());
  return {of_input ? at::mm(dz, in.weight_ih) : none,
          of_state ? at::mm(dz, in.weight_hh) : none,
          of_state ? grad_cx : none,
          of_weights ? at::mm(dz.t(), in.input) : none,
          grad_weight_hh,
          of_weights && in.has_bias ? dz.sum(0) : none};
}

// Rows of a sequence: step t is `sizes[t]` rows from `starts[t]` on, `row_stride` apart.
struct Schedule {
  at::IntArrayRef starts, sizes;
  int64_t row_stride;
  bool reverse;
  Tensor lengths, reset;

  int64_t steps() const { return static_cast<int64_t>(starts.size()); }
  int64_t step(int64_t k) const { return reverse ? steps() - 1 - k : k; }

  Tensor rows(const Tensor& t, int64_t at) const {
    const int64_t width = t.size(1);
    return t.as_strided({sizes[at], width}, {row_stride * width, 1},
                        t.storage_offset() + starts[at] * width);
  }

  // Step number k in the order of computation.
  CudaStep describe(int64_t k, int64_t hidden) const {
    const int64_t t = step(k), after = reverse ? t : t + 1, before = reverse ? t + 1 : t;
    auto flags = [&](int64_t seam) { return seam < steps() ? starts[seam] : -1; };
    CudaStep s = {sizes[t], hidden};
    s.t = t;
    s.steps = steps();
    s.row = starts[t];
    s.row_stride = row_stride;
    s.prev_row = k > 0 ? starts[step(k - 1)] : 0;
    s.reverse = reverse;
    s.lengths = static_cast<const int64_t*>(const_data(lengths));
    s.reset = static_cast<const bool*>(const_data(reset));
    s.cut_after_row = after > 0 ? flags(after) : -1;
    s.cut_before_row = flags(before);
    return s;
  }
};

void lstm_forward_steps_cuda(const Tensor& z, const Tensor& h, const Tensor& c,
                             const Tensor& output, Maybe cells, bool keep_gates, bool zero_state,
                             const Tensor& weight_hh, Maybe bias_ih, Maybe bias_hh, Maybe lengths,
                             Maybe reset, at::IntArrayRef starts, at::IntArrayRef sizes,
                             int64_t row_stride, bool reverse) {
  const c10::cuda::CUDAGuard guard(z.device());
  const Schedule layout = {starts, sizes, row_stride, reverse, dense(lengths), dense(reset)};
  const Tensor w = weight_hh.t(), b_ih = dense(bias_ih), b_hh = dense(bias_hh);
  const cuda::StepForward arguments = {.z = const_data(z),
                                       .bias_ih = const_data(b_ih),
                                       .bias_hh = const_data(b_hh),
                                       .c_in = const_data(c),
                                       .c_out = data(c),
                                       .h_out = data(h),
                                       .output = data(output),
                                       .gates = keep_gates ? data(z) : nullptr,
                                       .cells = cells.has_value() ? data(*cells) : nullptr,
                                       .wide_c = true};
  for (int64_t k = 0; k < layout.steps(); ++k) {
    const int64_t t = layout.step(k);
    if (k > 0 || !zero_state) layout.rows(z, t).addmm_(h.narrow(0, 0, sizes[t]), w);
    C10_CUDA_CHECK(
        cuda::lstm_forward_step(storage_of(z), layout.describe(k, h.size(1)), arguments, stream()));
  }
}

void lstm_backward_steps_cuda(const Tensor& dz, const Tensor& d_c, Maybe grad_output, Maybe grad_hy,
                              Maybe grad_gates, Maybe grad_cells, const Tensor& weight_hh, Maybe cx,
                              const Tensor& gates, const Tensor& cells, Maybe lengths, Maybe reset,
                              at::IntArrayRef starts, at::IntArrayRef sizes, int64_t row_stride,
                              bool reverse) {
  const c10::cuda::CUDAGuard guard(dz.device());
  const Schedule layout = {starts, sizes, row_stride, reverse, dense(lengths), dense(reset)};
  const int64_t hidden = weight_hh.size(1), last = layout.steps() - 1;
  const Tensor from_next = at::empty({d_c.size(0), hidden}, dz.options());
  auto given = [](Maybe t) { return t.has_value() ? const_data(*t) : nullptr; };
  const cuda::StepBackward arguments = {.grad_output = given(grad_output),
                                        .grad_hy = given(grad_hy),
                                        .from_next = const_data(from_next),
                                        .d_c_in = const_data(d_c),
                                        .d_c_out = data(d_c),
                                        .grad_gates = given(grad_gates),
                                        .grad_cells = given(grad_cells),
                                        .cx = given(cx),
                                        .gates = const_data(gates),
                                        .cells = const_data(cells),
                                        .dz = data(dz),
                                        .wide_c = true};
  for (int64_t k = last; k >= 0; --k) {
    if (k < last) {  // rows whose last step this is take grad_hy instead
      const int64_t next = layout.step(k + 1), rows = std::min(sizes[next], sizes[layout.step(k)]);
      Tensor target = from_next.narrow(0, 0, rows);
      at::mm_out(target, layout.rows(dz, next).narrow(0, 0, rows), weight_hh);
    }
    C10_CUDA_CHECK(
        cuda::lstm_backward_step(storage_of(dz), layout.describe(k, hidden), arguments, stream()));
  }
}

}  // namespace

// Not public: plain loops that write into what `_triton/lstm.py` gives them, all of it contiguous.
#define SEQMEM_LAYOUT_ARGUMENTS \
  "Tensor? lengths, Tensor? reset, int[] starts, int[] sizes, int row_stride, bool reverse) -> ()"

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  m.def(
      "lstm_forward_steps_(Tensor(a!) z, Tensor(b!) h, Tensor(c!) c, Tensor(d!) output, "
      "Tensor(e!)? cells, bool keep_gates, bool zero_state, Tensor weight_hh, Tensor? bias_ih, "
      "Tensor? bias_hh, " SEQMEM_LAYOUT_ARGUMENTS);
  m.def(
      "lstm_backward_steps_(Tensor(a!) dz, Tensor(b!) d_c, Tensor? grad_output, Tensor? grad_hy, "
      "Tensor? grad_gates, Tensor? grad_cells, Tensor weight_hh, Tensor? cx, Tensor gates, "
      "Tensor cells, " SEQMEM_LAYOUT_ARGUMENTS);
}

TORCH_LIBRARY_IMPL(seqmem, CUDA, m) {
  CellOp::implement<cell_cuda>(m, c10::DispatchKey::CUDA);
  CellBackwardOp::implement<cell_backward_cuda>(m, c10::DispatchKey::CUDA);
  m.impl("lstm_forward_steps_", &lstm_forward_steps_cuda);
  m.impl("lstm_backward_steps_", &lstm_backward_steps_cuda);
}

}  // namespace seqmem::lstm
