// The NTM functionals' CPU kernels: plain loops over raw pointers, compiled once per ISA.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/storage.h"

namespace seqmem::ntm_addressing {

struct Shape {
  int64_t B, H, N, M;  // batch rows, heads, slots, slot width
  int64_t taps;        // of the shift; 0 where only content is addressed
};

// Storage type S is float, double, bf16 or fp16; every array is contiguous.
struct Addressing {
  const void* memory;        // [B, N, M]
  const void* key;           // [B, H, M]
  const void* beta;          // [B, H]
  const void* gate;          // [B, H]; this and all below null where taps = 0
  const void* shift;         // [B, H, taps]
  const void* gamma;         // [B, H]
  const void* prev_weights;  // [B, H, N]
};

struct AddressingGradients {  // null where not wanted
  void* memory;
  void* key;
  void* beta;
  void* gate;
  void* shift;
  void* gamma;
  void* prev_weights;
};

struct Write {
  const void* memory;   // [B, N, M]
  const void* weights;  // [B, H, N]
  const void* erase;    // [B, H, M]
  const void* add;      // [B, H, M]
};

struct WriteGradients {  // null where not wanted
  void* memory;
  void* weights;
  void* erase;
  void* add;
};

// Each function computes the batch rows begin..end-1 with a scratch of workspace() bytes, 64-byte
// aligned. Rows are independent, so that the result is the same for every way to share them out.
struct AddressingKernel {
  int64_t (*workspace)(Storage, const Shape&);
  // weights [B, H, N]
  void (*forward)(Storage, const Shape&, const Addressing&, void* weights, int64_t begin,
                  int64_t end, char* workspace);
  // grad [B, H, N]
  void (*backward)(Storage, const Shape&, const Addressing&, const void* grad,
                   const AddressingGradients&, int64_t begin, int64_t end, char* workspace);
};

struct MemoryKernel {
  int64_t (*workspace)(Storage, const Shape&);
  // reads [B, H, M]
  void (*read)(Storage, const Shape&, const void* memory, const void* weights, void* reads,
               int64_t begin, int64_t end, char* workspace);
  // grad [B, H, M]; null where a gradient is not wanted
  void (*read_backward)(Storage, const Shape&, const void* memory, const void* weights,
                        const void* grad, void* grad_memory, void* grad_weights, int64_t begin,
                        int64_t end, char* workspace);
  // out [B, N, M]
  void (*write)(Storage, const Shape&, const Write&, void* out, int64_t begin, int64_t end,
                char* workspace);
  // grad [B, N, M]
  void (*write_backward)(Storage, const Shape&, const Write&, const void* grad,
                         const WriteGradients&, int64_t begin, int64_t end, char* workspace);
};

SEQMEM_FOR_EACH_ISA(extern const AddressingKernel addressing_kernel;
                    extern const MemoryKernel memory_kernel;)

}  // namespace seqmem::ntm_addressing
