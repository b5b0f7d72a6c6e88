// The LSTM's CPU kernels: plain loops over raw pointers, compiled once per ISA.
//
// One layer, one direction. Rows are kept in `order` (longest sequence first), so that the rows
// active at a step are always the first `active[t]` of them. Element (t, row r) of every sequence
// tensor is at row index step_row[t] + order[r] * row_stride: that covers time-major,
// batch-first and packed layouts alike.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace seqmem::lstm {

struct Shape {
  int64_t T, B, I, H;
  int64_t P;                // size of h: the projection's size, or H
  bool projected;           // whether weight_hr is given
  bool reverse;             // time runs from the last step to the first
  int64_t row_stride;       // see above
  const int64_t* step_row;  // [T]
  const int64_t* order;     // [B]
  const int64_t* active;    // [T + 1], active[T] = 0
  const bool* reset;        // laid out as the sequence tensors' rows, or null
};

// How one call is shared out. With by_rows every thread runs its own batch rows through time;
// otherwise every thread owns hidden units and all meet at a barrier once per step.
struct Plan {
  bool by_rows;   // required where weight_hr is given
  bool pack;      // weights are copied into panels first; pays when many rows use them
  int64_t chunk;  // time steps projected, or differentiated, at once; on tiles 0 is none projected
};

// Storage type S is float, double, bf16 or fp16; null where optional and absent.
struct Forward {
  const void* input;      // [rows, I]
  const void* hx;         // [B, P]
  const void* cx;         // [B, H]
  const void* weight_ih;  // [4H, I]
  const void* weight_hh;  // [4H, P]
  const void* bias_ih;    // [4H]
  const void* bias_hh;    // [4H]
  const void* weight_hr;  // [P, H]
  void* output;           // [rows, P], zero where no row is active
  void* hy;               // [B, P], or null
  void* cy;               // [B, H], or null
  void* gates;            // [rows, 4H], or null
  void* cells;            // [rows, H], or null
  void* workspace;        // workspace() bytes, 64-byte aligned
};

struct Backward {
  const void* grad_output;   // [rows, P]; one row for all of them where grad_output_step is 0
  int64_t grad_output_step;  // P or 0
  const void* grad_hy;       // [B, P]
  const void* grad_cy;       // [B, H]
  const void* grad_gates;    // [rows, 4H]
  const void* grad_cells;    // [rows, H]
  const void* input;
  const void* hx;
  const void* cx;
  const void* weight_ih;
  const void* weight_hh;
  const void* weight_hr;
  const void* output;
  const void* gates;
  const void* cells;
  void* grad_input;      // [rows, I], zero where no row is active; or null
  void* grad_hx;         // [B, P], or null
  void* grad_cx;         // [B, H], or null
  void* grad_weight_ih;  // [4H, I], or null; null together with the next
  void* grad_weight_hh;  // [4H, P]
  void* grad_bias;       // [4H], or null
  void* grad_weight_hr;  // [P, H], or null
  void* workspace;
};

SEQMEM_FOR_EACH_ISA(extern const Kernel<Forward, Shape, Plan> forward_kernel;
                    extern const Kernel<Backward, Shape, Plan> backward_kernel;)
// bf16 alone, no projection.
SEQMEM_FOR_BF16(SEQMEM_IF_BUILT extern const Kernel<Forward, Shape, Plan> forward_kernel;
                SEQMEM_IF_BUILT extern const Kernel<Backward, Shape, Plan> backward_kernel;)

}  // namespace seqmem::lstm
