// The delta memory's CPU kernels, compiled once per ISA.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/storage.h"

namespace seqmem::delta_memory {

// Steps that a backward takes at once; memories are kept at multiples of it.
constexpr int64_t kChunk = 16;

enum class Decay { None, Head, Feature };

struct Shape {
  int64_t B, T, Hk, H, K, V;
  int64_t segment;  // steps from one kept memory to the next, a multiple of kChunk
  int64_t slices;   // parts of V that a backward takes as work of their own
  Decay decay;
  bool l2norm;
  double scale;
  const int64_t* lengths;  // [B], or null
  const bool* reset;       // [B, T], or null

  int64_t segments() const { return (T + segment - 1) / segment; }
  int64_t kept_rows() const { return K + segment; }  // [V] of each segment: S, then its steps' x
};

// [B, T, heads, width] of the storage type, contiguous in its last dimension; strides in elements.
struct Rows {
  const void* data;  // null: zeros
  int64_t batch, time, head;
};

// Storage type S is float, double, bf16 or fp16; C is double for double, else float.
struct Forward {
  Rows q, k, v;
  const void* beta;   // C [B, T, H]
  const void* decay;  // C [B, T, H] or [B, T, H, K], or null
  const void* state;  // C [B, H, K, V], or null
  void* output;       // S [B, T, H, V]
  void* final_state;  // C [B, H, K, V]
  // C [B, H, segments, K + segment, V]: S where each segment begins, x of its steps; or null
  void* states;
  void* workspace;  // workspace() bytes, 64-byte aligned
};

struct Backward {
  Rows grad_output, q, k, v;
  const void* grad_final;  // C [B, H, K, V], or null
  const void *beta, *decay, *states;
  void *grad_q, *grad_k;    // S [B, T, Hk, K]
  void* grad_v;             // S [B, T, H, V]
  void* grad_beta;          // C [slices, B, T, H]
  void* grad_decay;         // C [slices, B, T, H] or [slices, B, T, H, K], or null
  void* grad_state;         // C [B, H, K, V]
  void *parts_q, *parts_k;  // C [B, H, slices, T, K] where several share a key head, else null
  void* workspace;
};

SEQMEM_FOR_EACH_ISA(extern const Kernel<Forward, Shape> forward_kernel;
                    extern const Kernel<Backward, Shape> backward_kernel;)

}  // namespace seqmem::delta_memory
