// The LSTM's loops over time in thread block clusters, as ops that `_triton/lstm.py` calls.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "launcher.h"
#include "lstm_cluster_kernel.h"

namespace seqmem::lstm {
namespace {

using at::Tensor;

template <class T>
const T* given(Maybe t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}
const void* given(Maybe t) { return t.has_value() ? t->const_data_ptr() : nullptr; }
void* written(Maybe t) { return t.has_value() ? t->mutable_data_ptr() : nullptr; }

cuda::Sequence sequence_of(int64_t batch, const Tensor& weight_hh, Maybe lengths, Maybe reset,
                           Maybe offsets, int64_t steps, int64_t t_stride, int64_t b_stride,
                           bool reverse) {
  return {.batch = batch,
          .hidden = weight_hh.size(1),
          .steps = steps,
          .t_stride = t_stride,
          .b_stride = b_stride,
          .reverse = reverse,
          .lengths = given<int64_t>(lengths),
          .reset = given<bool>(reset),
          .offsets = given<int64_t>(offsets)};
}

void lstm_forward_cluster_cuda(const Tensor& z, const Tensor& output, const Tensor& hy,
                               const Tensor& cy, Maybe cells, bool keep_gates,
                               const Tensor& weight_hh, Maybe bias_ih, Maybe bias_hh, Maybe hx,
                               Maybe cx, int64_t tile, Maybe lengths, Maybe reset, Maybe offsets,
                               int64_t steps, int64_t t_stride, int64_t b_stride, bool reverse) {
  const c10::cuda::CUDAGuard guard(z.device());
  const cuda::ClusterForward arguments = {.z = z.const_data_ptr(),
                                          .weight_hh = weight_hh.const_data_ptr(),
                                          .bias_ih = given(bias_ih),
                                          .bias_hh = given(bias_hh),
                                          .hx = given(hx),
                                          .cx = given(cx),
                                          .output = output.mutable_data_ptr(),
                                          .hy = hy.mutable_data_ptr(),
                                          .cy = cy.mutable_data_ptr(),
                                          .gates = keep_gates ? z.mutable_data_ptr() : nullptr,
                                          .cells = written(cells)};
  const auto sequence = sequence_of(hy.size(0), weight_hh, lengths, reset, offsets, steps, t_stride,
                                    b_stride, reverse);
  C10_CUDA_CHECK(
      cuda::lstm_forward_cluster(storage_of(z), int(tile), sequence, arguments, stream()));
}

void lstm_backward_cluster_cuda(const Tensor& dz, Maybe grad_hx, Maybe grad_cx, Maybe grad_output,
                                Maybe grad_hy, Maybe grad_cy, Maybe grad_gates, Maybe grad_cells,
                                const Tensor& weight_hh, Maybe cx, const Tensor& gates,
                                const Tensor& cells, int64_t batch, int64_t tile, Maybe lengths,
                                Maybe reset, Maybe offsets, int64_t steps, int64_t t_stride,
                                int64_t b_stride, bool reverse) {
  const c10::cuda::CUDAGuard guard(dz.device());
  const cuda::ClusterBackward arguments = {.grad_output = given(grad_output),
                                           .grad_hy = given(grad_hy),
                                           .grad_cy = given(grad_cy),
                                           .grad_gates = given(grad_gates),
                                           .grad_cells = given(grad_cells),
                                           .weight_hh = weight_hh.const_data_ptr(),
                                           .cx = given(cx),
                                           .gates = gates.const_data_ptr(),
                                           .cells = cells.const_data_ptr(),
                                           .dz = dz.mutable_data_ptr(),
                                           .grad_hx = written(grad_hx),
                                           .grad_cx = written(grad_cx)};
  const auto sequence =
      sequence_of(batch, weight_hh, lengths, reset, offsets, steps, t_stride, b_stride, reverse);
  C10_CUDA_CHECK(
      cuda::lstm_backward_cluster(storage_of(dz), int(tile), sequence, arguments, stream()));
}

int64_t lstm_cluster_tile_cuda(const Tensor& weight_hh, int64_t batch, bool backward) {
  const c10::cuda::CUDAGuard guard(weight_hh.device());
  return cuda::lstm_cluster_tile(storage_of(weight_hh), weight_hh.size(1), batch, backward);
}

}  // namespace

// Not public: they write into what `_triton/lstm.py` gives them, all of it contiguous.
#define SEQMEM_SEQUENCE_ARGUMENTS                                                        \
  "int tile, Tensor? lengths, Tensor? reset, Tensor? offsets, int steps, int t_stride, " \
  "int b_stride, bool reverse) -> ()"

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  m.def(
      "lstm_forward_cluster_(Tensor(a!) z, Tensor(b!) output, Tensor(c!) hy, Tensor(d!) cy, "
      "Tensor(e!)? cells, bool keep_gates, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
      "Tensor? hx, Tensor? cx, " SEQMEM_SEQUENCE_ARGUMENTS);
  m.def(
      "lstm_backward_cluster_(Tensor(a!) dz, Tensor(b!)? grad_hx, Tensor(c!)? grad_cx, "
      "Tensor? grad_output, Tensor? grad_hy, Tensor? grad_cy, Tensor? grad_gates, "
      "Tensor? grad_cells, Tensor weight_hh, Tensor? cx, Tensor gates, Tensor cells, int "
      "batch, " SEQMEM_SEQUENCE_ARGUMENTS);
  // How many batch rows each cluster takes, 0 where another route serves.
  m.def("lstm_cluster_tile(Tensor weight_hh, int batch, bool backward) -> int");
}

#undef SEQMEM_SEQUENCE_ARGUMENTS

TORCH_LIBRARY_IMPL(seqmem, CUDA, m) {
  m.impl("lstm_forward_cluster_", &lstm_forward_cluster_cuda);
  m.impl("lstm_backward_cluster_", &lstm_backward_cluster_cuda);
  m.impl("lstm_cluster_tile", &lstm_cluster_tile_cuda);
}

}  // namespace seqmem::lstm
