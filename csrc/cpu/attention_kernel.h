// Scaled dot-product attention's CPU kernels: plain loops over raw pointers, compiled once per ISA.
//
// All leading dimensions are folded into N batches. Each operand has a table of where its batches
// begin, so that broadcasting needs no copies. Letters: Tq queries, Tk keys, D and Dv features.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace seqmem::attention {

enum class MaskKind { None, Allowed, Added };

struct Shape {
  int64_t N, Tq, Tk, D, Dv;
  double scale;
  double alpha;  // 1: softmax, else entmax's
  bool causal;   // query i sees keys 0..i alone
  MaskKind mask;
};

// How the work of one call is divided among the threads.
struct Plan {
  // Whether keys and values are copied into panels, which pays when many queries use them. A
  // backward always copies them.
  bool pack;
  // The parts of a batch's queries, each of which is a task. A backward keeps separate sums for
  // each, so there the number must not depend on the threads.
  int64_t groups;
  mutable int64_t next;  // the first task that no thread has taken yet, 0 at the start
};

// One operand: element (n, row, column) is data[offset[n] + row * rows + column * columns].
struct Matrices {
  const void* data;
  const int64_t* offset;  // [N]
  int64_t rows, columns;  // strides
};

// Storage type S is float, double, bf16 or fp16; data is null where optional and absent.
struct Forward {
  Matrices query;  // [Tq, D]
  Matrices key;    // [Tk, D]
  Matrices value;  // [Tk, Dv]
  Matrices mask;   // [Tq, Tk], bytes where MaskKind::Allowed, else S; columns is 0 or 1
  void* output;    // [N, Tq, Dv]
  void* weights;   // [N, Tq, Tk]
  void* workspace;
};

struct Backward {
  Matrices grad_output;   // [Tq, Dv], or null
  Matrices grad_weights;  // [Tq, Tk], or null; columns is 0 or 1
  Matrices query, key, value, mask;
  const void* weights;  // [N, Tq, Tk]
  void* grad_query;     // [N, Tq, D], or null
  void* grad_key;       // [N, Tk, D], or null
  void* grad_value;     // [N, Tk, Dv], or null
  void* grad_mask;      // [N, Tq, Tk], or null
  void* workspace;
};

SEQMEM_FOR_EACH_ISA(extern const Kernel<Forward, Shape, Plan> forward_kernel;
                    extern const Kernel<Backward, Shape, Plan> backward_kernel;)
// bf16 and softmax alone.
SEQMEM_FOR_BF16(SEQMEM_IF_BUILT extern const Kernel<Forward, Shape, Plan> forward_kernel;
                SEQMEM_IF_BUILT extern const Kernel<Backward, Shape, Plan> backward_kernel;)

}  // namespace seqmem::attention
