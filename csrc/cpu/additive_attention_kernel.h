// Additive attention's CPU kernels: plain loops over raw pointers, compiled once per ISA.
//
// A batch row is one pair of query and key matrices. Leading dimensions that broadcast are told by
// the `..._of` tables: which matrix of an argument serves a batch row.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/spin_barrier.h"
#include "../common/storage.h"

namespace seqmem::additive_attention {

struct Shape {
  int64_t B, Tq, Tk, A, Dv;
  const int64_t* query_of;  // [B]
  const int64_t* key_of;    // [B]
  const int64_t* value_of;  // [B]
  const int64_t* mask_of;   // [B]
  int64_t mask_rows;        // Tq, or 1 where all queries share a row
  int64_t groups;           // the backward splits each batch row's queries so often
};

// Storage type S is float, double, bf16 or fp16; null where absent or not wanted.
struct Arguments {
  const void* query;         // [*, Tq, A]
  const void* key;           // [*, Tk, A]
  const void* value;         // [*, Tk, Dv]
  const void* score_weight;  // [A]
  const bool* keep;          // [*, mask_rows, Tk]: false where masked
  const void* bias;          // [*, mask_rows, Tk]: added to the scores
};

struct Forward : Arguments {
  void* output;     // [B, Tq, Dv]
  void* weights;    // [B, Tq, Tk]
  void* workspace;  // workspace() bytes, 64-byte aligned
};

struct Backward : Arguments {
  const void* grad_output;   // [B, Tq, Dv]
  const void* grad_weights;  // [B, Tq, Tk]
  const void* weights;       // [B, Tq, Tk]
  void* grad_query;          // [B, Tq, A]
  void* grad_key;            // [B, Tk, A]
  void* grad_value;          // [B, Tk, Dv]
  void* grad_score_weight;   // [A]
  void* grad_scores;         // [B, Tq, Tk], which is also the gradient of an added mask
  void* workspace;
};

// Entry points of one ISA. Run them from `threads` threads with ids 0..threads-1, all sharing one
// barrier. The result does not depend on the number of threads, to the bit.
struct ForwardKernel {
  int64_t (*workspace)(Storage, const Shape&, int threads);
  void (*run)(Storage, const Shape&, const Forward&, int thread, int threads);
};

struct BackwardKernel {
  int64_t (*workspace)(Storage, const Shape&, int threads);
  void (*run)(Storage, const Shape&, const Backward&, int thread, int threads, SpinBarrier&);
};

SEQMEM_FOR_EACH_ISA(extern const ForwardKernel forward_kernel;
                    extern const BackwardKernel backward_kernel;)

}  // namespace seqmem::additive_attention
