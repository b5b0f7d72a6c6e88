// The NTM functionals' CUDA kernels over raw pointers, for every size.
//
// Arguments as in cpu/ntm_addressing_kernel.h, in device memory that must live until the stream has
// passed. Any alignment works; 16 bytes with slots that are whole vectors of 16 bytes are fast.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/storage.h"
#include "../cpu/ntm_addressing_kernel.h"

namespace seqmem::cuda {

using ntm_addressing::Addressing;
using ntm_addressing::AddressingGradients;
using ntm_addressing::Shape;
using ntm_addressing::Write;
using ntm_addressing::WriteGradients;

cudaError_t ntm_read(Storage storage, const Shape& s, const void* memory, const void* weights,
                     void* reads, cudaStream_t stream);
// grad [B, H, M]; null where a gradient is not wanted
cudaError_t ntm_read_backward(Storage storage, const Shape& s, const void* memory,
                              const void* weights, const void* grad, void* grad_memory,
                              void* grad_weights, cudaStream_t stream);
cudaError_t ntm_write(Storage storage, const Shape& s, const Write& a, void* out,
                      cudaStream_t stream);
// grad [B, N, M]
cudaError_t ntm_write_backward(Storage storage, const Shape& s, const Write& a, const void* grad,
                               const WriteGradients& out, cudaStream_t stream);

// Numbers of the arithmetic's type (double for Double, else float) that the workspace must hold.
int64_t ntm_address_workspace(Storage storage, const Shape& s);
int64_t ntm_address_backward_workspace(Storage storage, const Shape& s);

cudaError_t ntm_address(Storage storage, const Shape& s, const Addressing& a, void* weights,
                        void* workspace, cudaStream_t stream);
// grad [B, H, N]
cudaError_t ntm_address_backward(Storage storage, const Shape& s, const Addressing& a,
                                 const void* grad, const AddressingGradients& out, void* workspace,
                                 cudaStream_t stream);

}  // namespace seqmem::cuda
