// What the kernels on tiles were compiled for.
#include "../common/isa.h"

namespace seqmem {

const TilesBuild SEQMEM_ISA::tiles_build = {
#if defined(__AVX512F__)
    .vectors = Isa::Avx512,
#elif defined(__AVX2__)
    .vectors = Isa::Avx2,
#else
    .vectors = Isa::Baseline,
#endif
#if defined(SEQMEM_EMULATE_TILES)
    .emulated = true,
#else
    .emulated = false,
#endif
};

}  // namespace seqmem
