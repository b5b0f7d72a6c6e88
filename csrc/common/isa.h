// Declares what every ISA's copy of a kernel source defines.
#pragma once

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
