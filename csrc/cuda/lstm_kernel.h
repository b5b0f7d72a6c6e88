// The LSTM's CUDA kernels: all of one step but its matrix products, over raw pointers.
//
// A cell is a sequence of one step. Step t of batch row b is stored at row `row + b * row_stride`
// of the [rows, width] tensors; `row` is given per step, which covers time-major, batch-major and
// packed layouts alike. All pointers are device memory that must live until the stream has passed;
// those marked optional may be null. Any alignment works, 16 bytes with a hidden size divisible by
// 4 is fast.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/storage.h"

namespace seqmem::cuda {

// Of every void pointer, whose type is S; arithmetic is float, or double for Double.
using seqmem::Storage;

struct Step {
  int64_t batch, hidden;
  int64_t t = 0, steps = 1;          // this step of how many
  int64_t row = 0;                   // of step t
  int64_t row_stride = 1;            // from one batch row to the next
  int64_t prev_row = 0;              // backward: row of the step computed before t
  bool reverse = false;              // time runs from the last step to the first
  const int64_t* lengths = nullptr;  // [batch], optional: a row's steps are 0 .. length - 1
  const bool* reset = nullptr;       // [rows], optional: cuts the state between steps t - 1 and t
  // With reset: row of the step whose flag cuts the state after t, and before t; -1 if none.
  int64_t cut_after_row = -1, cut_before_row = -1;
};

// c and h of rows that are not active (t >= length) are left as they are; output, gates and cells
// get zeros there.
struct StepForward {
  const void* z;        // [rows, 4H] pre-activations without biases
  const void* bias_ih;  // [4H], optional
  const void* bias_hh;  // [4H], optional
  const void* c_in;     // [batch, H], optional (zeros); S, or the arithmetic's type if wide_c
  void* c_out;          // [batch, H], of c_in's type, may be c_in
  void* h_out;          // [batch, H]
  void* output;         // [rows, H], optional
  void* gates;          // [rows, 4H], optional, may be z: activated i, f, g, o
  void* cells;          // [rows, H], optional
  bool wide_c;
};

struct StepBackward {
  const void* grad_output;  // [rows, H], optional
  const void* grad_hy;      // [batch, H], optional: enters at a row's last step
  const void* from_next;    // [batch, H], optional: dz of the step after t times weight_hh
  const void* d_c_in;       // [batch, H], optional; S, or the arithmetic's type if wide_c
  void* d_c_out;            // [batch, H], optional, of d_c_in's type, may be d_c_in
  const void* grad_gates;   // [rows, 4H], optional
  const void* grad_cells;   // [rows, H], optional
  const void* cx;           // [batch, H], optional (zeros)
  const void* gates;        // [rows, 4H]
  const void* cells;        // [rows, H]
  void* dz;                 // [rows, 4H]
  bool wide_c;
};

cudaError_t lstm_forward_step(Storage storage, const Step& step, const StepForward& arguments,
                              cudaStream_t stream);
cudaError_t lstm_backward_step(Storage storage, const Step& step, const StepBackward& arguments,
                               cudaStream_t stream);

}  // namespace seqmem::cuda
