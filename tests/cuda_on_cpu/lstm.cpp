// The LSTM's CUDA sources as ops that take CPU tensors, under a namespace of their own.
#include <torch/library.h>

#undef TORCH_LIBRARY_FRAGMENT
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_FRAGMENT(ns, m) [[maybe_unused]] static void not_defined(torch::Library& m)
#define TORCH_LIBRARY_IMPL(ns, key, m) \
  [[maybe_unused]] static void not_registered(torch::Library& m)

#include "../../csrc/cuda/lstm.cpp"
//
#include "../../csrc/cuda/lstm_kernel.cu"

TORCH_LIBRARY(seqmem_cuda_on_cpu, m) {
  using namespace seqmem::lstm;
  m.def("lstm_cell", &CellOp::as_struct<cell_cuda>);
  m.def("lstm_cell_backward", &CellBackwardOp::as_struct<cell_backward_cuda>);
  m.def("lstm_forward_steps_", &lstm_forward_steps_cuda);
  m.def("lstm_backward_steps_", &lstm_backward_steps_cuda);
}
