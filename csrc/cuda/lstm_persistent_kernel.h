// The LSTM over time by one grid that stays resident, for large hidden sizes: one cooperative
// launch for all steps. All pointers are contiguous device memory that must live until the stream
// has passed; those marked optional may be null. weight_hh, hx, output and dz are aligned to 16
// bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/storage.h"

namespace seqmem::cuda {

// Step t of batch row b is stored at row `t * t_stride + b * b_stride` of the [rows, width]
// tensors.
struct PersistentLayout {
  int64_t batch, hidden, steps;
  int64_t t_stride, b_stride;
  bool reverse;            // time runs from the last step to the first
  const int64_t* lengths;  // [batch], optional: a row's steps are 0 .. length - 1
  const bool* reset;       // [rows], optional: cuts the state between steps t - 1 and t
};

// Of type S: Float, BFloat16 or Half. The output must be filled with kNotYet before the launch.
struct PersistentForward {
  const void* z;          // [rows, 4H] pre-activations without biases
  const void* weight_hh;  // [4H, H]
  const void* bias_ih;    // [4H], optional
  const void* bias_hh;    // [4H], optional
  const void* hx;         // [batch, H], optional (zeros)
  void* hy;               // [batch, H], not hx
  float* c;               // [batch, H]: the state before the first step, and after the last
  void* output;           // [rows, H]
  void* gates;            // [rows, 4H], optional, may be z: activated i, f, g, o
  void* cells;            // [rows, H], optional
};

// dz must be filled with kNotYet before the launch.
struct PersistentBackward {
  const void* grad_output;  // [rows, H], optional
  const void* grad_hy;      // [batch, H], optional: enters at a row's last step
  const void* grad_gates;   // [rows, 4H], optional
  const void* grad_cells;   // [rows, H], optional
  const void* weight_hh;    // [4H, H]
  const void* cx;           // [batch, H], optional (zeros)
  const void* gates;        // [rows, 4H]
  const void* cells;        // [rows, H]
  float* d_c;               // [batch, H]: of the last cell state coming in, of the first going out
  void* dz;                 // [rows, 4H]
};

// The byte that memory holds until a step has been computed: no result has all bits of a word set.
constexpr int kNotYet = 0xff;

// Batch rows that one launch takes on the current device, 0 where these kernels cannot serve.
int64_t lstm_persistent_rows(Storage storage, int64_t batch, int64_t hidden);

cudaError_t lstm_forward_persistent(Storage storage, const PersistentLayout& layout,
                                    const PersistentForward& arguments, cudaStream_t stream);
cudaError_t lstm_backward_persistent(Storage storage, const PersistentLayout& layout,
                                     const PersistentBackward& arguments, cudaStream_t stream);

}  // namespace seqmem::cuda
