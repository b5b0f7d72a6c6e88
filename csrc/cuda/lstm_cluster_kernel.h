// The LSTM over time by thread block clusters, for GPUs of compute capability 9.0 and newer: one
// launch for all steps. Float32 with hidden sizes up to 384, 16-bit storage up to 512. All pointers
// are contiguous device memory that must live until the stream has passed; those marked optional
// may be null.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/storage.h"

namespace seqmem::cuda {

// Of every void pointer: Float, BFloat16 or Half; arithmetic is float.
using seqmem::Storage;

// Step t of batch row b is stored at row `offsets[t] + b` of the [rows, width] tensors, or, without
// offsets, at row `t * t_stride + b * b_stride`.
struct Sequence {
  int64_t batch, hidden, steps;
  int64_t t_stride, b_stride;
  bool reverse;            // time runs from the last step to the first
  const int64_t* lengths;  // [batch], optional: a row's steps are 0 .. length - 1
  const bool* reset;       // [rows], optional: cuts the state between steps t - 1 and t
  const int64_t* offsets;  // [steps], optional: packed rows, which hold active steps alone
};

struct ClusterForward {
  const void* z;          // [rows, 4H] pre-activations without biases
  const void* weight_hh;  // [4H, H]
  const void* bias_ih;    // [4H], optional
  const void* bias_hh;    // [4H], optional
  const void* hx;         // [batch, H], optional (zeros)
  const void* cx;         // [batch, H], optional (zeros)
  void* output;           // [rows, H]
  void* hy;               // [batch, H]
  void* cy;               // [batch, H]
  void* gates;            // [rows, 4H], optional, may be z: activated i, f, g, o
  void* cells;            // [rows, H], optional
};

struct ClusterBackward {
  const void* grad_output;  // [rows, H], optional
  const void* grad_hy;      // [batch, H], optional
  const void* grad_cy;      // [batch, H], optional
  const void* grad_gates;   // [rows, 4H], optional
  const void* grad_cells;   // [rows, H], optional
  const void* weight_hh;    // [4H, H]
  const void* cx;           // [batch, H], optional (zeros)
  const void* gates;        // [rows, 4H]
  const void* cells;        // [rows, H]
  void* dz;                 // [rows, 4H]
  void* grad_hx;            // [batch, H], optional
  void* grad_cx;            // [batch, H], optional
};

// Up to this hidden size a cluster is one block, on any GPU.
constexpr int64_t kBlockHidden = 64;

// `tile`: how many batch rows a cluster takes: 1, 4 or 8; 8 with 16-bit storage; 1 where it is one
// block.
cudaError_t lstm_forward_cluster(Storage storage, int tile, const Sequence& sequence,
                                 const ClusterForward& arguments, cudaStream_t stream);
cudaError_t lstm_backward_cluster(Storage storage, int tile, const Sequence& sequence,
                                  const ClusterBackward& arguments, cudaStream_t stream);

// The tile with which a step takes least time on the current device, estimated; 0 where it has no
// clusters of that size or another way to compute the LSTM is quicker.
int lstm_cluster_tile(Storage storage, int64_t hidden, int64_t batch, bool backward);

}  // namespace seqmem::cuda
