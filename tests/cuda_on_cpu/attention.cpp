// Attention's CUDA sources as ops that take CPU tensors, under a namespace of their own.
#include "no_registration.h"
//
#include "../../csrc/cuda/attention.cpp"
//
#include "../../csrc/cuda/attention_kernel.cu"

TORCH_LIBRARY(attention_cuda_on_cpu, m) {
  using namespace seqmem::attention;
  m.def("attention", &ForwardOp::as_struct<forward_cuda>);
  m.def("attention_backward", &BackwardOp::as_struct<backward_cuda>);
}
