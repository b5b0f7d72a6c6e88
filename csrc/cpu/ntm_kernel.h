// CPU kernels of the whole-sequence NTM: plain loops over raw pointers, compiled once per ISA.
//
// Arithmetic and storage are float or double; the op converts 16-bit tensors. A memory matrix is
// stored transposed, [M][stride]: slots are SIMD lanes, so that no sum is over the lanes of a
// vector.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/machine.h"

namespace seqmem::ntm {

using machine::kShortestSegment;
using machine::slot_stride;

struct Shape {
  int64_t T, B, I, layers, C, N, M;
  int64_t heads, reads, P;  // heads in all, read heads, values in head_bias
  int64_t taps;             // 2 * shift_range + 1 <= N + 1
  bool lstm, squash;
  const char* kinds;       // [heads], 'w' or 'r'
  const int64_t* lengths;  // [B], or null
  const bool* reset;       // [T, B], or null
  int64_t segment;         // steps between two checkpoints

  int64_t stride() const { return slot_stride(N); }
  // What is saved of a step of a row for the backward: per layer of an LSTM the gates i, f, g, o
  // and the cell [5C]; the outputs of all layers but the last [layers - 1, C]; head values [P].
  int64_t record() const { return (lstm ? layers * 5 * C : 0) + (layers - 1) * C + P; }
};

// A state, or gradients of one: [layers, B, C] twice, [B, N, M], [B, heads, N], [B, reads, M].
// `initial` has the same parts without B.
template <class Pointer>
struct State {
  Pointer hidden, cell, memory, weightings, reads;
};

struct Forward {
  const void* input;  // [T, B, I]
  State<const void*> state, initial;
  const void* const*
      controller;           // per layer weight_ih, weight_hh, bias_ih, bias_hh; or weight, bias
  const void* head_weight;  // [P, C]
  const void* head_bias;    // [P]
  void* features;           // [T, B, C + reads * M]
  State<void*> final;
  void* trace;        // [T, B, heads, N], or null
  void* saved;        // [T, B, record()], or null; then the next is null too
  void* checkpoints;  // [>= T / segment, B, M, stride()]: the memory that enters each segment
  void* workspace;
};

struct Backward {
  const void* grad_features;  // null where zero, as are the next two
  int64_t grad_features_strides[3];
  State<const void*> grad_final;
  const void* grad_trace;
  const void* input;
  State<const void*> state, initial;
  const void* const* controller;
  const void* head_weight;
  const void* features;
  const void* trace;
  const void* saved;
  const void* checkpoints;
  void* grad_input;  // null where not wanted, as are all the rest
  State<void*> grad_state, grad_initial;
  void* const* grad_controller;  // all or none, together with the next two
  void* grad_head_weight;
  void* grad_head_bias;
  void* workspace;
};

SEQMEM_FOR_EACH_ISA(extern const Kernel<Forward, Shape> forward_kernel;
                    extern const Kernel<Backward, Shape> backward_kernel;)

// Tensors are float here as well, from bf16.
SEQMEM_FOR_BF16(SEQMEM_IF_BUILT extern const Kernel<Forward, Shape> forward_kernel;
                SEQMEM_IF_BUILT extern const Kernel<Backward, Shape> backward_kernel;)

}  // namespace seqmem::ntm
