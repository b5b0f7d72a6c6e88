// Window attention's CPU kernels: plain loops over raw pointers, compiled once per ISA.
//
// Letters: HeadShape's, W = left + 1 + right columns of the band, G global keys.
#pragma once

#include <cstdint>

#include "../common/heads.h"
#include "../common/isa.h"

namespace seqmem::window_attention {

struct Shape : HeadShape {
  // Column c of query i is key offset + i + (c - left) * dilation.
  int64_t left, right, dilation, offset, G;
  Bounds start, end;  // query i sees keys start..end-1 alone

  int64_t W() const { return left + 1 + right; }
};

// How the work of one call is divided among the threads.
struct Plan {
  // The parts of a head's queries, each of which is a task. A backward keeps separate sums for
  // each, so there the number must not depend on the threads.
  int64_t groups;
  mutable int64_t next;  // the first task that no thread has taken yet, 0 at the start
};

// Storage type S is float, double, bf16 or fp16.
struct Forward {
  Heads q;               // [B, Hq, Tq, D]
  Heads k;               // [B, Hk, Tk, D]
  Heads v;               // [B, Hk, Tk, Dv]
  void* output;          // [B, Hq, Tq, Dv]
  void* weights;         // [B, Hq, Tq, W], or null; negative where dropped
  void* global_weights;  // [B, Hq, Tq, G], or null
  void* workspace;
};

struct Backward {
  Heads grad_output;   // [B, Hq, Tq, Dv], or null
  Heads grad_weights;  // [B, Hq, Tq, W], or null
  Heads grad_global;   // [B, Hq, Tq, G], or null
  Heads q, k, v;
  const void* weights;         // [B, Hq, Tq, W]
  const void* global_weights;  // [B, Hq, Tq, G]
  void* grad_q;                // [B, Hq, Tq, D], or null
  void* grad_k;                // [B, Hk, Tk, D], or null
  void* grad_v;                // [B, Hk, Tk, Dv], or null
  void* workspace;
};

SEQMEM_FOR_EACH_ISA(extern const Kernel<Forward, Shape, Plan> forward_kernel;
                    extern const Kernel<Backward, Shape, Plan> backward_kernel;)

}  // namespace seqmem::window_attention
