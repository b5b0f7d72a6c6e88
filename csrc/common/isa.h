// Declares what every ISA's copy of a kernel source defines.
#pragma once

#include <cstdint>

#include "spin_barrier.h"
#include "storage.h"

// The same declarations in the namespaces that SEQMEM_ISA can name.
#define SEQMEM_FOR_EACH_ISA(...) \
  namespace baseline {           \
  __VA_ARGS__                    \
  }                              \
  namespace avx2 {               \
  __VA_ARGS__                    \
  }                              \
  namespace avx512 {             \
  __VA_ARGS__                    \
  }

// The same for kernels in bf16: on tiles, and on vectors of dot products. In a build without them
// their addresses are null.
#define SEQMEM_FOR_BF16(...) \
  namespace amx {            \
  __VA_ARGS__                \
  }                          \
  namespace avx512_bf16 {    \
  __VA_ARGS__                \
  }
#define SEQMEM_IF_BUILT __attribute__((weak))

namespace seqmem {

enum class Isa { Baseline, Avx2, Avx512 };

// What kernels in bf16 were compiled for beside tiles or dot products, which may be emulated.
struct Bf16Build {
  Isa vectors;
  bool emulated;
};
SEQMEM_FOR_BF16(SEQMEM_IF_BUILT extern const Bf16Build bf16_build;)

// The entry points of one ISA's kernel; Shapes are what its work is laid out by. `workspace` gives
// the bytes that Arguments::workspace must have, 64-byte aligned. Call `run` from `threads` threads
// with ids 0..threads-1 that share one barrier. Results do not depend on the number of threads, to
// the bit.
template <class Arguments, class... Shapes>
struct Kernel {
  int64_t (*workspace)(Storage, const Shapes&..., const Arguments&, int threads);
  void (*run)(Storage, const Shapes&..., const Arguments&, int thread, int threads, SpinBarrier&);
};

}  // namespace seqmem
