// The dynamic memory's CPU kernels: plain loops over raw pointers, compiled once per ISA.
//
// Every slot of a row goes through the same affine map, so after k hops the memory is
// M_k = A_k * M_0 + B_k with A, B of one slot's width: M_k itself is never formed.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace seqmem::dynamic_memory {

struct Shape {
  int64_t B, N, m, h, hops;
  bool shared;  // one memory [N, m] for all rows
  bool tiled;   // products with the memory take several rows at once; shared, without mask
  bool pack;    // weights are copied into panels first; pays when many rows use them
};

// Storage type S is float, double, bf16 or fp16; C is double for double, else float. Null where
// optional and absent.
struct Forward {
  const void* query;         // [B, h]
  const void* memory;        // [N, m] if shared, else [B, N, m]
  const void* gate_weight;   // [m, m + h]
  const void* gate_bias;     // [m]
  const void* write_weight;  // [m, m + h]
  const void* write_bias;    // [m]
  const void* score_query;   // [B, m]; query where null
  const bool* mask;          // [B, N], or null
  void* final_memory;        // [B, N, m], or null
  void* attention;           // [hops, B, N]
  void* saved;               // C [hops, B, 3, m]: gate, write, read of M_0; or null
  void* workspace;           // workspace() bytes, 64-byte aligned
};

struct Backward {
  const void* grad_final;        // [B, N, m] with the strides below, or null
  const void* grad_attention;    // [hops, B, N] with the strides below, or null
  int64_t final_strides[3];      // in elements
  int64_t attention_strides[3];  // in elements
  const void* query;
  const void* memory;
  const void* gate_weight;
  const void* write_weight;
  const void* score_query;
  const bool* mask;
  const void* attention;
  const void* saved;
  void* grad_query;        // [B, h], or null; holds the scores' part too without score_query
  void* grad_memory;       // as memory, or null
  void* grad_gate_weight;  // or null, together with the next three
  void* grad_gate_bias;
  void* grad_write_weight;
  void* grad_write_bias;
  void* grad_score_query;  // [B, m], or null
  void* workspace;
};

SEQMEM_FOR_EACH_ISA(extern const Kernel<Forward, Shape> forward_kernel;
                    extern const Kernel<Backward, Shape> backward_kernel;)

}  // namespace seqmem::dynamic_memory
