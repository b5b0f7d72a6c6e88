// The LSTM cell's CUDA kernels for small calls: its products and all the rest in one launch, and in
// the backward all products in one. Any size is right; see `small_cell` for those that are fast.
//
// Every pointer is of the storage type, contiguous, in device memory that must live until the
// stream has passed. Any alignment works; 16 bytes with I and H whole vectors of 16 bytes are fast.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/storage.h"

namespace seqmem::cuda {

struct CellShape {
  int64_t B, I, H;
};

struct CellForward {
  const void* input;      // [B, I]
  const void* hx;         // [B, H], optional (zeros)
  const void* cx;         // [B, H], optional (zeros)
  const void* weight_ih;  // [4H, I]
  const void* weight_hh;  // [4H, H]
  const void* bias_ih;    // [4H], optional
  const void* bias_hh;    // [4H], optional
  void* hy;               // [B, H]
  void* cy;               // [B, H]
  void* gates;            // [B, 4H], optional: activated i, f, g, o
};

// From the gradient by the pre-activations, dz; what is null is not wanted.
struct CellProducts {
  const void* dz;         // [B, 4H]
  const void* input;      // [B, I]
  const void* hx;         // [B, H], optional (zeros)
  const void* weight_ih;  // [4H, I]
  const void* weight_hh;  // [4H, H]
  void* grad_input;       // [B, I]
  void* grad_hx;          // [B, H]
  void* grad_weight_ih;   // [4H, I]
  void* grad_weight_hh;   // [4H, H]
  void* grad_bias;        // [4H]
};

// Whether the weights, read once for 8 rows of the batch, take less time than a launch of cuBLAS.
inline bool small_cell(const CellShape& s) {
  return s.B <= 8 || (s.B + 7) / 8 * 4 * s.H * (s.I + s.H) <= int64_t(1) << 20;
}

cudaError_t lstm_cell_forward(Storage storage, const CellShape& s, const CellForward& a,
                              cudaStream_t stream);
cudaError_t lstm_cell_products(Storage storage, const CellShape& s, const CellProducts& a,
                               cudaStream_t stream);

}  // namespace seqmem::cuda
