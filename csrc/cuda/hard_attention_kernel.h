// Hard attention's CUDA kernels over raw pointers: one launch for each op, and one more for the
// loss of many rows.
//
// S is the storage type, C double for Double, else float. All pointers are device memory that must
// live until the stream has passed. The log-probability of an action that is not
// in 0..K - 1 is NaN.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/storage.h"

namespace seqmem::cuda {

struct Policy {
  int64_t rows, K;
  const void* logits;  // S [rows, K]
};

struct Loss {
  const int64_t* action;  // [rows]
  const void* returns;    // S [rows]
  const void* baseline;   // S [rows] or, with a stride of 0, one number; optional
  int64_t baseline_stride;
  double entropy_weight;
  bool mean;     // over rows, else the sum
  bool per_row;  // the loss of each row
};

cudaError_t hard_attention_sample(Storage storage, const Policy& policy,
                                  const void* uniform,  // C [rows]
                                  int64_t* action,      // [rows]
                                  void* log_prob,       // S [rows]
                                  void* entropy,        // S [rows]
                                  cudaStream_t stream);
// grad_log_prob and grad_entropy, S [rows], are optional (zeros); grad_logits S [rows, K]
cudaError_t hard_attention_sample_backward(Storage storage, const Policy& policy,
                                           const int64_t* action, const void* grad_log_prob,
                                           const void* grad_entropy, void* grad_logits,
                                           cudaStream_t stream);

// Doubles that the loss needs: none where one block computes it.
int64_t hard_attention_loss_workspace(const Policy& policy, const Loss& loss);
// out: S [rows] if per_row, else [1]
cudaError_t hard_attention_loss(Storage storage, const Policy& policy, const Loss& loss, void* out,
                                double* workspace, cudaStream_t stream);
// grad: of out; grad_logits S [rows, K]
cudaError_t hard_attention_loss_backward(Storage storage, const Policy& policy, const Loss& loss,
                                         const void* grad, void* grad_logits, cudaStream_t stream);

}  // namespace seqmem::cuda
