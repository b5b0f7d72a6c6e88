// The LSTM's CUDA sources as ops that take CPU tensors, under a namespace of their own.
#include "no_registration.h"
//
#include "../../csrc/cuda/lstm.cpp"
//
#include "../../csrc/cuda/lstm_kernel.cu"
//
#include "../../csrc/cuda/lstm_cell_kernel.cu"

TORCH_LIBRARY(lstm_cuda_on_cpu, m) {
  using namespace seqmem::lstm;
  m.def("lstm_cell", &CellOp::as_struct<cell_cuda>);
  m.def("lstm_cell_backward", &CellBackwardOp::as_struct<cell_backward_cuda>);
  m.def("lstm_forward_steps_", &lstm_forward_steps_cuda);
  m.def("lstm_backward_steps_", &lstm_backward_steps_cuda);
}
