// Block-sparse attention's CPU kernels: plain loops over raw pointers, compiled once per ISA.
//
// Letters: HeadShape's, N listed blocks of Bq queries by Bk keys, in nQ rows and nK columns.
#pragma once

#include <cstdint>

#include "../common/heads.h"
#include "../common/isa.h"

namespace seqmem::block_sparse_attention {

// Lists of blocks. Row b and head h have list number b * row + h * head: its blocks, in the order
// of their query blocks and then key blocks; then perhaps places that hold none.
struct Lists {
  const int64_t* blocks;  // [lists, N, 2]: query block, key block
  const int64_t* rows;    // [lists, nQ + 1]: where the blocks of each query block begin
  // For a backward, places of blocks in the order of their key blocks, and where these begin.
  const int64_t* by_key;   // [lists, N]
  const int64_t* columns;  // [lists, nK + 1]
  int64_t row, head;
  int64_t longest;  // most blocks of one query block
};

struct Shape : HeadShape {
  int64_t N, Bq, Bk, nQ, nK;
  Lists lists;
  bool is_causal;  // query i sees no key after key i
  Bounds end;      // and keys 0..end-1 alone
};

// How the work of one call is divided among the threads.
struct Plan {
  int64_t groups;  // the parts of a head's query blocks, each of which is a task
  int64_t heads;   // of keys, which a backward takes through both of its passes before the next
  // The first task that no thread has taken yet, of query blocks and of key blocks; 0 at the start.
  mutable int64_t next, next_column;
};

// Storage type S is float, double, bf16 or fp16.
struct Forward {
  Heads q;        // [B, Hq, Tq, D]
  Heads k;        // [B, Hk, Tk, D]
  Heads v;        // [B, Hk, Tk, Dv]
  void* output;   // [B, Hq, Tq, Dv]
  void* weights;  // [B, Hq, N, Bq, Bk], or null; negative where dropped
  void* workspace;
};

struct Backward {
  Heads grad_output;         // [B, Hq, Tq, Dv], or null
  const void* grad_weights;  // [B, Hq, N, Bq, Bk], or null
  Heads q, k, v;
  const void* weights;  // [B, Hq, N, Bq, Bk]
  void* grad_q;         // [B, Hq, Tq, D], or null
  void* grad_k;         // [B, Hk, Tk, D], or null
  void* grad_v;         // [B, Hk, Tk, Dv], or null
  void* slopes;  // [plan.heads * Hq / Hk, N, Bq, padded Bk] in the compute type, or null where
                 // grad_q and grad_k are
  void* workspace;
};

SEQMEM_FOR_EACH_ISA(extern const Kernel<Forward, Shape, Plan> forward_kernel;
                    extern const Kernel<Backward, Shape, Plan> backward_kernel;)

}  // namespace seqmem::block_sparse_attention
