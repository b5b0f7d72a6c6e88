// The LSTM ops that a CUDA build runs without Python per step: the cell and its backward, and the
// loops over time that `_triton/lstm.py` calls where the recurrent weights do not fit on chip.
// Formulas: csrc/autograd/lstm.cpp. Each matrix product is cuBLAS, all the rest of a step one
// kernel.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "../ops/lstm_check.h"
#include "lstm_kernel.h"

namespace seqmem::lstm {
namespace {

using cuda::Step;
using cuda::Storage;

Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return Storage::Double;
    case at::kBFloat16: return Storage::BFloat16;
    case at::kHalf: return Storage::Half;
    default: return Storage::Float;
  }
}

Tensor dense(const OptionalTensor& t) { return t.has_value() ? t->contiguous() : Tensor(); }
const void* read(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* write(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }
cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

std::tuple<Tensor, Tensor, Tensor> lstm_cell_cuda(const Tensor& input, const OptionalTensor& hx,
                                                  const OptionalTensor& cx, const Tensor& weight_ih,
                                                  const Tensor& weight_hh,
                                                  const OptionalTensor& bias_ih,
                                                  const OptionalTensor& bias_hh,
                                                  bool return_gates) {
  const auto s = check_lstm_cell<int64_t>(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  const c10::cuda::CUDAGuard guard(input.device());
  const Tensor z = at::mm(input, weight_ih.t());  // [B, 4H], becomes the gates
  if (hx.has_value()) z.addmm_(*hx, weight_hh.t());
  const Tensor hy = at::empty({s.B, s.H}, input.options()), cy = at::empty_like(hy);
  const Tensor c = dense(cx), b_ih = dense(bias_ih), b_hh = dense(bias_hh);
  const cuda::StepForward arguments = {
      read(z),   read(b_ih), read(b_hh), read(c),
      write(cy), write(hy),  nullptr,    return_gates ? write(z) : nullptr,
      nullptr,   false};
  C10_CUDA_CHECK(cuda::lstm_forward_step(storage_of(input), {s.B, s.H}, arguments, stream()));
  return {hy, cy, return_gates ? z : at::empty({0}, input.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cell_backward_cuda(
    const OptionalTensor& grad_hy, const OptionalTensor& grad_cy, const OptionalTensor& grad_gates,
    const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
    const Tensor& weight_ih, const Tensor& weight_hh, const Tensor& gates, const Tensor& cy,
    bool has_bias, std::array<bool, 3> output_mask) {
  const auto [of_input, of_state, of_weights] = output_mask;
  const c10::cuda::CUDAGuard guard(input.device());
  const Tensor g_hy = dense(grad_hy), g_cy = dense(grad_cy), g_gates = dense(grad_gates),
               c0 = dense(cx), saved = gates.contiguous(), c = cy.contiguous(),
               dz = at::empty_like(saved), none = at::empty({0}, input.options()),
               grad_cx = of_state ? at::empty_like(c) : Tensor();
  const cuda::StepBackward arguments = {nullptr,        read(g_hy),    nullptr,   read(g_cy),
                                        write(grad_cx), read(g_gates), nullptr,   read(c0),
                                        read(saved),    read(c),       write(dz), false};
  C10_CUDA_CHECK(
      cuda::lstm_backward_step(storage_of(input), {cy.size(0), cy.size(1)}, arguments, stream()));
  Tensor grad_weight_hh = none;
  if (of_weights)
    grad_weight_hh = hx.has_value() ? at::mm(dz.t(), *hx) : weight_hh.new_zeros(weight_hh.sizes());
  return {of_input ? at::mm(dz, weight_ih) : none,
          of_state ? at::mm(dz, weight_hh) : none,
          of_state ? grad_cx : none,
          of_weights ? at::mm(dz.t(), input) : none,
          grad_weight_hh,
          of_weights && has_bias ? dz.sum(0) : none};
}

// Rows of a sequence: step t is `sizes[t]` rows from `starts[t]` on, `row_stride` apart.
struct Layout {
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
  Step describe(int64_t k, int64_t hidden) const {
    const int64_t t = step(k), after = reverse ? t : t + 1, before = reverse ? t + 1 : t;
    auto flags = [&](int64_t seam) { return seam < steps() ? starts[seam] : -1; };
    Step s = {sizes[t], hidden};
    s.t = t;
    s.steps = steps();
    s.row = starts[t];
    s.row_stride = row_stride;
    s.prev_row = k > 0 ? starts[step(k - 1)] : 0;
    s.reverse = reverse;
    s.lengths = static_cast<const int64_t*>(read(lengths));
    s.reset = static_cast<const bool*>(read(reset));
    s.cut_after_row = after > 0 ? flags(after) : -1;
    s.cut_before_row = flags(before);
    return s;
  }
};

void lstm_forward_steps_cuda(const Tensor& z, const Tensor& h, const Tensor& c,
                             const Tensor& output, const OptionalTensor& cells, bool keep_gates,
                             bool zero_state, const Tensor& weight_hh,
                             const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                             const OptionalTensor& lengths, const OptionalTensor& reset,
                             at::IntArrayRef starts, at::IntArrayRef sizes, int64_t row_stride,
                             bool reverse) {
  const c10::cuda::CUDAGuard guard(z.device());
  const Layout layout = {starts, sizes, row_stride, reverse, dense(lengths), dense(reset)};
  const Tensor w = weight_hh.t(), b_ih = dense(bias_ih), b_hh = dense(bias_hh);
  const cuda::StepForward arguments = {read(z),
                                       read(b_ih),
                                       read(b_hh),
                                       read(c),
                                       write(c),
                                       write(h),
                                       write(output),
                                       keep_gates ? write(z) : nullptr,
                                       cells.has_value() ? write(*cells) : nullptr,
                                       true};
  for (int64_t k = 0; k < layout.steps(); ++k) {
    const int64_t t = layout.step(k);
    if (k > 0 || !zero_state) layout.rows(z, t).addmm_(h.narrow(0, 0, sizes[t]), w);
    C10_CUDA_CHECK(
        cuda::lstm_forward_step(storage_of(z), layout.describe(k, h.size(1)), arguments, stream()));
  }
}

void lstm_backward_steps_cuda(const Tensor& dz, const Tensor& d_c,
                              const OptionalTensor& grad_output, const OptionalTensor& grad_hy,
                              const OptionalTensor& grad_gates, const OptionalTensor& grad_cells,
                              const Tensor& weight_hh, const OptionalTensor& cx,
                              const Tensor& gates, const Tensor& cells,
                              const OptionalTensor& lengths, const OptionalTensor& reset,
                              at::IntArrayRef starts, at::IntArrayRef sizes, int64_t row_stride,
                              bool reverse) {
  const c10::cuda::CUDAGuard guard(dz.device());
  const Layout layout = {starts, sizes, row_stride, reverse, dense(lengths), dense(reset)};
  const int64_t hidden = weight_hh.size(1), last = layout.steps() - 1;
  const Tensor from_next = at::empty({d_c.size(0), hidden}, dz.options());
  auto given = [](const OptionalTensor& t) { return t.has_value() ? read(*t) : nullptr; };
  const cuda::StepBackward arguments = {given(grad_output), given(grad_hy), read(from_next),
                                        read(d_c),          write(d_c),     given(grad_gates),
                                        given(grad_cells),  given(cx),      read(gates),
                                        read(cells),        write(dz),      true};
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
  m.impl("lstm_cell", &lstm_cell_cuda);
  m.impl("lstm_cell_backward", &lstm_cell_backward_cuda);
  m.impl("lstm_forward_steps_", &lstm_forward_steps_cuda);
  m.impl("lstm_backward_steps_", &lstm_backward_steps_cuda);
}

}  // namespace seqmem::lstm
