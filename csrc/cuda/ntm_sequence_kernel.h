// The whole NTM sequence of a batch row in one block, forward or backward, with an LSTM of one
// layer: one launch for all steps. All pointers are contiguous device memory that must live until
// the stream has passed; those marked optional may be null.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/storage.h"

namespace seqmem::cuda {

struct NtmShape {
  int64_t steps, batch;
  int64_t record, checkpoint;  // floats of one row in `record`, in `checkpoints`
  int64_t segment;             // steps between checkpoints
  int64_t padded_memory;       // floats of a padded memory, [>= N, padded_width]
  int32_t control;             // C, units of the controller
  int32_t slots, width;        // N, M
  int32_t values;              // P, head values
  int32_t heads;               // Hd
  uint32_t writes;             // bit h: head h writes
  int32_t taps;                // of the shift
  int32_t read_width;          // R M
  int32_t padded_width;        // >= M
  bool squash;                 // tanh on keys and adds
};

// S: the storage type, Float, BFloat16 or Half. The gates i, f, g, o of a unit are neighbours.
struct NtmForward {
  const float* zx;                  // [T, B, 4C] the input's part of the gates, biases included
  const float* weight;              // [R M + C, 4C]
  const float* head_weight;         // [C, P]
  const float* head_bias;           // [P]
  const float* hidden;              // [B, C] the first state's, as the next four
  const void* memory;               // S [B, N, M]
  float* cell;                      // [B, C] and then the last state's
  float* weightings;                // [B, Hd, N] likewise
  float* reads;                     // [B, R M] likewise
  const float* initial_hidden;      // [C] what a reset goes back to; optional, all five
  const float* initial_cell;        // [C]
  const float* initial_memory;      // padded
  const float* initial_weightings;  // [Hd, N]
  const float* initial_reads;       // [R M]
  const int64_t* lengths;           // [B], optional: a row's steps
  const bool* reset;                // [T, B], optional: the step starts from the initial state
  void* features;                   // S [T, B, C + R M]
  float* hidden_out;                // [B, C] the last state's
  void* memory_out;                 // S [B, N, M] the last state's
  void* trace;                      // S [T, B, Hd, N] all weightings, optional
  float* record;                    // [T, B, record]: i, f, g, o, cell [5C], head values; optional
  float* checkpoints;               // [segments, B, checkpoint]: memories [N, M]; optional
};

// d_: gradients of the state, of the last one coming in, of the first one going out. i_: this row's
// part of those of what a reset goes back to.
struct NtmBackward {
  const void* grad_features;        // S [T, B, C + R M] with the strides below, optional
  int64_t f_t, f_b, f_c;            // elements from a step, row, feature to the next
  const void* grad_trace;           // S [T, B, Hd, N], optional
  const float* weight;              // [4C, R M + C]
  const float* head_weight;         // [P, C]
  const void* cell;                 // S [B, C] the first state's
  const void* weightings;           // S [B, Hd, N] likewise
  const float* initial_cell;        // [C], optional, all three
  const float* initial_memory;      // padded
  const float* initial_weightings;  // [Hd, N]
  const int64_t* lengths;           // [B], optional
  const bool* reset;                // [T, B], optional
  const void* trace;                // S [T, B, Hd, N]
  const float* record;              // as the forward left it
  const float* checkpoints;         // likewise
  float* memories;                  // [B, segment, padded_memory] scratch
  float* d_hidden;                  // [B, C]
  float* d_cell;                    // [B, C]
  float* d_memory;                  // [B, padded_memory]
  float* d_weightings;              // [B, Hd, N]
  float* d_reads;                   // [B, R M]
  float* i_hidden;                  // of the same shapes, zeros; optional, all five
  float* i_cell;
  float* i_memory;
  float* i_weightings;
  float* i_reads;
  float* dz;  // [T, B, 4C]
  float* dp;  // [T, B, P]
};

// Whether the current device's blocks can hold the weights.
bool ntm_forward_sequence_serves(Storage storage, const NtmShape& shape);
bool ntm_backward_sequence_serves(Storage storage, const NtmShape& shape);

cudaError_t ntm_forward_sequence(Storage storage, const NtmShape& shape,
                                 const NtmForward& arguments, cudaStream_t stream);

cudaError_t ntm_backward_sequence(Storage storage, const NtmShape& shape,
                                  const NtmBackward& arguments, cudaStream_t stream);

}  // namespace seqmem::cuda
