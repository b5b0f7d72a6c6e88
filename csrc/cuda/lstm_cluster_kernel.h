// The LSTM over time by thread block clusters, for GPUs of compute capability 9.0 and newer: one
// launch for all steps. Float32, hidden sizes up to kClusterHidden. All pointers are contiguous
// device memory that must live until the stream has passed; those marked optional may be null.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace seqmem::cuda {

constexpr int64_t kClusterHidden = 384;

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
  const float* z;          // [rows, 4H] pre-activations without biases
  const float* weight_hh;  // [4H, H]
  const float* bias_ih;    // [4H], optional
  const float* bias_hh;    // [4H], optional
  const float* hx;         // [batch, H], optional (zeros)
  const float* cx;         // [batch, H], optional (zeros)
  float* output;           // [rows, H]
  float* hy;               // [batch, H]
  float* cy;               // [batch, H]
  float* gates;            // [rows, 4H], optional, may be z: activated i, f, g, o
  float* cells;            // [rows, H], optional
};

struct ClusterBackward {
  const float* grad_output;  // [rows, H], optional
  const float* grad_hy;      // [batch, H], optional
  const float* grad_cy;      // [batch, H], optional
  const float* grad_gates;   // [rows, 4H], optional
  const float* grad_cells;   // [rows, H], optional
  const float* weight_hh;    // [4H, H]
  const float* cx;           // [batch, H], optional (zeros)
  const float* gates;        // [rows, 4H]
  const float* cells;        // [rows, H]
  float* dz;                 // [rows, 4H]
  float* grad_hx;            // [batch, H], optional
  float* grad_cx;            // [batch, H], optional
};

// `tile`: how many batch rows a cluster takes, 1, 4 or 8.
cudaError_t lstm_forward_cluster(int tile, const Sequence& sequence,
                                 const ClusterForward& arguments, cudaStream_t stream);
cudaError_t lstm_backward_cluster(int tile, const Sequence& sequence,
                                  const ClusterBackward& arguments, cudaStream_t stream);

// How many clusters the current device runs at once; 0 where it cannot run one.
int lstm_active_clusters(int tile, int64_t hidden, bool backward);

}  // namespace seqmem::cuda
