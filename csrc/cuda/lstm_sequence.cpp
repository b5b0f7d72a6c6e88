// seqmem::lstm and its backward at the CUDA key: what the kernels written in CUDA C++ serve runs
// without Python, all else is handed to the Triton launchers (`_triton/lstm.py`). The products that
// need no recurrence are cuBLAS's, one for all steps. Formulas: csrc/autograd/lstm.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string>

#include "../ops/lstm_check.h"
#include "launcher.h"
#include "lstm_cell_kernel.h"
#include "lstm_cluster_kernel.h"
#include "lstm_persistent.h"

namespace seqmem::lstm {
namespace {

constexpr char kTriton[] = "seqmem::lstm_triton",
               kBackwardTriton[] = "seqmem::lstm_backward_triton";
using TritonOp = Op<kTriton, SequenceOp::Signature>;
using BackwardTritonOp = Op<kBackwardTriton, SequenceBackwardOp::Signature>;

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

enum class Route { kCell, kCluster, kPersistent, kTriton };

struct Choice {
  Route route;
  int tile = 0;  // of clusters
};

// The same for forward and backward, so that neither meets what the other does not serve.
Choice choose(const Sizes<int64_t>& s, In input, const Layout& layout, bool backward) {
  const auto& [weight_hr, lengths, reset, batch_sizes] = layout;
  if (weight_hr.has_value() || lengths.has_value() || batch_sizes.has_value() || s.B == 0)
    return {Route::kTriton};
  if (s.T == 1 && !reset.has_value() && cuda::small_cell({s.B, s.I, s.H})) return {Route::kCell};
  const Storage storage = storage_of(input);
  const int tile = cuda::lstm_cluster_tile(storage, s.H, s.B, backward);
  if (tile > 0 && cuda::lstm_cluster_tile(storage, s.H, s.B, !backward) > 0)
    return {Route::kCluster, tile};
  return {persistent_serves(input, s.B, s.H) ? Route::kPersistent : Route::kTriton};
}

// Rows are stored with these strides in the [rows, width] tensors.
struct Strides {
  int64_t t, b;
  Strides(const Sizes<int64_t>& s, bool batch_first)
      : t(batch_first ? 1 : s.B), b(batch_first ? s.T : 1) {}
};

cuda::Sequence sequence_of(const Sizes<int64_t>& s, const Tensor& reset, bool batch_first,
                           bool reverse) {
  const Strides strides(s, batch_first);
  return {.batch = s.B,
          .hidden = s.H,
          .steps = s.T,
          .t_stride = strides.t,
          .b_stride = strides.b,
          .reverse = reverse,
          .lengths = nullptr,
          .reset = reset.defined() ? reset.const_data_ptr<bool>() : nullptr,
          .offsets = nullptr};
}

Tensors<5> by_cell(const SequenceInputs& in, const Sizes<int64_t>& s) {
  const auto [hy, cy, gates] =
      CellOp::call(in.input.reshape({s.B, s.I}), in.hx, in.cx, in.weight_ih, in.weight_hh,
                   in.bias_ih, in.bias_hh, in.return_gates);
  const Tensor none = at::empty({0}, in.input.options());
  const int64_t T = in.batch_first ? s.B : 1, B = in.batch_first ? 1 : s.B;
  return {hy.clone().view({T, B, s.H}), hy, cy,
          in.return_gates ? gates.view({T, B, 4 * s.H}) : none,
          in.return_gates ? cy.clone().view({T, B, s.H}) : none};
}

Tensors<5> sequence_cuda(const SequenceInputs& in) {
  const auto s = check_sequence<int64_t>(in);
  const c10::cuda::CUDAGuard guard(in.input.device());
  const auto [route, tile] = choose(s, in.input, in, false);
  if (route == Route::kCell) return by_cell(in, s);
  if (route == Route::kTriton)
    return TritonOp::call(in.input, in.hx, in.cx, in.weight_ih, in.weight_hh, in.bias_ih,
                          in.bias_hh, in.weight_hr, in.lengths, in.reset, in.batch_sizes,
                          in.batch_first, in.reverse, in.return_gates);

  const auto options = in.input.options();
  const Tensor z = at::mm(in.input.reshape({-1, s.I}), in.weight_ih.t());  // becomes the gates
  const Tensor output = at::empty({in.input.size(0), in.input.size(1), s.H}, options),
               cells = in.return_gates ? at::empty(output.sizes(), options) : Tensor(),
               weight_hh = in.weight_hh.contiguous(), reset = dense(in.reset),
               bias_ih = dense(in.bias_ih), bias_hh = dense(in.bias_hh), hx = dense(in.hx),
               cx = dense(in.cx);
  Tensor hy = at::empty({s.B, s.H}, options), cy;
  if (route == Route::kCluster) {
    cy = at::empty_like(hy);
    const cuda::ClusterForward arguments = {.z = const_data(z),
                                            .weight_hh = const_data(weight_hh),
                                            .bias_ih = const_data(bias_ih),
                                            .bias_hh = const_data(bias_hh),
                                            .hx = const_data(hx),
                                            .cx = const_data(cx),
                                            .output = data(output),
                                            .hy = data(hy),
                                            .cy = data(cy),
                                            .gates = in.return_gates ? data(z) : nullptr,
                                            .cells = data(cells)};
    C10_CUDA_CHECK(cuda::lstm_forward_cluster(storage_of(z), tile,
                                              sequence_of(s, reset, in.batch_first, in.reverse),
                                              arguments, stream()));
  } else {
    const Strides strides(s, in.batch_first);
    const Tensor c = cx.defined() ? cx.to(at::kFloat, false, true)
                                  : at::zeros({s.B, s.H}, options.dtype(at::kFloat));
    forward_persistent(z, optional(hx), hy, c, output, optional(cells), in.return_gates, weight_hh,
                       optional(bias_ih), optional(bias_hh), {}, optional(reset), s.T, strides.t,
                       strides.b, in.reverse);
    cy = c.to(z.dtype());
  }
  if (!in.return_gates) return {output, hy, cy, at::empty({0}, options), at::empty({0}, options)};
  return {output, hy, cy, z.view({output.size(0), output.size(1), 4 * s.H}), cells};
}

// The sum of gradients that may be absent.
OptionalTensor sum(Maybe a, Maybe b, at::IntArrayRef shape) {
  if (!a.has_value() && !b.has_value()) return std::nullopt;
  if (!a.has_value()) return b->reshape(shape);
  return b.has_value() ? at::add(a->reshape(shape), *b) : a->reshape(shape);
}

Tensors<7> cell_backward(const SequenceBackwardInputs& in, const Sizes<int64_t>& s) {
  const int64_t shape[] = {s.B, s.H}, four[] = {s.B, 4 * s.H};
  const auto [grad_input, grad_hx, grad_cx, grad_weight_ih, grad_weight_hh, grad_bias] =
      CellBackwardOp::call(sum(in.grad_output, in.grad_hy, shape),
                           sum(in.grad_cells, in.grad_cy, shape), sum(in.grad_gates, {}, four),
                           in.input.reshape({s.B, s.I}), in.hx, in.cx, in.weight_ih, in.weight_hh,
                           in.gates.reshape(four), in.cells.reshape(shape), in.has_bias,
                           in.output_mask);
  return {in.output_mask[0] ? grad_input.view(in.input.sizes()) : grad_input,
          grad_hx,
          grad_cx,
          grad_weight_ih,
          grad_weight_hh,
          grad_bias,
          at::empty({0}, in.input.options())};
}

// h as it enters every step, [rows, H]: what the gradient of weight_hh multiplies dz with.
Tensor entering(const SequenceBackwardInputs& in, const Sizes<int64_t>& s) {
  const int64_t time = in.batch_first ? 1 : 0;
  const Tensor first = in.hx.has_value() ? *in.hx : at::zeros({s.B, s.H}, in.input.options());
  const Tensor rest = in.output.narrow(time, in.reverse ? 1 : 0, s.T - 1);
  const Tensor h = in.reverse ? at::cat({rest, first.unsqueeze(time)}, time)
                              : at::cat({first.unsqueeze(time), rest}, time);
  if (in.reset.has_value()) {
    const Tensor cut = in.reverse ? in.reset->narrow(time, 1, s.T - 1) : *in.reset;
    (in.reverse ? h.narrow(time, 0, s.T - 1) : h).masked_fill_(cut.unsqueeze(-1), 0);
  }
  return h.reshape({-1, s.H});
}

Tensors<7> sequence_backward_cuda(const SequenceBackwardInputs& in) {
  const auto s = check_sequence_backward<int64_t>(in);
  const c10::cuda::CUDAGuard guard(in.input.device());
  const auto [of_input, of_state, of_weights] = in.output_mask;
  const auto [route, tile] = choose(s, in.input, in, true);
  if (route == Route::kCell) return cell_backward(in, s);
  // Of a reset row's first state a persistent kernel does not tell the gradient.
  if (route == Route::kTriton || (route == Route::kPersistent && of_state && in.reset.has_value()))
    return BackwardTritonOp::call(
        in.grad_output, in.grad_hy, in.grad_cy, in.grad_gates, in.grad_cells, in.input, in.hx,
        in.cx, in.weight_ih, in.weight_hh, in.weight_hr, in.lengths, in.reset, in.batch_sizes,
        in.output, in.gates, in.cells, in.has_bias, in.batch_first, in.reverse, in.output_mask);

  const auto options = in.input.options();
  const Tensor gates = in.gates.contiguous(), cells = in.cells.contiguous(),
               weight_hh = in.weight_hh.contiguous(), reset = dense(in.reset), cx = dense(in.cx),
               grad_output = dense(in.grad_output), grad_hy = dense(in.grad_hy),
               grad_cy = dense(in.grad_cy), grad_gates = dense(in.grad_gates),
               grad_cells = dense(in.grad_cells), none = at::empty({0}, options);
  const Tensor dz = at::empty({s.T * s.B, 4 * s.H}, options);
  Tensor grad_hx = none, grad_cx = none;
  if (route == Route::kCluster) {
    if (of_state) grad_hx = at::empty({s.B, s.H}, options);
    if (of_state) grad_cx = at::empty({s.B, s.H}, options);
    const cuda::ClusterBackward arguments = {.grad_output = const_data(grad_output),
                                             .grad_hy = const_data(grad_hy),
                                             .grad_cy = const_data(grad_cy),
                                             .grad_gates = const_data(grad_gates),
                                             .grad_cells = const_data(grad_cells),
                                             .weight_hh = const_data(weight_hh),
                                             .cx = const_data(cx),
                                             .gates = const_data(gates),
                                             .cells = const_data(cells),
                                             .dz = data(dz),
                                             .grad_hx = of_state ? data(grad_hx) : nullptr,
                                             .grad_cx = of_state ? data(grad_cx) : nullptr};
    C10_CUDA_CHECK(cuda::lstm_backward_cluster(storage_of(dz), tile,
                                               sequence_of(s, reset, in.batch_first, in.reverse),
                                               arguments, stream()));
  } else {
    const Strides strides(s, in.batch_first);
    const Tensor d_c = grad_cy.defined() ? grad_cy.to(at::kFloat, false, true)
                                         : at::zeros({s.B, s.H}, options.dtype(at::kFloat));
    backward_persistent(dz, d_c, optional(grad_output), optional(grad_hy), optional(grad_gates),
                        optional(grad_cells), weight_hh, optional(cx), gates, cells, {},
                        optional(reset), s.T, strides.t, strides.b, in.reverse);
    if (of_state) {
      const Tensor steps = dz.view({in.input.size(0), in.input.size(1), 4 * s.H});
      const Tensor first = steps.select(in.batch_first ? 1 : 0, in.reverse ? s.T - 1 : 0);
      grad_hx = at::mm(first, weight_hh);
      grad_cx = d_c.to(dz.dtype());
    }
  }
  const Tensor transposed = dz.t();
  return {of_input ? at::mm(dz, in.weight_ih).view(in.input.sizes()) : none,
          grad_hx,
          grad_cx,
          of_weights ? at::mm(transposed, in.input.reshape({-1, s.I})) : none,
          of_weights ? at::mm(transposed, entering(in, s)) : none,
          of_weights && in.has_bias ? dz.sum(0) : none,
          none};
}

}  // namespace

// Not public: their CUDA kernels are the Triton launchers.
TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  m.def((std::string(kTriton) + kSequenceSchema).c_str());
  m.def((std::string(kBackwardTriton) + kSequenceBackwardSchema).c_str());
}

TORCH_LIBRARY_IMPL(seqmem, CUDA, m) {
  SequenceOp::implement<sequence_cuda>(m, c10::DispatchKey::CUDA);
  SequenceBackwardOp::implement<sequence_backward_cuda>(m, c10::DispatchKey::CUDA);
}

}  // namespace seqmem::lstm
