// Attention's CUDA kernels for small calls, over raw pointers; `small_attention` says which.
//
// S is the storage type. All pointers are device memory that must live until the stream has passed.
// Results are contiguous; null where not wanted. Letters: cpu/attention_kernel.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/storage.h"
#include "../cpu/attention_kernel.h"

namespace seqmem::cuda {

using attention::MaskKind;

struct AttentionShape : attention::Shape {
  int64_t heads;  // of the N batches, how many make one of the first leading dimension
};

// Element (n, row, column) is data[n / heads * outer + n % heads * inner + row * rows + column *
// columns].
struct AttentionMatrix {
  const void* data;
  int64_t outer, inner, rows, columns;
};

// columns is 1 of query, key, value and grad_output.
struct AttentionOperands {
  AttentionMatrix query, key, value;
  AttentionMatrix mask;  // bytes where MaskKind::Allowed, else S
};

struct AttentionGradientOperands {
  const void* weights;           // S [N, Tq, Tk]
  AttentionMatrix grad_output;   // [Tq, Dv], optional (zeros)
  AttentionMatrix grad_weights;  // [Tq, Tk], optional (zeros)
  void* by_scores;               // [N, Tq, Tk] of double for Double, else float; scratch
  void* grad_query;              // S [N, Tq, D]
  void* grad_key;                // S [N, Tk, D]
  void* grad_value;              // S [N, Tk, Dv], only beside grad_output
  void* grad_mask;               // S [N, Tq, Tk]
};

// Whether a row of scores fits on chip beside the operands, and the products are so few that a
// kernel of tensor cores does not win by more than its launch from Python costs.
bool small_attention(Storage storage, const AttentionShape& s);

cudaError_t attention_forward(Storage storage, const AttentionShape& s, const AttentionOperands& a,
                              void* output, void* weights, cudaStream_t stream);
cudaError_t attention_backward(Storage storage, const AttentionShape& s, const AttentionOperands& a,
                               const AttentionGradientOperands& g, cudaStream_t stream);

}  // namespace seqmem::cuda
