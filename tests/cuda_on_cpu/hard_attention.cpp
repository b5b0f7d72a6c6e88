// Hard attention's CUDA sources as ops that take CPU tensors, under a namespace of their own.
#include "no_registration.h"
//
#include "../../csrc/cuda/hard_attention.cpp"
//
#include "../../csrc/cuda/hard_attention_kernel.cu"

TORCH_LIBRARY(hard_attention_cuda_on_cpu, m) {
  using namespace seqmem::hard_attention;
  m.def("categorical_sample", &Sample::as_struct<sample_cuda>);
  m.def("categorical_sample_backward", &SampleBackward::as_struct<sample_backward_cuda>);
  m.def("reinforce_loss", &Loss::as_struct<loss_cuda>);
  m.def("reinforce_loss_backward", &LossBackward::as_struct<loss_backward_cuda>);
}
