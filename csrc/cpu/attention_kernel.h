// Scaled dot-product attention's CPU kernels: plain loops over raw pointers, compiled once per ISA.
//
// All leading dimensions are folded into N batches, whose places each operand tells by offsets, so
// that broadcasting needs no copies. Letters: Tq queries, Tk keys, D and Dv features.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/spin_barrier.h"
#include "../common/storage.h"

namespace seqmem::attention {

enum class MaskKind { None, Allowed, Added };

struct Shape {
  int64_t N, Tq, Tk, D, Dv;
  double scale;
  bool causal;  // query i sees keys 0..i alone
  MaskKind mask;
};

// How one call is shared out.
struct Plan {
  // Keys and values are copied into panels, which pays when many queries use them. A backward
  // always does.
  bool pack;
  // Parts of a batch's queries that are shared out one by one. In a backward they sum up apart, so
  // there the number must not depend on the threads.
  int64_t groups;
  mutable int64_t next;  // the first task not yet taken, 0 at the start
};

// One operand: element (n, row, column) lies at data + offset[n] + row * rows + column * columns.
struct Matrices {
  const void* data;
  const int64_t* offset;  // [N]
  int64_t rows, columns;
};

// Storage type S is float, double, bf16 or fp16; data is null where optional and absent.
struct Forward {
  Matrices query;   // [Tq, D]
  Matrices key;     // [Tk, D]
  Matrices value;   // [Tk, Dv]
  Matrices mask;    // [Tq, Tk], bytes where MaskKind::Allowed, else S; columns is 0 or 1
  void* output;     // [N, Tq, Dv]
  void* weights;    // [N, Tq, Tk]
  void* workspace;  // forward_workspace() bytes, 64-byte aligned
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

// Entry points of one ISA. Run them from `threads` threads with ids 0..threads-1, all sharing one
// plan and one barrier. The result does not depend on the number of threads, to the bit.
struct ForwardKernel {
  int64_t (*workspace)(Storage, const Shape&, const Plan&, const Forward&, int threads);
  void (*run)(Storage, const Shape&, const Plan&, const Forward&, int thread, int threads);
};

struct BackwardKernel {
  int64_t (*workspace)(Storage, const Shape&, const Plan&, const Backward&, int threads);
  void (*run)(Storage, const Shape&, const Plan&, const Backward&, int thread, int threads,
              SpinBarrier&);
};

SEQMEM_FOR_EACH_ISA(extern const ForwardKernel forward_kernel;
                    extern const BackwardKernel backward_kernel;)

}  // namespace seqmem::attention
