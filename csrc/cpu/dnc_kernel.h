// CPU kernels of the Differentiable Neural Computer: plain loops over raw pointers, compiled once
// per ISA.
//
// Arithmetic and storage are float or double; the op converts 16-bit tensors. A memory matrix is
// held transposed, [M][stride]: slots are SIMD lanes, so that no sum is over the lanes of a vector.
// A link matrix is [N][stride].
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/machine.h"

namespace seqmem::dnc {

using machine::kShortestSegment;
using machine::slot_stride;

struct Shape {
  int64_t T, B, I, layers, C, N, M;
  int64_t reads, writes, P;  // heads; values of the interface
  bool lstm, squash, usage_gradient, masks, deallocate, sharpen, links;
  bool softplus;  // strengths without the 1
  bool softmax;   // allocation
  bool norm;      // of the interface
  double norm_floor, eps, mask_min;
  const int64_t* lengths;  // [B], or null
  const bool* reset;       // [T, B], or null
  int64_t segment;         // steps between two checkpoints

  static constexpr int64_t heads = 0;  // weightings are no part of machine::Carries

  int64_t linked() const { return links ? writes : 0; }
  int64_t stride() const { return slot_stride(N); }
  // See common/machine_layout.h; p as the controller gives it.
  int64_t record() const { return (lstm ? layers * 5 * C : 0) + (layers - 1) * C + P; }
  // A checkpoint: memory [M, N], links [linked, N, N], precedence [linked, N].
  int64_t checkpoint() const { return (M + linked() * (N + 1)) * N; }
};

// A state, or gradients of one: hidden and cell [layers, B, C], memory [B, N, M], usage [B, N],
// link [B, linked, N, N], precedence [B, linked, N], write_weights [B, writes, N], read_weights
// [B, reads, N], reads [B, reads, M]. `initial` has the same parts without B.
template <class Pointer>
struct State {
  Pointer hidden, cell, memory, usage, link, precedence, write_weights, read_weights, reads;
  Pointer weightings;  // null: see Shape::heads
};

struct Forward {
  const void* input;  // [T, B, I]
  State<const void*> state, initial;
  const void* const*
      controller;           // per layer weight_ih, weight_hh, bias_ih, bias_hh; or weight, bias
  const void* head_weight;  // [P, C]: the interface
  const void* head_bias;    // [P]
  const void* norm_weight;  // [P], or null
  const void* norm_bias;    // [P], or null
  void* features;           // [T, B, C + reads * M]
  State<void*> final;
  void* usage_trace;  // [T, B, N], or null, as the next two
  void* write_trace;  // [T, B, writes, N]
  void* read_trace;   // [T, B, reads, N]
  void* saved;        // [T, B, record()], or null; then the next is null too
  void* checkpoints;  // [>= T / segment, B, checkpoint()]: what enters each segment
  void* workspace;
};

struct Backward {
  const void* grad_features;  // null where zero, as are the next four
  int64_t grad_features_strides[3];
  State<const void*> grad_final;
  const void* grad_usage_trace;
  const void* grad_write_trace;
  const void* grad_read_trace;
  const void* input;
  State<const void*> state, initial;
  const void* const* controller;
  const void* head_weight;
  const void* norm_weight;
  const void* norm_bias;
  const void* features;
  const void* usage_trace;
  const void* write_trace;
  const void* read_trace;
  const void* saved;
  const void* checkpoints;
  void* grad_input;  // null where not wanted, as are all the rest
  State<void*> grad_state, grad_initial;
  void* const* grad_controller;  // all or none, together with the next three
  void* grad_head_weight;
  void* grad_head_bias;
  void* grad_norm;  // [B, 2, P]: each row's share of the gradients of norm_weight and norm_bias
  void* workspace;
};

SEQMEM_FOR_EACH_ISA(extern const Kernel<Forward, Shape> forward_kernel;
                    extern const Kernel<Backward, Shape> backward_kernel;)

}  // namespace seqmem::dnc
