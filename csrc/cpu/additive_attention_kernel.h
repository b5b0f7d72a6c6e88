// Additive attention's CPU kernels: plain loops over raw pointers, compiled once per ISA.
//
// A batch row is one pair of query and key matrices. Leading dimensions may broadcast: the
// `..._offset` tables tell where each batch row's matrix begins in an argument, in elements.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace seqmem::additive_attention {

struct Shape {
  int64_t B, Tq, Tk, A, Dv;
  const int64_t *query_offset, *key_offset, *value_offset, *mask_offset;  // [B]
  int64_t mask_stride;  // from one query's row to the next: Tk, or 0 where all share a row
  int64_t groups;       // parts into which the backward splits each batch row's queries
};

// Storage type S is float, double, bf16 or fp16; null where absent or not wanted.
struct Arguments {
  const void* query;         // [*, Tq, A]
  const void* key;           // [*, Tk, A]
  const void* value;         // [*, Tk, Dv]
  const void* score_weight;  // [A]
  const bool* keep;          // [*, Tq or 1, Tk]: false where masked
  const void* bias;          // [*, Tq or 1, Tk]: added to the scores
};

struct Forward : Arguments {
  void* output;   // [B, Tq, Dv]
  void* weights;  // [B, Tq, Tk]
  void* workspace;
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

SEQMEM_FOR_EACH_ISA(extern const Kernel<Forward, Shape> forward_kernel;
                    extern const Kernel<Backward, Shape> backward_kernel;)

}  // namespace seqmem::additive_attention
