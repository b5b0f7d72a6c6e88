// Indexed attention's CPU kernels: plain loops over raw pointers, compiled once per ISA.
//
// Letters: HeadShape's, C places of a query's list of keys.
#pragma once

#include <cstdint>

#include "../common/heads.h"
#include "../common/isa.h"

namespace seqmem::indexed_attention {

struct Shape : HeadShape {
  int64_t C;
  // Row b and head h read the lists number b * row + h * head.
  int64_t lists, row, head;
};

// The first tasks that no thread has taken yet, of each pass; 0 at the start.
struct Plan {
  mutable int64_t next[3];
};

// Storage type S is float, double, bf16 or fp16. Features are contiguous.
struct Forward {
  Heads q;               // [B, Hq, Tq, D]
  Heads k;               // [B, Hk, Tk, D]
  Heads v;               // [B, Hk, Tk, Dv]
  const int64_t* index;  // [lists, Tq, C], -1 for none
  void* output;          // [B, Hq, Tq, Dv]
  void* weights;         // [B, Hq, Tq, C], or null; negative where dropped
  void* workspace;
};

struct Backward {
  Heads grad_output;         // [B, Hq, Tq, Dv], or null
  const void* grad_weights;  // [B, Hq, Tq, C], or null
  Heads q, k, v;
  const int64_t* index;
  const void* weights;  // [B, Hq, Tq, C]
  void* grad_q;         // [B, Hq, Tq, D], or null
  void* grad_k;         // [B, Hk, Tk, D], or null
  void* grad_v;         // [B, Hk, Tk, Dv], or null
  // Where grad_k or grad_v is wanted: the slopes [B, Hq, Tq, C] in the compute type, the places
  // [lists, Tq * C] of the lists in the order of their keys, and where a key's begin [lists, Tk +
  // 1].
  void* slopes;
  int64_t *places, *begins;
  void* workspace;
};

SEQMEM_FOR_EACH_ISA(extern const Kernel<Forward, Shape, Plan> forward_kernel;
                    extern const Kernel<Backward, Shape, Plan> backward_kernel;)

// The `count` keys of the highest scores for each query.
struct Selection {
  Heads q, k;
  int64_t* index;  // [B, Hq, Tq, count]
  int64_t count;
  bool is_causal;
  Bounds end;
  void* workspace;
};

SEQMEM_FOR_EACH_ISA(extern const Kernel<Selection, Shape, Plan> selection_kernel;)

}  // namespace seqmem::indexed_attention
