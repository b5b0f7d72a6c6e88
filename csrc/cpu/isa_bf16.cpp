// What the kernels in bf16 were compiled for.
#include "../common/isa.h"

namespace seqmem {

const Bf16Build SEQMEM_ISA::bf16_build = {
#if defined(__AVX512F__)
    .vectors = Isa::Avx512,
#elif defined(__AVX2__)
    .vectors = Isa::Avx2,
#else
    .vectors = Isa::Baseline,
#endif
#if defined(SEQMEM_EMULATE_TILES) || (defined(SEQMEM_DOT_PRODUCTS) && !defined(__AVX512BF16__))
    .emulated = true,
#else
    .emulated = false,
#endif
};

}  // namespace seqmem
