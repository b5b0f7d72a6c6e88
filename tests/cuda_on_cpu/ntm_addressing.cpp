// The NTM functionals' CUDA sources as ops that take CPU tensors, under a namespace of their own.
#include "no_registration.h"
//
#include "../../csrc/cuda/ntm_addressing.cpp"
//
#include "../../csrc/cuda/ntm_addressing_kernel.cu"
//
#include "../../csrc/cuda/ntm_addressing_memory_kernel.cu"

namespace seqmem::ntm_addressing {
template <class Ops>
void define(torch::Library& m, const std::string& name) {
  m.def(name.c_str(), &Ops::Forward::template as_struct<forward_cuda<Ops>>);
  m.def((name + "_backward").c_str(), &Ops::Backward::template as_struct<backward_cuda<Ops>>);
}
}  // namespace seqmem::ntm_addressing

TORCH_LIBRARY(ntm_addressing_cuda_on_cpu, m) {
  using namespace seqmem::ntm_addressing;
  define<ContentOps>(m, "ntm_content_addressing");
  define<AddressingOps>(m, "ntm_addressing");
  define<ReadOps>(m, "ntm_read");
  define<WriteOps>(m, "ntm_write");
}
