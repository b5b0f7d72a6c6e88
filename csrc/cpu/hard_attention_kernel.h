// Hard attention's CPU kernels: one pass over each row of logits, compiled once per ISA.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/storage.h"

namespace seqmem::hard_attention {

struct Shape {
  int64_t rows, K;
};

// Storage type S is float, double, bf16 or fp16; C is double for double, else float.
struct Forward {
  const void* logits;   // [rows, K]
  const void* uniform;  // C [rows], or null: then the actions are given
  int64_t* action;      // [rows], written where uniform is given
  void* log_prob;       // [rows] of S, or of C if `wide`
  void* entropy;        // likewise
  bool wide;
  void* workspace;  // workspace() bytes, 64-byte aligned
};

// grad_logits = by_log_prob * (onehot - p) - by_entropy * p * (log p + H)
struct Backward {
  const void* logits;
  const int64_t* action;    // [rows]
  const void* by_log_prob;  // C [rows]
  const void* by_entropy;   // C [rows]
  void* grad_logits;        // [rows, K]
  void* workspace;
};

SEQMEM_FOR_EACH_ISA(extern const Kernel<Forward, Shape> forward_kernel;
                    extern const Kernel<Backward, Shape> backward_kernel;)

}  // namespace seqmem::hard_attention
