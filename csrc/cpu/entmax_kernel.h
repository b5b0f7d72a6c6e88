// Entmax's CPU kernels: one row after the other, compiled once per ISA.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/storage.h"

namespace seqmem::entmax {

struct Shape {
  int64_t rows, K;
  double alpha;  // of all rows, where no row has its own
};

// Storage type S is float, double, bf16 or fp16.
struct Forward {
  const void* input;    // [rows, K]
  const double* alpha;  // [rows], or null
  void* output;         // [rows, K]
  void* workspace;      // workspace() bytes, 64-byte aligned
};

struct Backward {
  const void* grad_output;  // [rows, K]
  const void* input;        // [rows, K], read for grad_alpha alone
  const void* output;       // [rows, K]
  const double* alpha;      // [rows], or null
  void* grad_input;         // [rows, K], or null
  double* grad_alpha;       // [rows], or null
  void* workspace;
};

SEQMEM_FOR_EACH_ISA(extern const Kernel<Forward, Shape> forward_kernel;
                    extern const Kernel<Backward, Shape> backward_kernel;)

}  // namespace seqmem::entmax
